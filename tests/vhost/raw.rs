//! A front-end that sends any message, valid or not.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
/// VERSION_1 and PROTOCOL_FEATURES.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 30;

pub(crate) struct FrontEnd(UnixStream);

impl FrontEnd {
    pub(crate) fn new(socket: UnixStream) -> FrontEnd {
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        FrontEnd(socket)
    }

    /// Negotiates the features over a connected socket.
    pub(crate) fn negotiated(socket: UnixStream) -> FrontEnd {
        FrontEnd::negotiated_with(socket, PROTOCOL_FEATURES)
    }

    /// Negotiates the features over a connected socket, and only `protocol_features` of the protocol.
    pub(crate) fn negotiated_with(socket: UnixStream, protocol_features: u64) -> FrontEnd {
        let mut front_end = FrontEnd::new(socket);
        front_end.send_message(SET_OWNER, &[], &[]);
        assert_eq!(front_end.get(GET_FEATURES) & FEATURES, FEATURES);
        assert_eq!(front_end.get(GET_PROTOCOL_FEATURES), PROTOCOL_FEATURES);
        front_end.send_message(SET_PROTOCOL_FEATURES, protocol_features.as_bytes(), &[]);
        assert!(front_end.set(SET_FEATURES, FEATURES.as_bytes(), &[]));
        front_end
    }

    /// Sends a message with any flags.
    pub(crate) fn send(&mut self, request: u32, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        let size = u32::try_from(body.len()).unwrap();
        let message = [[request, flags, size].as_bytes(), body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, message.len());
    }

    /// Sends a message and asks for no acknowledgement.
    pub(crate) fn send_message(&mut self, request: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        self.send(request, 1, body, files);
    }

    /// Sends a message with REPLY_ACK. Returns whether the daemon acknowledged success.
    pub(crate) fn set(&mut self, request: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.send(request, 9, body, files);
        u64::read_from_bytes(&self.read_reply(request)).unwrap() == 0
    }

    /// Sends a request without a body. Returns the number in the reply.
    pub(crate) fn get(&mut self, request: u32) -> u64 {
        self.send_message(request, &[], &[]);
        u64::read_from_bytes(&self.read_reply(request)).unwrap()
    }

    pub(crate) fn read_reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0u32; 3];
        self.0.read_exact(header.as_mut_bytes()).unwrap();
        let [answered, flags, size] = header;
        assert_eq!((answered, flags), (request, 5));
        let mut body = vec![0; size as usize];
        self.0.read_exact(&mut body).unwrap();
        body
    }

    /// Sends GET_CONFIG. Returns the bytes of the configuration space.
    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let body = [[offset, len, 0].as_bytes(), &vec![0; len as usize]].concat();
        self.send_message(GET_CONFIG, &body, &[]);
        let answer = self.read_reply(GET_CONFIG);
        assert_eq!(answer[..12], *[offset, len, 0].as_bytes());
        answer[12..].to_vec()
    }

    /// Sends GET_INFLIGHT_FD. Returns the body for SET_INFLIGHT_FD, and the file.
    pub(crate) fn inflight(&mut self, queues: u16, size: u16) -> (Vec<u8>, File) {
        self.send_message(GET_INFLIGHT_FD, &[[0u64, 0].as_bytes(), [queues, size, 0, 0].as_bytes()].concat(), &[]);
        let mut message = [0; 12 + 24];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut message)];
        let got = recvmsg(&self.0, into, &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL).unwrap();
        assert_eq!(got.bytes, message.len());
        let mut files = control.drain().filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let file = files.next().and_then(|mut files| files.next()).expect("a region has a file");
        (message[12..].to_vec(), file.into())
    }

    /// Waits until the daemon closes the connection. Returns false after the read timeout.
    pub(crate) fn is_closed(&mut self) -> bool {
        // Replies still in the socket are read first.
        let mut rest = Vec::new();
        let ended = self.0.read_to_end(&mut rest);
        // If the daemon closes before it has read everything sent, the result is ECONNRESET.
        ended.map_or_else(|e| e.kind() == std::io::ErrorKind::ConnectionReset, |_| true)
    }

    /// Returns whether the daemon has closed the connection, without waiting.
    pub(crate) fn has_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.0, PollFlags::empty())];
        poll(&mut polled, Some(&Timespec::default())).unwrap() > 0
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        // Closing is not enough: a child process that another test starts at this moment may briefly hold a copy of the
        // socket.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}
