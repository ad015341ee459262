//! The server thread: accepts clients, serves them in turn, and passes them the events of the disks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::Timespec;
use rustix::event::epoll as epoll_api;
use rustix::event::epoll::{CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::client::{Client, Interest};
use super::context::ControlContext;
use super::event_hub::now;
use super::message;
use super::rpc_error::RpcError;
use super::slow_calls::SlowCalls;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Notifier;
use crate::vhost::{Listener, Peer};

/// Maximum number of clients that are connected at once.
pub const MAX_CLIENTS: usize = 100;
/// Number of file descriptors of the control socket besides those of its clients, with a reserve: the listening socket
/// and its duplicate, the lock of the name and the folder, epoll, three eventfds, and a client that is refused.
const SOCKET_FDS: u64 = 12;
/// Time for which no client is accepted after accept(2) has failed, for example for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time that the server thread has to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Origins of events of epoll. Clients have larger numbers.
const LISTENER: u64 = 0;
const STOP: u64 = 1;
const EVENTS: u64 = 2;
const SLOW_CALLS: u64 = 3;
const FIRST_CLIENT: u64 = 16;

/// Returns the maximum number of file descriptors that the control socket needs.
pub fn fds_of_control() -> u64 {
    MAX_CLIENTS as u64 + SOCKET_FDS
}

/// The control socket, and the thread that serves it.
pub struct ControlServer {
    listener: Listener,
    stop: Arc<Notifier>,
    /// The last message of the daemon. It is set before the thread is asked to end.
    farewell: Arc<OnceLock<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl ControlServer {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Io` if a thread cannot be started, or the process has no file descriptors left.
    pub fn start(listener: Listener, context: ControlContext) -> Result<ControlServer> {
        let cannot = |e| Error::io("cannot serve the control socket", e);
        // The duplicate serves the thread, so the name can be removed while the thread is stuck.
        let socket = UnixListener::from(listener.as_fd().try_clone_to_owned().map_err(cannot)?);
        socket.set_nonblocking(true).map_err(cannot)?;
        let (stop, farewell) = (Arc::new(Notifier::new()?), Arc::new(OnceLock::new()));
        let context = Arc::new(context);
        let slow = SlowCalls::start(context.clone())?;
        let epoll = epoll_api::create(CreateFlags::CLOEXEC).map_err(|e| cannot(e.into()))?;
        let mut state = ServerThread {
            epoll,
            socket,
            stop: stop.clone(),
            farewell: farewell.clone(),
            context,
            slow,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            accept_again: None,
            has_logged_refusal: false,
        };
        state.add_sources().map_err(|e| cannot(e.into()))?;
        let thread = thread::Builder::new().name("control".into()).spawn(move || state.run()).map_err(cannot)?;
        Ok(ControlServer { listener, stop, farewell, thread })
    }

    /// Removes the socket, sends the event `ended` with the outcome of the daemon to all clients, ends the thread, and
    /// closes the connections. Waits a limited time for the thread.
    pub fn stop(self, outcome: &Result<()>) {
        let reason = outcome.as_ref().err().map(Error::line);
        let params = json!({"time": now(), "kind": "ended", "clean": outcome.is_ok(), "reason": reason});
        let _ = self.farewell.set(message::notification(&params));
        // The name is removed first: a client whose connection ends finds no socket any more.
        drop(self.listener);
        self.stop.notify();
        let begun = Instant::now();
        while !self.thread.is_finished() {
            if begun.elapsed() > END_TIMEOUT {
                warn!("the thread of the control socket does not end");
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

struct ServerThread {
    epoll: OwnedFd,
    socket: UnixListener,
    stop: Arc<Notifier>,
    farewell: Arc<OnceLock<Vec<u8>>>,
    context: Arc<ControlContext>,
    slow: SlowCalls,
    clients: BTreeMap<u64, (Client, Interest)>,
    next_client: u64,
    /// The time from which on clients are accepted again.
    accept_again: Option<Instant>,
    /// Whether the log has reported that clients are refused, since a client was last removed.
    has_logged_refusal: bool,
}

impl ServerThread {
    fn add_sources(&mut self) -> rustix::io::Result<()> {
        let sources: [(BorrowedFd<'_>, u64); 4] = [
            (self.socket.as_fd(), LISTENER),
            (self.stop.as_fd(), STOP),
            (self.context.events.as_fd(), EVENTS),
            (self.slow.as_fd(), SLOW_CALLS),
        ];
        sources
            .iter()
            .try_for_each(|(fd, number)| epoll_api::add(&self.epoll, fd, EventData::new_u64(*number), EventFlags::IN))
    }

    fn run(&mut self) {
        // Clients to serve although epoll reports no event of their sockets.
        let mut ready: BTreeSet<u64> = BTreeSet::new();
        loop {
            let pause = self.accept_pause();
            let wait = if ready.is_empty() { pause } else { Some(Timespec::default()) };
            let mut buffer = [MaybeUninit::uninit(); 64];
            let found = match epoll_api::wait(&self.epoll, &mut buffer, wait.as_ref()) {
                Ok((events, _)) => events.iter().map(|event| (event.data.u64(), event.flags)).collect(),
                Err(Errno::INTR) => Vec::new(),
                Err(e) => {
                    warn!("the control socket is out of service: {e}");
                    return;
                }
            };
            let mut turn: BTreeMap<u64, EventFlags> = BTreeMap::new();
            for (number, flags) in found {
                match number {
                    STOP => return self.end(),
                    LISTENER => self.accept(),
                    EVENTS => ready.extend(self.pass_events()),
                    SLOW_CALLS => ready.extend(self.pass_outcomes()),
                    client => {
                        turn.insert(client, flags);
                    }
                }
            }
            for number in std::mem::take(&mut ready) {
                turn.entry(number).or_insert(EventFlags::empty());
            }
            for (number, flags) in turn {
                if self.serve(number, flags) {
                    ready.insert(number);
                }
            }
        }
    }

    /// Serves a client once. Returns whether it has more work that needs no event.
    fn serve(&mut self, number: u64, flags: EventFlags) -> bool {
        let Some((client, interest)) = self.clients.get_mut(&number) else { return false };
        // What a client sent before it disconnected is still handled, although the answers have no reader.
        let is_gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let readable = flags.contains(EventFlags::IN);
        let served = client.serve(readable, &self.context, &self.slow);
        let next = client.interest();
        if served.is_err() || next.over || (is_gone && !readable && !next.read && !next.ready) {
            self.remove(number);
            return false;
        }
        if next != *interest {
            *interest = next;
            if epoll_api::modify(&self.epoll, &*client, EventData::new_u64(number), flags_of(next)).is_err() {
                self.remove(number);
                return false;
            }
        }
        next.ready
    }

    fn accept(&mut self) {
        match self.socket.accept() {
            Ok((stream, _)) if self.clients.len() >= MAX_CLIENTS => self.refuse(&stream),
            Ok((stream, _)) => {
                if let Err(e) = self.add(stream) {
                    warn!("control socket: cannot serve a client: {e}");
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                warn!("control socket: cannot accept a client: {e}");
                self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                let _ = epoll_api::delete(&self.epoll, &self.socket);
            }
        }
    }

    fn add(&mut self, stream: UnixStream) -> io::Result<()> {
        let number = self.next_client;
        self.next_client += 1;
        let mut client = Client::new(number, stream)?;
        let interest = client.interest();
        epoll_api::add(&self.epoll, &client, EventData::new_u64(number), flags_of(interest))?;
        info!("control socket: client connected: {}", client.peer());
        self.clients.insert(number, (client, interest));
        Ok(())
    }

    /// Sends an error to a client that is one too many. The connection is closed.
    fn refuse(&mut self, mut stream: &UnixStream) {
        if !std::mem::replace(&mut self.has_logged_refusal, true) {
            warn!("control socket: {MAX_CLIENTS} clients are connected; others are refused, as {}", Peer::of(stream));
        }
        let why = Error::new(ErrorKind::Busy, format!("{MAX_CLIENTS} clients are connected"));
        let answer = message::answer(&Value::Null, Err(RpcError::from(why).with_hint("try again later")));
        // A new socket has space for the error, and a client that does not get it sees that the connection is closed.
        let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&message::line(&answer)));
    }

    fn remove(&mut self, number: u64) {
        // Closing the socket also removes it from epoll.
        self.clients.remove(&number);
        self.has_logged_refusal = false;
    }

    /// Returns the rest of a pause in which no clients are accepted, or `None` if there is no pause. Ends a pause whose
    /// time is over.
    fn accept_pause(&mut self) -> Option<Timespec> {
        let left = self.accept_again?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.accept_again = None;
            let _ = epoll_api::add(&self.epoll, &self.socket, EventData::new_u64(LISTENER), EventFlags::IN);
            return None;
        }
        Timespec::try_from(left).ok()
    }

    /// Passes new events to the clients that watch them. Returns the clients to serve.
    fn pass_events(&mut self) -> Vec<u64> {
        let taken = self.context.events.take();
        let last_lost = taken.events.front().map_or(0, |event| event.seq.saturating_sub(1));
        let mut served = Vec::new();
        for (number, (client, _)) in &mut self.clients {
            if taken.lost > 0 {
                client.count_lost(taken.lost, last_lost);
            }
            taken.events.iter().for_each(|event| client.push_event(event));
            served.push(*number);
        }
        served
    }

    /// Passes the outcomes of slow calls to their clients. Returns the clients to serve.
    fn pass_outcomes(&mut self) -> Vec<u64> {
        let mut served = Vec::new();
        for (origin, outcome) in self.slow.take() {
            if let Some((client, _)) = self.clients.get_mut(&origin.client) {
                client.slow_call_finished(&origin, outcome);
                served.push(origin.client);
            }
        }
        served
    }

    /// Sends what the sockets take without waiting, and closes all connections.
    fn end(&mut self) {
        self.pass_events();
        self.pass_outcomes();
        for (client, _) in self.clients.values_mut() {
            let farewell = self.farewell.get().cloned().unwrap_or_default();
            let _ = client.flush().and_then(|()| client.say_farewell(farewell));
        }
        self.clients.clear();
    }
}

/// Returns the events of epoll for which a client waits. The end of its connection is always reported.
fn flags_of(interest: Interest) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, interest.read);
    flags.set(EventFlags::OUT, interest.write);
    flags
}
