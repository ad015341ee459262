//! Creates a listening socket under its final name.
//!
//! ```text
//!   lock NAME.lock ─> is NAME in use? ─> bind, listen ─> group ─> mode
//! ```
//!
//! The lock makes the sequence atomic with respect to other daemons. If two daemons are started with one path, one of
//! them is refused, even while the socket of the other is bound but does not listen yet, and so looks stale. The socket
//! is bound with mode 0600, and its group is set before its mode. So it never admits a user, other than its owner, whom
//! its final group and mode do not admit.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, RawMode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{file_name, folder_of};

/// Maximum number of connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// Maximum length in bytes of a path in a socket address, without the terminating zero.
const MAX_ADDRESS_PATH: usize = 107;

/// Group and mode of a socket, which decide which users may connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketAccess {
    /// The group of the socket. `None` keeps the group that the kernel gives to a new file in the folder.
    pub group: Option<u32>,
    /// The permission bits of the socket.
    pub mode: u32,
}

impl Default for SocketAccess {
    /// Admits the owner only.
    fn default() -> SocketAccess {
        SocketAccess { group: None, mode: 0o600 }
    }
}

/// Location of a socket: its path, its open folder, and its name in that folder.
struct SocketLocation<'a> {
    path: &'a Path,
    folder: Arc<OwnedFd>,
    name: &'a OsStr,
}

/// Creates a listening socket at `path` that admits the users given by `access`. Replaces the socket of a process that
/// has ended.
///
/// # Errors
/// * `Busy` if another process listens at `path`, or is about to listen.
/// * `Refused` if `path` exists and is not a socket, is a socket in use that is not a stream socket, or does not end
///   in a file name.
/// * `NotFound` if the folder does not exist.
/// * `Io` if a system call fails, for example because the process may not set the group.
pub(super) fn bind(path: &Path, access: SocketAccess) -> Result<(UnixListener, BoundName)> {
    let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(path);
    let name = file_name(path)?;
    let folder = rustix::fs::open(folder_of(path), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed("cannot open the folder of the socket", e))?;
    let place = SocketLocation { path, folder: Arc::new(folder), name };
    let lock = NameLock::acquire(&place)?;
    remove_stale(&place)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("cannot make a socket", e))?;
    // On Linux the name gets the mode of the unbound socket, restricted by the umask.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| failed("cannot set the mode of the socket", e))?;
    let address = place.address().map_err(|e| failed("cannot bind", e))?;
    rustix::net::bind(&socket, &address).map_err(|e| failed("cannot bind", e))?;
    // The socket listens right after bind, since a front-end may connect as soon as the name exists.
    let listens = rustix::net::listen(&socket, BACKLOG);
    let bound =
        rustix::fs::openat(&place.folder, place.name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed("cannot open the socket that was just made", e))?;
    // From this line on, an early return drops `name`, which removes the name from the file system.
    let name = OwnedName::of(&bound, &place, name).map_err(|e| failed("cannot stat the socket", e))?;
    let listener = UnixListener::from(socket);
    let bound_name = BoundName { name, _lock: lock };
    listens.map_err(|e| failed("cannot listen", e))?;
    if let Some(group) = access.group {
        rustix::fs::chownat(&bound, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)
            .map_err(|e| failed(&format!("cannot give the socket to group {group}"), e))?;
    }
    // The mode is set through /proc, since fchmod refuses O_PATH descriptors, and `path` may lead to another file by
    // now.
    rustix::fs::chmod(proc_fd_path(&bound), Mode::from_raw_mode(access.mode as RawMode))
        .map_err(|e| failed("cannot set the mode of the socket", e))?;
    Ok((listener, bound_name))
}

fn proc_fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

impl SocketLocation<'_> {
    /// Returns the address of the socket: the path as given, which tools such as `ss` show, or a path through the open
    /// folder if the given path is too long for an address.
    fn address(&self) -> rustix::io::Result<SocketAddrUnix> {
        if self.path.as_os_str().len() <= MAX_ADDRESS_PATH {
            return SocketAddrUnix::new(self.path);
        }
        SocketAddrUnix::new(Path::new(&proc_fd_path(&self.folder)).join(self.name))
    }
}

/// Removes the socket of a process that has ended. The caller must hold the lock of the name.
fn remove_stale(place: &SocketLocation<'_>) -> Result<()> {
    let refuse = |kind, why: &str| Err(Error::new(kind, why).at_path(place.path));
    let failed = |what: &str, e: Errno| Err(Error::io(what, e.into()).at_path(place.path));
    match rustix::fs::statat(&place.folder, place.name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return failed("cannot stat", e),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return refuse(ErrorKind::Refused, "the path exists and is not a socket");
        }
        Ok(_) => {}
    }
    // The socket is non-blocking, since a blocking connect would wait if the backlog of the listener is full.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    match probe.and_then(|probe| rustix::net::connect(&probe, &place.address()?)) {
        Err(Errno::CONNREFUSED) => match rustix::fs::unlinkat(&place.folder, place.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => failed("cannot remove the socket of a process that has ended", e),
        },
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN) => refuse(ErrorKind::Busy, "another process listens on the socket"),
        Err(Errno::PROTOTYPE) => refuse(ErrorKind::Refused, "the path is a socket in use that is not a stream socket"),
        Err(e) => failed("cannot find out whether the socket is in use", e),
    }
}

/// The name of a socket that this process created, with its lock.
#[derive(Debug)]
pub(super) struct BoundName {
    // Declared before the lock, so that the name is removed while it is locked.
    name: OwnedName,
    _lock: NameLock,
}

impl BoundName {
    /// Returns the path at which the socket was created.
    pub(super) fn path(&self) -> &Path {
        &self.name.path
    }
}

/// A name in the file system that this process created. Dropping an `OwnedName` removes the name, unless the name leads
/// to another file by then.
#[derive(Debug)]
struct OwnedName {
    path: PathBuf,
    folder: Arc<OwnedFd>,
    name: OsString,
    /// Device and inode of the file that this process created under the name.
    id: (u64, u64),
}

impl OwnedName {
    fn of(file: impl AsFd, place: &SocketLocation<'_>, name: &OsStr) -> rustix::io::Result<OwnedName> {
        let (stat, path) = (rustix::fs::fstat(file)?, place.path.with_file_name(name));
        let id = (stat.st_dev, stat.st_ino);
        Ok(OwnedName { path, folder: place.folder.clone(), name: name.to_owned(), id })
    }

    fn is_still_ours(&self) -> rustix::io::Result<bool> {
        match rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok((found.st_dev, found.st_ino) == self.id),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Drop for OwnedName {
    fn drop(&mut self) {
        if self.is_still_ours() == Ok(true)
            && let Err(e) = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())
            && e != Errno::NOENT
        {
            log::warn!("{}: cannot remove it: {e}", self.path.display());
        }
    }
}

/// A lock on the name of a socket: the file `NAME.lock`, locked by `flock`. The holder removes the file when it drops
/// the lock. If the holder is killed, the kernel releases the lock, the file stays, and the next holder locks the same
/// file.
#[derive(Debug)]
struct NameLock {
    // Declared before the descriptor, so that the file is removed while it is locked.
    _name: OwnedName,
    _file: OwnedFd,
}

impl NameLock {
    fn acquire(place: &SocketLocation<'_>) -> Result<NameLock> {
        let mut name = place.name.to_owned();
        name.push(".lock");
        let failed = |e: Errno| {
            Error::io("cannot lock the name of the socket", e.into()).at_path(place.path.with_file_name(&name))
        };
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&place.folder, &name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let why = "another daemon serves this socket, or is starting to";
                    return Err(Error::new(ErrorKind::Busy, why).at_path(place.path));
                }
                Err(Errno::INTR) => continue,
                Err(e) => return Err(failed(e)),
            }
            let own = OwnedName::of(&file, place, &name).map_err(failed)?;
            // The previous holder may have removed the file after it was opened by this process.
            if own.is_still_ours().map_err(failed)? {
                return Ok(NameLock { _name: own, _file: file });
            }
        }
    }
}

#[cfg(test)]
#[path = "bind_tests.rs"]
mod tests;
