//! The life of a served disk: its threads, its front-ends one after the other, and its end.
//!
//! The control thread waits in one `poll` for the stop signal, the listening socket and the front-end. A message is
//! read when it is there as a whole, and answered only when there is room for the answer, so no front-end can keep
//! the thread from accepting, refusing or ending.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::event::{EventConsumer, EventFlag, new_event_consumer_and_notifier};

use super::frame::{self, Frame, Next};
use super::handler::Handler;
use super::socket::{Listener, Socket, peer};
use super::worker::{Settings, Worker};
use super::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::device::Device;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::EngineKind;

/// A front-end that sends the first half of a message has this long for the second.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a half message is looked at again.
const GLANCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// Refused messages of one connection that are logged; a front-end cannot fill the log.
const LOGGED_REFUSALS: u32 = 32;

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct Service {
    /// A name for the log.
    pub name: String,
    /// Queues offered, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries that a queue may have, a power of two up to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What carries out I/O.
    pub engine: EngineKind,
    /// How long a queue's thread looks for more work before it sleeps.
    pub poll: Duration,
    /// Whether the guest is told of a write cache that it has to flush.
    pub write_back: bool,
}

/// A disk, the threads of its queues, and the socket on which front-ends find it.
pub struct Daemon {
    name: String,
    device: Arc<Device>,
    workers: Vec<Worker>,
    socket: Socket,
    /// Readable when a page of the guest's memory could not be had.
    alarm: EventConsumer,
}

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It goes on.
    Stay,
    /// The front-end left, or was left.
    Gone,
    /// The daemon is to stop.
    Stop,
}

impl Daemon {
    /// Starts the threads of the disk's queues. From now on front-ends may connect; they are served by `run`.
    ///
    /// # Errors
    /// Where the host has no room for the threads or their lanes.
    ///
    /// # Panics
    /// Where the numbers in `service` are out of their ranges.
    pub fn new(disk: Arc<Disk>, service: &Service, socket: Socket) -> Result<Daemon> {
        assert!((1..=MAX_QUEUES).contains(&service.queues), "a disk has 1 to 64 queues");
        let size = service.queue_size;
        assert!(size.is_power_of_two() && size <= MAX_QUEUE_SIZE, "a queue's size is a power of two up to 32768");
        let device = Device::new(disk, service.queues, size, service.write_back);
        let settings = Settings { engine: service.engine, poll: service.poll };
        let cannot = |e| Error::io("cannot make an event counter", e);
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (alarm, ring) = new_event_consumer_and_notifier(flags).map_err(cannot)?;
        let start = |index| {
            let ring = ring.try_clone().map_err(cannot)?;
            Worker::start(&device, usize::from(index), settings, &service.name, ring)
        };
        let workers = (0..service.queues).map(start).collect::<Result<Vec<_>>>()?;
        Ok(Daemon { name: service.name.clone(), device, workers, socket, alarm })
    }

    /// Serves front-ends, one at a time, until `stop` is readable, or, where the socket came connected, until the
    /// front-end leaves. Then drains the queues, commits and closes the disk.
    ///
    /// # Errors
    /// Where the disk does not close: what was not flushed before may be lost.
    pub fn run(mut self, stop: impl AsFd) -> Result<()> {
        let served = match self.socket {
            Socket::Listening(ref listener) => self.serve_all(listener, stop.as_fd()),
            Socket::Connected(ref stream) => {
                let stream = stream.try_clone().map_err(|e| Error::io("cannot take over the connection", e));
                stream.map(|stream| {
                    self.serve_one(stream, None, stop.as_fd());
                })
            }
        };
        self.workers.iter().for_each(Worker::ask_to_end);
        let late = self.workers.iter().filter(|worker| !worker.has_ended()).count();
        if late > 0 {
            let what = format!(
                "{late} queues do not end, as the storage does not answer: the image is not closed; what was acknowledged is in \
                 the live journal, which the next daemon takes in"
            );
            log::error!("disk {}: {what}", self.name);
            return Err(Error::new(ErrorKind::Io, what));
        }
        self.workers.clear();
        let closed = self.device.disk().close();
        match &closed {
            Ok(()) => info!("disk {}: closed", self.name),
            Err(e) => log::error!("disk {}: did not close: {}", self.name, e.line()),
        }
        drop(self.socket);
        served.and(closed)
    }

    fn serve_all(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            wait(&mut fds, None)?;
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            if fds[1].revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok(stream) => {
                    if let Fate::Stop = self.serve_one(stream, Some(listener), stop) {
                        return Ok(());
                    }
                }
                Err(e) => {
                    warn!("disk {}: cannot accept a front-end: {e}", self.name);
                    pause(stop)?;
                }
            }
        }
    }

    /// Serves one front-end and refuses others as long as it is there.
    fn serve_one(&self, stream: UnixStream, listener: Option<&Listener>, stop: BorrowedFd<'_>) -> Fate {
        let who = peer(&stream);
        info!("disk {}: front-end connected: {who}", self.name);
        let end = match self.converse(stream, listener, stop) {
            Ok(end) => end,
            Err(e) => {
                warn!("disk {}: the connection is given up: {}", self.name, e.line());
                Fate::Gone
            }
        };
        info!("disk {}: front-end disconnected: {who}", self.name);
        end
    }

    fn converse(&self, stream: UnixStream, listener: Option<&Listener>, stop: BorrowedFd<'_>) -> Result<Fate> {
        let socket = stream.try_clone().map_err(|e| Error::io("cannot use the connection", e))?;
        let handler = Arc::new(Mutex::new(Handler::new(&self.device, &self.workers, &self.name, stop)));
        let mut session = Session {
            name: &self.name,
            requests: BackendReqHandler::from_stream(stream, handler.clone()),
            handler,
            refusals: 0,
        };
        let mut half_since = None;
        loop {
            // The listener stands before the connection: a front-end that closed and came back is seen as gone here
            // before its return could be taken for a second front-end.
            let mut fds = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&self.alarm, PollFlags::IN)];
            fds.extend(listener.map(|l| PollFd::new(l, PollFlags::IN)));
            let interest = if half_since.is_some() { PollFlags::empty() } else { PollFlags::IN };
            fds.push(PollFd::new(&socket, interest));
            wait(&mut fds, half_since.map(|_| &GLANCE))?;
            if !fds[0].revents().is_empty() {
                return Ok(Fate::Stop);
            }
            if !fds[1].revents().is_empty() {
                // May be about memory of an earlier front-end.
                let _ = self.alarm.consume();
            }
            session.check_memory()?;
            let from_front_end = fds.last().expect("pushed above").revents();
            let gone = from_front_end.intersects(PollFlags::HUP | PollFlags::ERR);
            if let Some(listener) = listener
                && !fds[2].revents().is_empty()
                && !gone
            {
                self.refuse_another(listener, stop)?;
            }
            if from_front_end.is_empty() && half_since.is_none() {
                continue;
            }
            match frame::peek(&socket).map_err(|e| Error::io("the socket fails", e))? {
                Next::Gone => return Ok(Fate::Gone),
                Next::Garbage => return Err(Error::io("what came is no vhost-user message", invalid())),
                Next::Partial if gone => return Ok(Fate::Gone),
                Next::Partial => {
                    let since = *half_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        return Err(Error::io("a message began and did not end", invalid()));
                    }
                }
                Next::Whole(frame) => {
                    half_since = None;
                    if !frame::has_room(&socket) {
                        return Err(Error::io("the front-end does not read its answers", invalid()));
                    }
                    if let Fate::Gone = session.handle(frame, &socket)? {
                        return Ok(Fate::Gone);
                    }
                }
            }
        }
    }

    fn refuse_another(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        match listener.accept() {
            Ok(second) => {
                warn!("disk {}: a second front-end is refused: {}; one is connected", self.name, peer(&second));
                Ok(())
            }
            Err(e) => {
                warn!("disk {}: cannot accept a second front-end, even to refuse it: {e}", self.name);
                pause(stop)
            }
        }
    }
}

/// One connection.
struct Session<'a> {
    name: &'a str,
    requests: BackendReqHandler<Mutex<Handler<'a>>>,
    handler: Arc<Mutex<Handler<'a>>>,
    refusals: u32,
}

impl Session<'_> {
    /// # Errors
    /// If a page of the memory that the front-end shared could not be had: what it says from now on has no ground.
    fn check_memory(&self) -> Result<()> {
        let lost = self.handler.lock().unwrap_or_else(PoisonError::into_inner).is_memory_lost();
        if lost { Err(Error::new(ErrorKind::Io, "a page of the guest's memory could not be had")) } else { Ok(()) }
    }

    /// Handles the message that waits. One that is refused does not end the connection, unless the front-end would
    /// wait for ever for an answer that the protocol has no words for.
    fn handle(&mut self, frame: Frame, socket: &UnixStream) -> Result<Fate> {
        let broken = |e| Error::io("the socket fails", e);
        let state = |session: &Self| {
            let handler = session.handler.lock().unwrap_or_else(PoisonError::into_inner);
            (handler.calls(), handler.acknowledges())
        };
        let (calls, _) = state(self);
        let (why, acknowledged) = if frame.is_readable() {
            match self.requests.handle_request() {
                Ok(()) => return Ok(Fate::Stay),
                Err(VhostError::Disconnected) => return Ok(Fate::Gone),
                Err(e @ (VhostError::SocketBroken(_) | VhostError::SocketError(_) | VhostError::PartialMessage)) => {
                    return Err(Error::io("the socket fails", std::io::Error::other(e)));
                }
                Err(e) => (e.to_string(), state(self).0 != calls || frame.is_always_acknowledged()),
            }
        } else {
            frame.skip(socket).map_err(broken)?;
            ("it is unknown, or came with files it must not have".into(), false)
        };
        self.refusals += 1;
        match self.refusals {
            ..LOGGED_REFUSALS => warn!("disk {}: request {} is refused: {why}", self.name, frame.request()),
            LOGGED_REFUSALS => warn!("disk {}: further refusals of this front-end are not logged", self.name),
            _ => {}
        }
        if frame.has_no_refusal() && !(acknowledged && frame.refuses_in_its_answer()) {
            return Err(Error::io("a question has no answer", invalid()));
        }
        if !acknowledged && frame.wants_acknowledgement() && state(self).1 {
            frame.refuse(socket).map_err(broken)?;
        }
        Ok(Fate::Stay)
    }
}

fn invalid() -> std::io::Error {
    std::io::ErrorKind::InvalidData.into()
}

/// Waits until something happens, for `at_most` if given.
fn wait(fds: &mut [PollFd<'_>], at_most: Option<&Timespec>) -> Result<()> {
    match poll(fds, at_most) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::INTR) => {
            fds.iter_mut().for_each(PollFd::clear_revents);
            Ok(())
        }
        Err(e) => Err(Error::io("cannot wait for the sockets", e.into())),
    }
}

/// Waits a little, so that a failure that lasts does not make the thread spin.
fn pause(stop: BorrowedFd<'_>) -> Result<()> {
    let little = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    wait(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], Some(&little))
}
