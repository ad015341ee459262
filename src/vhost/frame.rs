//! Peeks at the header of the next message, before the vhost crate reads the message from the socket.
//!
//! The vhost crate reads with blocking calls, and leaves the body unread if it rejects a header. With the header, the
//! control thread avoids four faults. It never waits for the rest of a message. It skips a message whose body the crate
//! would leave unread. It closes a connection on which the beginning of the next message cannot be found. It replies to
//! a refused request if the crate does not. Besides, it reads the message that the crate handles without the socket
//! that it needs ([`MessageFrame::is_backend_channel`]).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg, send};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Parts of `flags`: the protocol version, which must be 1; the message is a reply; the front-end requests a reply.
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// The header of a message as it is on the socket, in native byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MessageHeader {
    request: u32,
    flags: u32,
    size: u32,
}

const HEADER_LEN: usize = size_of::<MessageHeader>();

/// A message that is complete on the socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MessageFrame {
    header: MessageHeader,
    has_files: bool,
}

/// Result of peeking at the socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PeekedMessage {
    /// The front-end closed the connection.
    Closed,
    /// Only a part of the next message has arrived.
    Partial,
    /// The next message has arrived completely.
    Whole(MessageFrame),
    /// The bytes on the socket are no message, so the beginning of the next message cannot be found.
    Malformed,
}

/// Peeks at the next message and leaves the message on the socket. Requires that the socket is readable.
///
/// # Errors
/// Any error of recvmsg(2) or of the FIONREAD request.
pub(super) fn peek(socket: impl AsFd) -> io::Result<PeekedMessage> {
    let mut header = MessageHeader::new_zeroed();
    let (seen, files_seen) = match peek_bytes(&socket, header.as_mut_bytes()) {
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(PeekedMessage::Partial),
        seen => seen?,
    };
    match seen {
        0 => return Ok(PeekedMessage::Closed),
        HEADER_LEN => {}
        _ => return Ok(PeekedMessage::Partial),
    }
    let MessageHeader { flags, size, .. } = header;
    if flags & !(REPLY | NEED_REPLY) != 1 || flags & VERSION_MASK != 1 || size as usize > MAX_MSG_SIZE {
        return Ok(PeekedMessage::Malformed);
    }
    // FIONREAD counts all bytes on the socket. The length of a peek could be too small, since a peek ends at a buffer
    // with file descriptors.
    let whole = HEADER_LEN + size as usize;
    if rustix::io::ioctl_fionread(&socket)? < whole as u64 {
        return Ok(PeekedMessage::Partial);
    }
    // Linux also reports file descriptors that are attached to the buffer after the peeked bytes. A peek never
    // continues after the first buffer with descriptors. So if a longer peek returns bytes of the next message, the
    // descriptors belong to the next message.
    let has_files = files_seen && peek_bytes(&socket, &mut vec![0; whole + 1])?.0 <= whole;
    Ok(PeekedMessage::Whole(MessageFrame { header, has_files }))
}

/// Peeks at bytes and copies them to `into`. Returns the number of bytes, and whether file descriptors are attached.
fn peek_bytes(socket: impl AsFd, into: &mut [u8]) -> rustix::io::Result<(usize, bool)> {
    let mut no_files = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let seen = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut no_files, flags)?;
    Ok((seen.bytes, seen.flags.contains(ReturnFlags::CTRUNC)))
}

impl MessageFrame {
    /// Returns the request code of the message.
    pub(super) fn request(self) -> u32 {
        self.header.request
    }

    /// Returns whether the message passes the socket of the back-end channel, which the vhost crate does not expose.
    pub(super) fn is_backend_channel(self) -> bool {
        self.header.flags & REPLY == 0 && self.code() == Some(FrontendReq::SET_BACKEND_REQ_FD)
    }

    fn code(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.header.request).ok()
    }

    /// Returns whether the vhost crate reads the whole message: the request is known, the message is no reply, and file
    /// descriptors are attached only if the request may have them.
    pub(super) fn is_readable(self) -> bool {
        use FrontendReq as R;
        let may_have_files = [
            R::SET_MEM_TABLE,
            R::SET_VRING_CALL,
            R::SET_VRING_KICK,
            R::SET_VRING_ERR,
            R::SET_LOG_BASE,
            R::SET_LOG_FD,
            R::SET_BACKEND_REQ_FD,
            R::SET_INFLIGHT_FD,
            R::ADD_MEM_REG,
            R::REM_MEM_REG,
            R::SET_DEVICE_STATE_FD,
            R::GPU_SET_SOCKET,
        ];
        let Some(code) = self.code() else { return false };
        self.header.flags & REPLY == 0 && (!self.has_files || may_have_files.contains(&code))
    }

    /// Returns whether the request requires a reply for which the protocol defines no error. If such a request fails,
    /// the connection must be closed, unless the vhost crate replies with an error of its own.
    pub(super) fn has_no_error_reply(self) -> bool {
        use FrontendReq as R;
        let asks = [
            R::GET_FEATURES,
            R::GET_PROTOCOL_FEATURES,
            R::GET_VRING_BASE,
            R::GET_QUEUE_NUM,
            R::GET_CONFIG,
            R::GET_INFLIGHT_FD,
            R::GET_MAX_MEM_SLOTS,
            R::GET_SHARED_OBJECT,
            R::GET_SHMEM_CONFIG,
            R::SET_LOG_BASE,
            R::SET_DEVICE_STATE_FD,
            R::CHECK_DEVICE_STATE,
            R::POSTCOPY_ADVISE,
        ];
        self.code().is_some_and(|code| asks.contains(&code))
    }

    /// Returns whether the vhost crate replies to this request with an error if the handler fails.
    pub(super) fn has_error_reply_from_crate(self) -> bool {
        use FrontendReq as R;
        let worded = [R::GET_CONFIG, R::GET_SHARED_OBJECT, R::SET_DEVICE_STATE_FD, R::CHECK_DEVICE_STATE];
        self.code().is_some_and(|code| worded.contains(&code))
    }

    /// Returns whether the vhost crate acknowledges the request even if the crate's own checks fail.
    pub(super) fn is_always_acked_by_crate(self) -> bool {
        use FrontendReq as R;
        let always = [R::SET_MEM_TABLE, R::SET_CONFIG, R::SET_BACKEND_REQ_FD, R::GPU_SET_SOCKET];
        self.code().is_some_and(|code| always.contains(&code))
    }

    /// Returns whether the front-end requests an acknowledgement. The daemon sends one only if REPLY_ACK was
    /// negotiated.
    pub(super) fn needs_reply(self) -> bool {
        self.header.flags & NEED_REPLY != 0
    }

    /// Reads and discards the message. The kernel closes the file descriptors that are attached.
    ///
    /// # Errors
    /// * `UnexpectedEof` if the front-end closes the connection.
    /// * Any error of recv(2).
    pub(super) fn skip(self, socket: impl AsFd) -> io::Result<()> {
        discard(socket, HEADER_LEN + self.header.size as usize)
    }

    /// Reads the message, and returns the file descriptor that is attached to it, if there is one.
    ///
    /// # Errors
    /// As [`MessageFrame::skip`], and any error of recvmsg(2).
    pub(super) fn take_descriptor(self, socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut header = MessageHeader::new_zeroed();
        let into = &mut [IoSliceMut::new(header.as_mut_bytes())];
        let bytes = recvmsg(&socket, into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let descriptor = control.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        discard(socket, HEADER_LEN + self.header.size as usize - bytes)?;
        Ok(descriptor)
    }

    /// Sends a reply that reports failure.
    ///
    /// # Errors
    /// * `WriteZero` if the socket does not accept the whole reply.
    /// * Any error of send(2).
    pub(super) fn refuse(self, socket: impl AsFd) -> io::Result<()> {
        self.acknowledge(socket, 1)
    }

    /// Sends a reply with a result: 0 for success.
    ///
    /// # Errors
    /// * `WriteZero` if the socket does not accept the whole reply.
    /// * Any error of send(2).
    pub(super) fn acknowledge(self, socket: impl AsFd, result: u64) -> io::Result<()> {
        let header = MessageHeader { request: self.header.request, flags: 1 | REPLY, size: 8 };
        let message = [header.as_bytes(), result.as_bytes()].concat();
        match send(socket, &message, SendFlags::NOSIGNAL)? {
            n if n == message.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

/// Reads and discards `left` bytes.
fn discard(socket: impl AsFd, mut left: usize) -> io::Result<()> {
    let mut sink = [0; 512];
    while left > 0 {
        let room = left.min(sink.len());
        match recv(&socket, &mut sink[..room], RecvFlags::empty())? {
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (n, _) => left -= n,
        }
    }
    Ok(())
}

/// Returns whether a reply can be sent without blocking. A front-end that reads none of its replies fills the socket.
pub(super) fn can_send_reply(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::OUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
        MessageHeader { request, flags, size }.as_bytes().to_vec()
    }

    fn whole(socket: &UnixStream) -> MessageFrame {
        match peek(socket).unwrap() {
            PeekedMessage::Whole(frame) => frame,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_message_is_whole_when_its_last_byte_has_arrived() {
        let (mut far, near) = UnixStream::pair().unwrap();
        let message = [header(2, 1, 8), vec![0; 8]].concat();
        for byte in &message[..message.len() - 1] {
            far.write_all(&[*byte]).unwrap();
            assert_eq!(peek(&near).unwrap(), PeekedMessage::Partial);
        }
        far.write_all(&message[..1]).unwrap();
        let frame = whole(&near);
        assert!(frame.is_readable() && !frame.has_no_error_reply() && !frame.needs_reply());
        drop(far);
        frame.skip(&near).unwrap();
        assert_eq!(peek(&near).unwrap(), PeekedMessage::Closed);
    }

    #[test]
    fn malformed_headers_differ_from_messages_to_skip() {
        for (bad, why) in [
            (header(1, 0, 0), "version 0"),
            (header(1, 2, 0), "version 2"),
            (header(1, 0x11, 0), "a reserved flag"),
            (header(1, 1, 4097), "too long"),
        ] {
            let (mut far, near) = UnixStream::pair().unwrap();
            far.write_all(&bad).unwrap();
            assert_eq!(peek(&near).unwrap(), PeekedMessage::Malformed, "{why}");
        }
        for other in [header(0, 1, 0), header(999, 9, 0), header(1, 5, 0)] {
            let (mut far, near) = UnixStream::pair().unwrap();
            far.write_all(&other).unwrap();
            let frame = whole(&near);
            assert!(!frame.is_readable());
            frame.skip(&near).unwrap();
            far.write_all(&header(1, 1, 0)).unwrap();
            assert!(whole(&near).is_readable());
        }
    }

    #[test]
    fn attached_descriptors_are_detected() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
        let (far, near) = UnixStream::pair().unwrap();
        for (request, readable) in [(1, false), (12, true)] {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [far.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let head = header(request, 1, 8);
            sendmsg(&far, &[io::IoSlice::new(&head)], &mut control, SendFlags::empty()).unwrap();
            assert_eq!(peek(&near).unwrap(), PeekedMessage::Partial);
            (&far).write_all(&[0; 8]).unwrap();
            let frame = whole(&near);
            assert!(frame.has_files);
            assert_eq!(frame.is_readable(), readable);
            frame.skip(&near).unwrap();
        }
    }

    #[test]
    fn descriptors_of_the_next_message_are_not_attributed_to_this_one() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
        let (far, near) = UnixStream::pair().unwrap();
        for body in [0, 8] {
            (&far).write_all(&[header(2, 1, body), vec![0; body as usize]].concat()).unwrap();
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [far.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let next = header(12, 1, 0);
            sendmsg(&far, &[io::IoSlice::new(&next)], &mut control, SendFlags::empty()).unwrap();
            let frame = whole(&near);
            assert_eq!((frame.request(), frame.has_files), (2, false));
            frame.skip(&near).unwrap();
            let frame = whole(&near);
            assert_eq!((frame.request(), frame.has_files), (12, true));
            frame.skip(&near).unwrap();
        }
    }

    #[test]
    fn a_refusal_replies_to_the_same_request() {
        let (mut far, near) = UnixStream::pair().unwrap();
        far.write_all(&header(999, 9, 0)).unwrap();
        let frame = whole(&near);
        assert!(frame.needs_reply());
        frame.refuse(&near).unwrap();
        let mut answer = [0; 20];
        far.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], header(999, 5, 8));
        assert_eq!(answer[12..], *1u64.as_bytes());
    }

    #[test]
    fn a_front_end_that_reads_no_replies_fills_the_socket() {
        let (_far, near) = UnixStream::pair().unwrap();
        assert!(can_send_reply(&near));
        near.set_nonblocking(true).unwrap();
        while (&near).write(&[0; 4096]).is_ok() {}
        assert!(!can_send_reply(&near));
    }
}
