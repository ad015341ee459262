//! The sockets of the daemon: made, taken over, and gone when their owner goes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::error::{Error, ErrorKind, Result};

/// How front-ends reach a disk.
#[derive(Debug)]
pub enum Socket {
    /// They connect, one after the other.
    Listening(Listener),
    /// There is one, connected before we were started; when it leaves, we are done.
    Connected(UnixStream),
}

/// A listening socket. The name in the file system goes with it if we made it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The name we made, and its device and inode: nobody else's socket of that name is removed.
    made: Option<(PathBuf, u64, u64)>,
}

impl Socket {
    /// Makes a socket of mode 0600 at `path`. The name appears when the socket is ready to accept, and replaces one
    /// that nobody listens on any more.
    ///
    /// # Errors
    /// `Busy` where somebody listens at `path`; `Refused` where something else than a socket is there; `Io`.
    pub fn bind(path: &Path) -> Result<Socket> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(Error::new(ErrorKind::Refused, "there is a file of that name, and it is not a socket")
                    .at_path(path));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(Error::new(ErrorKind::Busy, "the socket is in use by another process").at_path(path));
            }
            _ => {}
        }
        bind_and_rename(path).map(Socket::Listening).map_err(|e| Error::io("cannot listen", e).at_path(path))
    }

    /// Takes over a socket somebody else made: a listening one, or one already connected to a front-end.
    ///
    /// # Errors
    /// `Refused` where it is not a Unix stream socket.
    pub fn adopt(fd: OwnedFd) -> Result<Socket> {
        let not_ours = |e: rustix::io::Errno| Error::io("the file descriptor handed over is not a socket", e.into());
        let domain = sockopt::socket_domain(&fd).map_err(not_ours)?;
        let kind = sockopt::socket_type(&fd).map_err(not_ours)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(Error::new(ErrorKind::Refused, "the socket handed over is not a Unix stream socket"));
        }
        rustix::io::ioctl_fionbio(&fd, false).map_err(not_ours)?;
        if sockopt::socket_acceptconn(&fd).map_err(not_ours)? {
            Ok(Socket::Listening(Listener { socket: fd.into(), made: None }))
        } else {
            Ok(Socket::Connected(fd.into()))
        }
    }

    /// The name of a listening socket, if it has one.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Socket::Listening(Listener { made: Some((path, ..)), .. }) => Some(path.clone()),
            Socket::Listening(l) => l.socket.local_addr().ok()?.as_pathname().map(Path::to_path_buf),
            Socket::Connected(_) => None,
        }
    }
}

/// Makes the socket under a name of our own and renames it, so that whoever sees `path` can connect.
fn bind_and_rename(path: &Path) -> io::Result<Listener> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the name inherits the mode of the unbound socket: there is no moment at which others may connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    // A `bind` through the folder's descriptor is not subject to the 107 bytes that a path may have.
    let place = rustix::fs::open(folder, rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC, Mode::empty())?;
    let temporary = format!(".diffdiskd-{}-{:?}", std::process::id(), std::thread::current().id());
    let temporary: String = temporary.chars().filter(|c| c.is_ascii_alphanumeric() || ".-".contains(*c)).collect();
    let by_descriptor = format!("/proc/self/fd/{}/{temporary}", std::os::fd::AsRawFd::as_raw_fd(&place));
    rustix::net::bind(&socket, &SocketAddrUnix::new(by_descriptor)?)?;
    let temporary = folder.join(temporary);
    let made = rustix::net::listen(&socket, 16).map_err(io::Error::from).and_then(|()| {
        let meta = fs::symlink_metadata(&temporary)?;
        fs::rename(&temporary, path)?;
        Ok((path.to_path_buf(), meta.dev(), meta.ino()))
    });
    if made.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    Ok(Listener { socket: socket.into(), made: Some(made?) })
}

impl Listener {
    /// The next front-end. Waits.
    ///
    /// # Errors
    /// As `accept(2)`.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, dev, ino)) = &self.made
            && fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (*dev, *ino))
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Who is at the other end, for the log.
pub(super) fn peer(stream: &UnixStream) -> String {
    match sockopt::socket_peercred(stream) {
        Ok(who) => format!("process {} of user {}", who.pid.as_raw_nonzero(), who.uid.as_raw()),
        Err(_) => "an unknown process".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary name is gone");
        UnixStream::connect(&path).unwrap();
        assert_eq!(Socket::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_socket_nobody_listens_on_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let stale = fs::metadata(&path).unwrap().ino();
        let socket = Socket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_ne!(fs::metadata(&path).unwrap().ino(), stale);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(socket);
        assert_eq!(fs::read(&path).unwrap(), b"precious", "not ours any more");
        assert_eq!(Socket::bind(&path).unwrap_err().kind(), ErrorKind::Refused);
    }

    #[test]
    fn long_paths_and_missing_folders() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        assert_eq!(Socket::bind(&deep.join("s")).unwrap_err().kind(), ErrorKind::NotFound);
        fs::create_dir(&deep).unwrap();
        let socket = Socket::bind(&deep.join("s")).unwrap();
        assert_eq!(socket.path(), Some(deep.join("s")));
    }

    #[test]
    fn sockets_handed_over_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = Socket::adopt(UnixListener::bind(&path).unwrap().into()).unwrap();
        assert!(matches!(listening, Socket::Listening(_)));
        assert_eq!(listening.path(), Some(path.clone()));
        drop(listening);
        assert!(path.exists(), "not ours to remove");
        let (near, _far) = UnixStream::pair().unwrap();
        assert!(matches!(Socket::adopt(near.into()).unwrap(), Socket::Connected(_)));
        assert!(Socket::adopt(fs::File::open("/dev/null").unwrap().into()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(Socket::adopt(tcp.into()).unwrap_err().kind(), ErrorKind::Refused);
    }
}
