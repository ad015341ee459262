//! The runtime folder: where live journals are, opened once and held, and what a session needs of the host besides.
//!
//! What lies there is believed, so the folder must belong to the user of this process and be closed to everybody else, and
//! each journal must be a regular file of that user with one name and mode 0600. Everything is reached through the
//! descriptor of the folder: whoever renames the folder or puts another one in its place changes nothing.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat, fallocate, fchmod, flock, fstat,
    fstatfs, linkat, openat, unlinkat,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

use super::shm::{Shm, ShmMapping};
#[cfg(feature = "sim")]
use super::sim::SimRuntimeFolder;
use crate::error::{Error, ErrorKind, Result};

/// What `statfs` says of tmpfs and ramfs (linux/magic.h).
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58F6];

/// An open runtime folder. Cloning it shares the descriptor.
#[derive(Clone, Debug)]
pub enum RuntimeFolder {
    /// Of the host.
    Host(HostRuntimeFolder),
    /// Of the simulated host.
    #[cfg(feature = "sim")]
    Sim(SimRuntimeFolder),
}

macro_rules! each_kind {
    ($self:ident, $f:ident => $call:expr) => {
        match $self {
            RuntimeFolder::Host($f) => $call,
            #[cfg(feature = "sim")]
            RuntimeFolder::Sim($f) => $call,
        }
    };
}

impl RuntimeFolder {
    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        each_kind!(self, f => f.path())
    }

    /// Makes words of memory, all zero, that outlive the process but not the host. They appear under `name` already locked
    /// by this process; the lock ends with the process, or with the last clone of what is returned.
    ///
    /// # Errors
    /// `NoSpace`, `Io`; the name exists.
    pub fn create(&self, name: &str, words: usize) -> Result<Shm> {
        each_kind!(self, f => f.create(name, words))
    }

    /// Looks whether there is room for `bytes` of such memory, by taking it and giving it back.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn check_space(&self, bytes: u64) -> Result<()> {
        match self {
            RuntimeFolder::Host(f) => f.check_space(bytes),
            #[cfg(feature = "sim")]
            RuntimeFolder::Sim(_) => Ok(()),
        }
    }

    /// Opens and locks words of memory that a process made before.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if another process has them open; `Refused` if the file is not one that this user made here, or
    /// has another size; `Io`.
    pub fn open(&self, name: &str, words: usize) -> Result<Shm> {
        each_kind!(self, f => f.open(name, words))
    }

    /// Removes a name; one that is gone already is no failure.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, name: &str) -> Result<()> {
        each_kind!(self, f => f.remove(name))
    }

    /// The names of all that lies in it.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<String>> {
        each_kind!(self, f => f.list())
    }

    /// A clock of whole seconds; reading it takes no system call.
    #[inline]
    pub fn coarse_seconds(&self) -> u64 {
        each_kind!(self, f => f.coarse_seconds())
    }

    /// Random bits.
    pub fn random_id(&self) -> Uuid {
        each_kind!(self, f => f.random_id())
    }
}

/// A folder of the host.
#[derive(Clone, Debug)]
pub struct HostRuntimeFolder(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl HostRuntimeFolder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// `NotFound`; `Refused` if it is another user's, or other users may write to it; `Unsupported` if it is not in memory;
    /// `Io`.
    pub(super) fn open_folder(path: &Path) -> Result<HostRuntimeFolder> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR => refused("the runtime folder is no folder, or a symbolic link").at_path(path),
            e => Error::io("cannot open the runtime folder", e.into()).at_path(path),
        })?;
        let failed = |e: Errno| Error::io("cannot look at the runtime folder", e.into()).at_path(path);
        let found = fstat(&fd).map_err(failed)?;
        if found.st_uid != rustix::process::geteuid().as_raw() {
            let what = format!("the runtime folder belongs to user {}; choose one with --runtime-dir", found.st_uid);
            return Err(refused(&what).at_path(path));
        }
        if found.st_mode & 0o022 != 0 {
            let what = format!("the runtime folder is open to other users: its mode is {:o}", found.st_mode & 0o777);
            return Err(refused(&format!("{what}, and must be 700")).at_path(path));
        }
        if !MEMORY_FILE_SYSTEMS.contains(&fstatfs(&fd).map_err(failed)?.f_type) {
            return Err(Error::new(ErrorKind::Unsupported, "not on a file system in memory (tmpfs)").at_path(path));
        }
        // Others could read it, but not have put anything there.
        if found.st_mode & 0o077 != 0 {
            fchmod(&fd, Mode::RWXU)
                .map_err(|e| Error::io("cannot close the runtime folder to other users", e.into()).at_path(path))?;
        }
        Ok(HostRuntimeFolder(Arc::new(Folder { fd, path: path.to_path_buf() })))
    }

    fn path(&self) -> &Path {
        &self.0.path
    }

    fn create(&self, name: &str, words: usize) -> Result<Shm> {
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(self.0.path.join(name));
        // Without a name until it is whole and locked: nobody else can lock it first, and a kill leaves nothing.
        let file = self.unnamed((words * size_of::<u64>()) as u64)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| failed("cannot lock", e))?;
        let ours = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, ours, &self.0.fd, name, AtFlags::SYMLINK_FOLLOW).map_err(|e| failed("cannot name", e))?;
        ShmMapping::new(file, words).map(Shm::host).map_err(|e| e.at_path(self.0.path.join(name)))
    }

    fn check_space(&self, bytes: u64) -> Result<()> {
        self.unnamed(bytes).map(drop)
    }

    /// A file without a name, whose room is reserved: a full tmpfs is an error here and not a signal later.
    fn unnamed(&self, bytes: u64) -> Result<OwnedFd> {
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(&self.0.path);
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = openat(&self.0.fd, ".", flags, mode).map_err(|e| failed("cannot make a live journal", e))?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(|e| failed("cannot reserve room for a live journal", e))?;
        Ok(file)
    }

    fn open(&self, name: &str, words: usize) -> Result<Shm> {
        let path = || self.0.path.join(name);
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(path());
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.0.fd, name, flags, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NXIO | Errno::ISDIR => refused("not a regular file").at_path(path()),
            e => failed("cannot open", e),
        })?;
        let look = || fstat(&file).map_err(|e| failed("cannot look at", e));
        why_not_ours(&look()?, words).map_or(Ok(()), |why| Err(refused(&why).at_path(path())))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            Errno::WOULDBLOCK => Error::new(ErrorKind::Busy, "another process has it open").at_path(path()),
            e => failed("cannot lock", e),
        })?;
        // Its owner may have removed it before it let go of the lock.
        if look()?.st_nlink == 0 {
            return Err(failed("cannot open", Errno::NOENT));
        }
        ShmMapping::new(file, words).map(Shm::host).map_err(|e| e.at_path(path()))
    }

    fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&self.0.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io("cannot remove", e.into()).at_path(self.0.path.join(name))),
        }
    }

    fn list(&self) -> Result<Vec<String>> {
        let failed = |e: Errno| Error::io("cannot list the folder", e.into()).at_path(&self.0.path);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(self.0.fd.as_fd()).map_err(failed)? {
            names.extend(entry.map_err(failed)?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    #[inline]
    fn coarse_seconds(&self) -> u64 {
        u64::try_from(clock_gettime(ClockId::MonotonicCoarse).tv_sec).unwrap_or(0)
    }

    fn random_id(&self) -> Uuid {
        Uuid::new_v4()
    }
}

/// Why a file in the folder is not one that `create` made there; `None` if it may be one.
fn why_not_ours(found: &Stat, words: usize) -> Option<String> {
    let bytes = words * size_of::<u64>();
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Some("not a regular file".to_owned());
    }
    if found.st_uid != rustix::process::geteuid().as_raw() {
        return Some(format!("it belongs to user {}", found.st_uid));
    }
    if found.st_mode & 0o7777 != 0o600 {
        return Some(format!("its mode is {:o}, and must be 600", found.st_mode & 0o7777));
    }
    if found.st_nlink > 1 {
        return Some(format!("it has {} names", found.st_nlink));
    }
    (usize::try_from(found.st_size) != Ok(bytes))
        .then(|| format!("it has {} bytes, and must have {bytes}", found.st_size))
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Refused, why)
}

#[cfg(test)]
#[path = "runtime_tests.rs"]
mod tests;
