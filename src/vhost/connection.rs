//! One connection of a front-end. Handles its messages, replies to refused messages, and warns if guest memory is
//! missing.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::warn;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::backend_channel::BackendChannel;
use super::frame::MessageFrame;
use super::handler::Handler;
use super::memory_sharing::SHARE_HINT;
use super::server_status::ServerStatus;
use crate::error::{Error, Result};

/// Time for which a ring may lack nothing but guest memory before a warning is logged.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(3);
/// Number of the refused message of a connection from which on refusals are not logged, so that a front-end cannot fill
/// the log.
const MAX_LOGGED_REFUSALS: u32 = 32;

/// Reason for which a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ConnectionEnd {
    /// The front-end disconnected, or the daemon closed the connection.
    Disconnected,
    /// The daemon received the stop signal.
    Shutdown,
}

/// One connection of a front-end.
pub(super) struct Connection<'a> {
    name: &'a str,
    status: &'a ServerStatus,
    requests: BackendReqHandler<Mutex<Handler<'a>>>,
    pub(super) handler: Arc<Mutex<Handler<'a>>>,
    refusals: u32,
    /// Request code of the last message.
    pub(super) last_request: Option<u32>,
    /// Time since which at least one ring lacks nothing but guest memory.
    no_memory_since: Option<Instant>,
    /// Whether the warning about missing guest memory was logged.
    has_warned_no_memory: bool,
}

impl<'a> Connection<'a> {
    /// Creates a connection on a stream from which nothing has been read.
    pub(super) fn new(
        name: &'a str,
        status: &'a ServerStatus,
        stream: UnixStream,
        handler: Handler<'a>,
    ) -> Connection<'a> {
        let handler = Arc::new(Mutex::new(handler));
        let requests = BackendReqHandler::from_stream(stream, handler.clone());
        Connection {
            name,
            status,
            requests,
            handler,
            refusals: 0,
            last_request: None,
            no_memory_since: None,
            has_warned_no_memory: false,
        }
    }

    /// Returns whether an access to shared memory failed: the file was truncated, or the host is out of memory. Then
    /// the daemon reads zeros from the lost pages.
    pub(super) fn is_memory_lost(&self) -> bool {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).is_memory_lost()
    }

    /// Returns whether the connection must be closed because requests in flight do not complete.
    pub(super) fn is_stuck(&self) -> bool {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).is_stuck()
    }

    /// Logs a warning if a ring has lacked nothing but guest memory for [`MEMORY_TIMEOUT`]. Returns whether the caller
    /// must call this function again soon.
    pub(super) fn check_memory(&mut self) -> bool {
        if self.has_warned_no_memory || !self.handler.lock().unwrap_or_else(PoisonError::into_inner).waits_for_memory()
        {
            self.no_memory_since = None;
            return false;
        }
        if self.no_memory_since.get_or_insert_with(Instant::now).elapsed() < MEMORY_TIMEOUT {
            return true;
        }
        warn!(
            "disk {}: the front-end has set up its queues, but shares none of the guest's memory. {SHARE_HINT}",
            self.name
        );
        self.has_warned_no_memory = true;
        false
    }

    /// Handles the next message. Returns the reason if the connection has ended. A refused message does not end the
    /// connection, unless its request requires a reply for which the protocol defines no error.
    ///
    /// # Errors
    /// `Io` if the connection fails, or must be closed because a refusal cannot be reported.
    pub(super) fn handle(&mut self, frame: MessageFrame, socket: &UnixStream) -> Result<Option<ConnectionEnd>> {
        self.last_request = Some(frame.request());
        let broken = |e| Error::io("I/O on the connection failed", e);
        let state = |session: &Self| {
            let handler = session.handler.lock().unwrap_or_else(PoisonError::into_inner);
            (handler.handled_requests(), handler.has(VhostUserProtocolFeatures::REPLY_ACK))
        };
        if frame.is_backend_channel() {
            let channel = self.take_backend_channel(frame, socket).map_err(broken)?;
            let accepted = channel.map(|channel| self.status.set_backend_channel(channel));
            if let Err(why) = &accepted {
                self.log_refusal(frame, why);
            }
            if frame.needs_reply() && state(self).1 {
                frame.acknowledge(socket, u64::from(accepted.is_err())).map_err(broken)?;
            }
            return Ok(None);
        }
        let (calls, _) = state(self);
        let (why, acknowledged) = if frame.is_readable() {
            match self.requests.handle_request() {
                Ok(()) => return Ok(None),
                Err(VhostError::Disconnected) => return Ok(Some(ConnectionEnd::Disconnected)),
                Err(e @ (VhostError::SocketBroken(_) | VhostError::SocketError(_) | VhostError::PartialMessage)) => {
                    return Err(Error::io("I/O on the connection failed", std::io::Error::other(e)));
                }
                Err(e) => (e.to_string(), state(self).0 != calls || frame.is_always_acked_by_crate()),
            }
        } else {
            frame.skip(socket).map_err(broken)?;
            ("unknown request, or file descriptors that the request must not have".into(), false)
        };
        self.log_refusal(frame, &why);
        if frame.has_no_error_reply() && !(acknowledged && frame.has_error_reply_from_crate()) {
            return Err(Error::io(
                "the request is refused, and the protocol has no error reply for it",
                protocol_error(),
            ));
        }
        if !acknowledged && frame.needs_reply() && state(self).1 {
            frame.refuse(socket).map_err(broken)?;
        }
        Ok(None)
    }

    /// Reads SET_BACKEND_REQ_FD. Returns the channel, `None` if the front-end does not accept messages about the
    /// configuration, or why the request is refused.
    fn take_backend_channel(
        &self,
        frame: MessageFrame,
        socket: &UnixStream,
    ) -> io::Result<Result<Option<BackendChannel>, String>> {
        let passed = frame.take_descriptor(socket)?;
        let handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner);
        let is_told = handler.has(VhostUserProtocolFeatures::CONFIG);
        Ok(match passed {
            _ if !handler.has(VhostUserProtocolFeatures::BACKEND_REQ) => Err("BACKEND_REQ was not negotiated".into()),
            None => Err("it has no socket".into()),
            Some(passed) => match BackendChannel::new(passed) {
                Ok(channel) => Ok(is_told.then_some(channel)),
                Err(e) => Err(format!("socket of the back-end channel: {e}")),
            },
        })
    }

    /// Logs a refused message, unless too many were logged.
    fn log_refusal(&mut self, frame: MessageFrame, why: &str) {
        self.refusals += 1;
        match self.refusals {
            ..MAX_LOGGED_REFUSALS => warn!("disk {}: request {} is refused: {why}", self.name, frame.request()),
            MAX_LOGGED_REFUSALS => {
                warn!("disk {}: further refused requests of this front-end are not logged", self.name)
            }
            _ => {}
        }
    }
}

/// Returns the error for a front-end that breaks the protocol.
pub(super) fn protocol_error() -> std::io::Error {
    std::io::ErrorKind::InvalidData.into()
}
