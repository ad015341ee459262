//! One client of the control socket: its unfinished messages, its requests, and its subscription.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::info;
use serde_json::Value;

use super::context::ControlContext;
use super::event_hub::ControlEvent;
use super::line_buffer::{Line, LineBuffer};
use super::message::{self, Message, Rejected, RpcCall};
use super::methods::{self, Outcome, Run};
use super::outbox::Outbox;
use super::rpc_error::{METHOD_NOT_FOUND, RpcError};
use super::slow_calls::{CallOrigin, SlowCalls, run_guarded};
use super::watch::Subscription;
use crate::error::{Error, ErrorKind};
use crate::vhost::Peer;

/// Number of bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Number of messages that are handled before it is the turn of other clients.
const MESSAGES_PER_TURN: usize = 16;
/// Maximum number of messages whose slow calls have not finished. Further messages wait.
const MAX_OPEN_MESSAGES: usize = 16;
/// Number of bytes of answers in a batch from which on the other requests of the batch are refused.
const MAX_BATCH_BYTES: usize = 4 << 20;

/// A connected client.
pub(super) struct Client {
    number: u64,
    stream: UnixStream,
    peer: Peer,
    input: LineBuffer,
    outbox: Outbox,
    subscription: Subscription,
    /// Messages of which not all requests have an answer, by their numbers.
    open_messages: BTreeMap<u64, OpenMessage>,
    next_message: u64,
    /// Whether the client has ended its side of the connection. Its requests are still answered.
    has_ended: bool,
}

/// A message whose requests are being answered.
struct OpenMessage {
    is_batch: bool,
    /// The encoded answers, since a tree of values takes many times the memory of its text.
    answers: Vec<String>,
    /// Number of bytes of the answers.
    bytes: usize,
    /// Number of requests without an outcome.
    pending: usize,
}

/// What a client needs next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Interest {
    /// Whether to wait until the socket can be read.
    pub(super) read: bool,
    /// Whether to wait until the socket can be written.
    pub(super) write: bool,
    /// Whether the client has work that needs no event.
    pub(super) ready: bool,
    /// Whether the connection is over.
    pub(super) over: bool,
}

impl Client {
    /// Creates a client. `number` is unique among all clients of the daemon.
    ///
    /// # Errors
    /// Any error of making the socket non-blocking.
    pub(super) fn new(number: u64, stream: UnixStream) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            number,
            peer: Peer::of(&stream),
            stream,
            input: LineBuffer::default(),
            outbox: Outbox::default(),
            subscription: Subscription::default(),
            open_messages: BTreeMap::new(),
            next_message: 0,
            has_ended: false,
        })
    }

    /// The process at the other end.
    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    /// Reads once if `readable`, handles a few messages, and sends answers.
    ///
    /// # Errors
    /// Any error of the connection, which is then over.
    pub(super) fn serve(&mut self, readable: bool, context: &ControlContext, slow: &SlowCalls) -> io::Result<()> {
        if readable && self.may_read() {
            self.read()?;
        }
        for _ in 0..MESSAGES_PER_TURN {
            if self.is_held() {
                break;
            }
            let Some(line) = self.input.next_line() else { break };
            let message = match line {
                Line::Whole(line) => Message::parse(&line),
                Line::TooLong => Message::too_long(),
            };
            self.handle(message, context, slow);
        }
        self.outbox.flush(&self.stream)
    }

    /// Passes an event to the client if the client watches its kind.
    pub(super) fn push_event(&mut self, event: &Arc<ControlEvent>) {
        if self.subscription.selects(event) {
            self.outbox.push_event(event.clone());
        }
    }

    /// Counts events that were dropped before they reached the client. The last one has the number `last`.
    pub(super) fn count_lost(&mut self, count: u64, last: u64) {
        if self.subscription.may_miss(last) {
            self.outbox.count_lost(count, last);
        }
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    /// Any error of the connection, which is then over.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.outbox.flush(&self.stream)
    }

    /// Sends the last message, after everything else, as far as the socket takes it.
    ///
    /// # Errors
    /// Any error of the connection.
    pub(super) fn say_farewell(&mut self, line: Vec<u8>) -> io::Result<()> {
        self.outbox.push_answer(line);
        self.outbox.flush(&self.stream)
    }

    /// Accepts the outcome of a slow call.
    pub(super) fn slow_call_finished(&mut self, origin: &CallOrigin, outcome: Outcome) {
        if let Some(open) = self.open_messages.get_mut(&origin.message) {
            open.pending -= 1;
            let outcome = if open.bytes >= MAX_BATCH_BYTES { Err(batch_too_long()) } else { outcome };
            open.add(origin.id.as_ref(), outcome);
            self.finish_message(origin.message);
        }
    }

    /// Returns what the client needs next.
    pub(super) fn interest(&mut self) -> Interest {
        let has_line = self.input.has_line();
        let is_idle = self.outbox.is_empty() && self.open_messages.is_empty() && !has_line;
        Interest {
            read: self.may_read(),
            write: !self.outbox.is_empty(),
            ready: has_line && !self.is_held(),
            over: self.has_ended && is_idle && !self.subscription.is_active(),
        }
    }

    fn may_read(&mut self) -> bool {
        !self.has_ended && !self.is_held() && !self.input.has_line()
    }

    /// Whether the client's messages wait: the client does not read its answers, or its requests take long.
    fn is_held(&self) -> bool {
        self.outbox.is_full() || self.open_messages.len() >= MAX_OPEN_MESSAGES
    }

    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.has_ended = true,
            Ok(count) => self.input.push(&bytes[..count]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    fn handle(&mut self, message: Message, context: &ControlContext, slow: &SlowCalls) {
        let (is_batch, calls) = match message {
            Message::Single(call) => (false, vec![call]),
            Message::Batch(calls) => (true, calls),
        };
        let number = self.next_message;
        self.next_message += 1;
        let mut open = OpenMessage { is_batch, answers: Vec::new(), bytes: 0, pending: 0 };
        for call in calls {
            match call {
                Ok(call) => self.call(call, number, &mut open, context, slow),
                Err(Rejected { id, error }) => open.add(Some(&id), Err(*error)),
            }
        }
        self.open_messages.insert(number, open);
        self.finish_message(number);
    }

    /// Carries out a request, or passes it to a thread for slow calls.
    fn call(
        &mut self,
        mut call: RpcCall,
        message: u64,
        open: &mut OpenMessage,
        context: &ControlContext,
        slow: &SlowCalls,
    ) {
        let outcome = 'outcome: {
            let Some(method) = methods::find(&call.method) else {
                let name = call.method.chars().take(64).collect::<String>();
                break 'outcome Err(RpcError::of_form(METHOD_NOT_FOUND, format!("there is no method {name:?}")));
            };
            if open.bytes >= MAX_BATCH_BYTES {
                break 'outcome Err(batch_too_long());
            }
            let params = match methods::params(&mut call) {
                Ok(params) => params,
                Err(error) => break 'outcome Err(error),
            };
            if method.is_logged {
                info!("control socket: {} requests {}", self.peer, method.name);
            }
            match method.run {
                Run::Here(run) => run_guarded(|| run(context, params)),
                Run::Subscribe(run) => {
                    let outcome = run_guarded(|| run(context, params, &mut self.subscription));
                    if outcome.is_ok() {
                        self.outbox.clear_events();
                    }
                    outcome
                }
                Run::Apart(run) | Run::Change(run) => {
                    let origin = CallOrigin { client: self.number, message, id: call.id.clone() };
                    let started = match method.run {
                        Run::Change(_) => slow.start_change(origin, run, params),
                        _ => slow.submit(origin, run, params),
                    };
                    match started {
                        Ok(()) => {
                            open.pending += 1;
                            return;
                        }
                        Err(error) => Err(error),
                    }
                }
            }
        };
        open.add(call.id.as_ref(), outcome);
    }

    /// Sends the answers to a message if all its requests have an outcome.
    fn finish_message(&mut self, number: u64) {
        if self.open_messages.get(&number).is_none_or(|open| open.pending > 0) {
            return;
        }
        let Some(open) = self.open_messages.remove(&number) else { return };
        // A notification, and a batch of notifications, have no answer.
        if open.answers.is_empty() {
            return;
        }
        let answers = open.answers.join(",");
        let line = if open.is_batch { format!("[{answers}]\n") } else { format!("{answers}\n") };
        self.outbox.push_answer(line.into_bytes());
    }
}

impl OpenMessage {
    /// Adds the outcome of a request, unless the request is a notification (has no id).
    fn add(&mut self, id: Option<&Value>, outcome: Outcome) {
        let Some(id) = id else { return };
        let answer = message::answer(id, outcome).to_string();
        self.bytes += answer.len();
        self.answers.push(answer);
    }
}

fn batch_too_long() -> RpcError {
    RpcError::from(Error::new(ErrorKind::Refused, "the answers to this batch are too long"))
        .with_hint("send fewer requests in a batch")
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
