//! The back-end channel: a socket of the front-end on which the daemon sends requests to the front-end.
//!
//! The daemon sends one kind of request: the configuration space has changed, for example because the disk has grown.
//! The daemon never requests a reply, since QEMU replies only after it has read the configuration space over the
//! connection.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, SocketType, send};
use zerocopy::IntoBytes;

/// The message VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request code, flags (version 1, no reply requested), and size.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The back-end channel of a connection.
#[derive(Debug)]
pub(super) struct BackendChannel(OwnedFd);

impl BackendChannel {
    /// Checks a descriptor that the front-end passed. No system call on it can block.
    ///
    /// # Errors
    /// * `InvalidInput` if the descriptor is not a Unix stream socket.
    /// * Any error of getsockopt(2).
    pub(super) fn new(socket: OwnedFd) -> io::Result<BackendChannel> {
        let (domain, kind) = (socket_domain(&socket)?, socket_type(&socket)?);
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a Unix stream socket"));
        }
        Ok(BackendChannel(socket))
    }

    /// Sends the message that the configuration space has changed, without waiting. Returns whether the socket has
    /// accepted the whole message. It does not if its buffer is full or the front-end has closed it.
    pub(super) fn send_config_change(&self) -> bool {
        let message = CONFIG_CHANGE.as_bytes();
        send(&self.0, message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Ok(message.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_full_or_closed_socket_is_not_waited_for() {
        let (mut far, near) = UnixStream::pair().unwrap();
        let channel = BackendChannel::new(near.into()).unwrap();
        assert!(channel.send_config_change());
        let mut message = [0; 12];
        far.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let sent = (0..1 << 20).take_while(|_| channel.send_config_change()).count();
        assert!(sent > 0 && !channel.send_config_change(), "{sent}");
        drop(far);
        assert!(!channel.send_config_change());
    }

    #[test]
    fn only_unix_stream_sockets_are_accepted() {
        assert!(BackendChannel::new(std::fs::File::open("/dev/null").unwrap().into()).is_err());
        assert!(BackendChannel::new(UdpSocket::bind("127.0.0.1:0").unwrap().into()).is_err());
    }
}
