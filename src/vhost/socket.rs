//! The sockets of the daemon: made, taken over, and gone when their owner goes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::bind::{BoundName, SocketAccess, bind};
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
    // Dropped first: nobody finds a name on which nobody listens.
    bound_name: Option<BoundName>,
    socket: UnixListener,
}

impl Socket {
    /// Makes a listening socket at `path` for those whom `access` admits. It replaces the socket of a process that has
    /// ended.
    ///
    /// # Errors
    /// * `Busy`: another process listens at `path`, or is about to.
    /// * `Refused`: a file that is not a socket, or a socket of another type that is in use, has the name.
    /// * `NotFound`: the folder does not exist.
    /// * `Io`: the host refuses a step, for example the group.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Socket> {
        let (socket, bound_name) = bind(path, access)?;
        Ok(Socket::Listening(Listener { bound_name: Some(bound_name), socket }))
    }

    /// Takes over a socket somebody else made: a listening one, or one already connected to a front-end.
    ///
    /// # Errors
    /// `Refused` where it is not a Unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Socket> {
        let not_ours = |e: rustix::io::Errno| Error::io("the file descriptor handed over is not a socket", e.into());
        let domain = sockopt::socket_domain(&fd).map_err(not_ours)?;
        let kind = sockopt::socket_type(&fd).map_err(not_ours)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(Error::new(ErrorKind::Refused, "the socket handed over is not a Unix stream socket"));
        }
        rustix::io::ioctl_fionbio(&fd, false).map_err(not_ours)?;
        if sockopt::socket_acceptconn(&fd).map_err(not_ours)? {
            Ok(Socket::Listening(Listener { socket: fd.into(), bound_name: None }))
        } else {
            Ok(Socket::Connected(fd.into()))
        }
    }

    /// The name of a listening socket, if it has one.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Socket::Listening(Listener { bound_name: Some(name), .. }) => Some(name.path().to_path_buf()),
            Socket::Listening(l) => l.socket.local_addr().ok()?.as_pathname().map(Path::to_path_buf),
            Socket::Connected(_) => None,
        }
    }
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

/// Who is at the other end, for the log.
pub(super) fn describe_peer(stream: &UnixStream) -> String {
    match sockopt::socket_peercred(stream) {
        Ok(who) => format!("process {} of user {}", who.pid.as_raw_nonzero(), who.uid.as_raw()),
        Err(_) => "an unknown process".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn sockets_handed_over_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = Socket::from_fd(UnixListener::bind(&path).unwrap().into()).unwrap();
        assert!(matches!(listening, Socket::Listening(_)));
        assert_eq!(listening.path(), Some(path.clone()));
        drop(listening);
        assert!(path.exists(), "not ours to remove");
        let (near, _far) = UnixStream::pair().unwrap();
        assert!(matches!(Socket::from_fd(near.into()).unwrap(), Socket::Connected(_)));
        assert!(Socket::from_fd(fs::File::open("/dev/null").unwrap().into()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(Socket::from_fd(tcp.into()).unwrap_err().kind(), ErrorKind::Refused);
    }
}
