//! The socket of a served disk: a listening socket, created by this process or handed over, or a connection that was
//! handed over.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::bind::{BoundName, SocketAccess, bind};
use crate::error::{Error, ErrorKind, Result};

/// The socket on which a disk is served.
#[derive(Debug)]
pub enum Socket {
    /// A listening socket, which serves one front-end after another.
    Listening(Listener),
    /// A connection that was handed over. The disk is served until its front-end disconnects.
    Connected(UnixStream),
}

/// A listening socket. Dropping it removes its name from the file system if this process created the name.
#[derive(Debug)]
pub struct Listener {
    // Declared first, so that the name is removed before the socket stops listening.
    bound_name: Option<BoundName>,
    socket: UnixListener,
}

impl Socket {
    /// Creates a listening socket at `path` that admits the users given by `access`. Replaces the socket of a process
    /// that has ended.
    ///
    /// # Errors
    /// * `Busy` if another process listens at `path`, or is about to listen.
    /// * `Refused` if `path` exists and is not a socket, is a socket in use that is not a stream socket, or does not
    ///   end in a file name.
    /// * `NotFound` if the folder does not exist.
    /// * `Io` if a system call fails, for example because the process may not set the group.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Socket> {
        Listener::bind(path, access).map(Socket::Listening)
    }

    /// Takes over a socket that the starting process has opened: a listening socket, or a connection to a front-end.
    ///
    /// # Errors
    /// * `Refused` if the socket is not a Unix stream socket.
    /// * `Io` if the descriptor is not a socket.
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

    /// Returns the path of a listening socket, if it has one.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Socket::Listening(Listener { bound_name: Some(name), .. }) => Some(name.path().to_path_buf()),
            Socket::Listening(l) => l.socket.local_addr().ok()?.as_pathname().map(Path::to_path_buf),
            Socket::Connected(_) => None,
        }
    }
}

impl Listener {
    /// Creates a listening socket at `path` that admits the users given by `access`. Replaces the socket of a process
    /// that has ended.
    ///
    /// # Errors
    /// Those of [`Socket::bind`].
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Listener> {
        let (socket, bound_name) = bind(path, access)?;
        Ok(Listener { bound_name: Some(bound_name), socket })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// Any error of accept(2).
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The process at the other end of a connection, as the kernel recorded it when the process connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer(Option<(i32, u32)>);

impl Peer {
    /// Returns the process at the other end.
    pub fn of(stream: &UnixStream) -> Peer {
        let found = sockopt::socket_peercred(stream).ok();
        Peer(found.map(|peer| (peer.pid.as_raw_nonzero().get(), peer.uid.as_raw())))
    }

    /// Process id, if the kernel reports it.
    pub fn pid(self) -> Option<i32> {
        self.0.map(|(pid, _)| pid)
    }

    /// User, if the kernel reports it.
    pub fn uid(self) -> Option<u32> {
        self.0.map(|(_, uid)| uid)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((pid, uid)) => write!(f, "process {pid} of user {uid}"),
            None => f.write_str("an unknown process"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_socket_handed_over_is_listening_or_connected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = Socket::from_fd(UnixListener::bind(&path).unwrap().into()).unwrap();
        assert!(matches!(listening, Socket::Listening(_)));
        assert_eq!(listening.path(), Some(path.clone()));
        drop(listening);
        assert!(path.exists(), "the starting process owns the name");
        let (near, _far) = UnixStream::pair().unwrap();
        assert!(matches!(Socket::from_fd(near.into()).unwrap(), Socket::Connected(_)));
        assert!(Socket::from_fd(fs::File::open("/dev/null").unwrap().into()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(Socket::from_fd(tcp.into()).unwrap_err().kind(), ErrorKind::Refused);
    }
}
