//! The life of a served disk: its threads, its front-ends one after the other, and its end.
//!
//! The control thread waits in one `poll` for the stop signal, the listening socket and the front-end. A message is
//! read when it is there as a whole, and answered only when there is room for the answer, so no front-end can keep
//! the thread from accepting, refusing or ending.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::FrontendReq;

use super::connection::{Connection, ConnectionEnd, protocol_error};
use super::frame::{self, PeekedMessage};
use super::handler::{Handler, queue_count_hint};
use super::limits::{MAX_QUEUE_SIZE, MAX_QUEUES};
use super::socket::{Listener, Socket, describe_peer};
use super::worker::{EXIT_TIMEOUT, Worker, WorkerSettings};
use crate::device::Device;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{EngineKind, Notifier};

/// A front-end that sends the first half of a message has this long for the second.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// What idle threads have to end in.
const IDLE_EXIT_TIMEOUT: Duration = Duration::from_millis(500);
/// How often a half message is looked at again.
const PARTIAL_MESSAGE_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How often such rings are looked at again.
const NO_MEMORY_POLL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How often the names of the served files are looked up.
const NAME_CHECK_PERIOD: Duration = Duration::from_secs(5);

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// A name for the log.
    pub name: String,
    /// Queues offered, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries that a queue is expected to have, a power of two up to [`MAX_QUEUE_SIZE`]. Larger rings are served.
    pub queue_size: u16,
    /// What carries out I/O.
    pub engine: EngineKind,
    /// How long a queue's thread looks for more work before it sleeps.
    pub poll: Duration,
    /// Whether the guest is told of a write cache that it has to flush.
    pub write_back: bool,
}

/// A disk, the threads of its queues, and the socket on which front-ends find it.
pub struct DiskServer {
    name: String,
    device: Arc<Device>,
    workers: Vec<Worker>,
    socket: Socket,
    /// Readable when a page of the guest's memory could not be had.
    memory_lost: Arc<Notifier>,
    /// Whether the last front-end left because it uses more queues, as it seems.
    queue_shortage_suspected: Cell<bool>,
    /// When the names of the served files are looked up next.
    name_check_due: Cell<Instant>,
    /// The thread that looks them up.
    name_check: Cell<Option<JoinHandle<()>>>,
    /// When the stop signal was seen.
    stop_seen: Cell<Option<Instant>>,
}

impl DiskServer {
    /// Starts the threads of the disk's queues. From now on front-ends may connect; they are served by `run`.
    ///
    /// # Errors
    /// Where the host has no room for the threads or their lanes.
    ///
    /// # Panics
    /// Where the numbers in `service` are out of their ranges.
    pub fn new(disk: Arc<Disk>, service: &ServeOptions, socket: Socket) -> Result<DiskServer> {
        assert!((1..=MAX_QUEUES).contains(&service.queues), "a disk has 1 to 64 queues");
        let size = service.queue_size;
        assert!(size.is_power_of_two() && size <= MAX_QUEUE_SIZE, "a queue's size is a power of two up to 32768");
        let device = Device::new(disk, service.queues, size, service.write_back);
        let settings = WorkerSettings { engine: service.engine, poll: service.poll };
        let alarm = Arc::new(Notifier::new()?);
        let start = |index| Worker::start(&device, usize::from(index), settings, &service.name, &alarm);
        let workers = (0..service.queues).map(start).collect::<Result<Vec<_>>>()?;
        let names_due = Cell::new(Instant::now() + NAME_CHECK_PERIOD);
        let (name, wants_more, stopped) = (service.name.clone(), Cell::new(false), Cell::new(None));
        let names = Cell::new(None);
        Ok(DiskServer {
            name,
            device,
            workers,
            socket,
            memory_lost: alarm,
            queue_shortage_suspected: wants_more,
            name_check_due: names_due,
            name_check: names,
            stop_seen: stopped,
        })
    }

    /// What carries out I/O, in a word for the log.
    pub fn engine(&self) -> &'static str {
        self.workers.first().map_or("none", |worker| worker.engine)
    }

    /// Looks up the names of the served files if that is due. Returns the time until it is due again.
    ///
    /// A thread of its own does it: a file system that does not answer must not keep this one from answering.
    fn check_names_if_due(&self) -> Timespec {
        if Instant::now() >= self.name_check_due.get() {
            let last = self.name_check.take();
            self.name_check.set(match last.filter(|thread| !thread.is_finished()) {
                Some(busy) => Some(busy),
                None => self.start_name_check(),
            });
            self.name_check_due.set(Instant::now() + NAME_CHECK_PERIOD);
        }
        let left = self.name_check_due.get().saturating_duration_since(Instant::now());
        Timespec::try_from(left).unwrap_or(PARTIAL_MESSAGE_POLL)
    }

    fn start_name_check(&self) -> Option<JoinHandle<()>> {
        let device = self.device.clone();
        let thread = thread::Builder::new().name("names".into()).spawn(move || device.disk().check_names());
        thread.inspect_err(|e| warn!("disk {}: the names of its files are not watched: {e}", self.name)).ok()
    }

    /// Serves front-ends, one at a time, until `stop` is readable, or, where the socket came connected, until the
    /// front-end leaves. Then drains the queues, commits and closes the disk.
    ///
    /// # Errors
    /// Where the disk does not close: what was not flushed before may be lost.
    pub fn run(mut self, stop: impl AsFd) -> Result<()> {
        let served = match self.socket {
            Socket::Listening(ref listener) => self.accept_loop(listener, stop.as_fd()),
            Socket::Connected(ref stream) => {
                let stream = stream.try_clone().map_err(|e| Error::io("cannot take over the connection", e));
                stream.map(|stream| {
                    self.serve_connection(stream, None, stop.as_fd());
                })
            }
        };
        // What the drain of the rings took of the time is gone, but for a moment in which idle threads end.
        let now = Instant::now();
        let by = (self.stop_seen.get().unwrap_or(now) + EXIT_TIMEOUT).max(now + IDLE_EXIT_TIMEOUT);
        self.workers.iter().for_each(|worker| worker.request_exit(by));
        let late = self.workers.iter().filter(|worker| !worker.wait_for_exit()).count();
        if late > 0 {
            let what = format!(
                "{late} queues do not end, as the storage does not answer: the image is not closed; the next \
                 daemon recovers what was acknowledged"
            );
            error!("disk {}: {what}", self.name);
            return Err(Error::new(ErrorKind::Io, what));
        }
        self.workers.clear();
        let closed = self.device.disk().close();
        match &closed {
            Ok(()) => info!("disk {}: closed", self.name),
            Err(e) => error!("disk {}: did not close: {}", self.name, e.line()),
        }
        drop(self.socket);
        served.and(closed)
    }

    fn accept_loop(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            wait(&mut fds, Some(&self.check_names_if_due()))?;
            if !fds[0].revents().is_empty() {
                self.stop_seen.set(Some(Instant::now()));
                return Ok(());
            }
            if fds[1].revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok(stream) => {
                    if let ConnectionEnd::Shutdown = self.serve_connection(stream, Some(listener), stop) {
                        return Ok(());
                    }
                }
                Err(e) => {
                    warn!("disk {}: cannot accept a front-end: {e}", self.name);
                    back_off(stop)?;
                }
            }
        }
    }

    /// Serves one front-end and refuses others as long as it is there.
    fn serve_connection(&self, stream: UnixStream, listener: Option<&Listener>, stop: BorrowedFd<'_>) -> ConnectionEnd {
        let who = describe_peer(&stream);
        info!("disk {}: front-end connected: {who}", self.name);
        let end = match self.message_loop(stream, listener, stop) {
            Ok(end) => end,
            Err(e) => {
                warn!("disk {}: the connection is given up: {}", self.name, e.line());
                ConnectionEnd::Disconnected
            }
        };
        info!("disk {}: front-end disconnected: {who}", self.name);
        end
    }

    fn message_loop(
        &self,
        stream: UnixStream,
        listener: Option<&Listener>,
        stop: BorrowedFd<'_>,
    ) -> Result<ConnectionEnd> {
        let socket = stream.try_clone().map_err(|e| Error::io("cannot use the connection", e))?;
        let handler = Handler::new(&self.device, &self.workers, &self.name, stop);
        let mut connection = Connection::new(&self.name, stream, handler);
        let mut half_since = None;
        loop {
            if connection.is_memory_lost() {
                error!(
                    "disk {}: a page of the guest's memory cannot be had: the front-end has cut the memory file, or the host has no \
                     memory left for it. The disk is out of service until a front-end connects again",
                    self.name
                );
                return Ok(ConnectionEnd::Disconnected);
            }
            if connection.is_stuck() {
                return Ok(ConnectionEnd::Disconnected);
            }
            // The listener stands before the connection: a front-end that closed and came back is seen as gone here
            // before its return could be taken for a second front-end.
            let mut fds =
                vec![PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&*self.memory_lost, PollFlags::IN)];
            fds.extend(listener.map(|l| PollFd::new(l, PollFlags::IN)));
            let interest = if half_since.is_some() { PollFlags::empty() } else { PollFlags::IN };
            fds.push(PollFd::new(&socket, interest));
            let lacks_memory = connection.check_memory();
            let names = self.check_names_if_due();
            let at_most = if lacks_memory { names.min(NO_MEMORY_POLL) } else { names };
            wait(&mut fds, Some(if half_since.is_some() { &PARTIAL_MESSAGE_POLL } else { &at_most }))?;
            if !fds[0].revents().is_empty() {
                self.stop_seen.set(Some(Instant::now()));
                return Ok(ConnectionEnd::Shutdown);
            }
            if !fds[1].revents().is_empty() {
                // May be about memory of an earlier front-end.
                self.memory_lost.drain();
            }
            let from_front_end = fds.last().expect("pushed above").revents();
            let gone = from_front_end.intersects(PollFlags::HUP | PollFlags::ERR);
            if let Some(listener) = listener
                && !fds[2].revents().is_empty()
                && !gone
            {
                self.refuse_second(listener, stop)?;
            }
            if from_front_end.is_empty() && half_since.is_none() {
                continue;
            }
            match frame::peek(&socket).map_err(|e| Error::io("the socket fails", e))? {
                PeekedMessage::Closed => {
                    self.warn_of_queue_shortage(&connection);
                    return Ok(ConnectionEnd::Disconnected);
                }
                PeekedMessage::Malformed => {
                    return Err(Error::io("what came is no vhost-user message", protocol_error()));
                }
                PeekedMessage::Partial if gone => return Ok(ConnectionEnd::Disconnected),
                PeekedMessage::Partial => {
                    let since = *half_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > MESSAGE_TIMEOUT {
                        return Err(Error::io("a message began and did not end", protocol_error()));
                    }
                }
                PeekedMessage::Whole(frame) => {
                    half_since = None;
                    if !frame::can_send_reply(&socket) {
                        return Err(Error::io("the front-end does not read its answers", protocol_error()));
                    }
                    if let Some(end) = connection.handle(frame, &socket)? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// Warns if the front-end left because it uses more queues than it was offered. It checks that itself, and retries.
    fn warn_of_queue_shortage(&self, connection: &Connection<'_>) {
        let offered = self.workers.len();
        let has_rings = connection.handler.lock().unwrap_or_else(PoisonError::into_inner).has_rings();
        let asked = connection.last_request == Some(FrontendReq::GET_QUEUE_NUM as u32) && !has_rings;
        if asked && !self.queue_shortage_suspected.get() {
            let what = queue_count_hint(offered);
            warn!("disk {}: the front-end left when it had the number of queues: it may use more. {what}", self.name);
        }
        self.queue_shortage_suspected.set(asked);
    }

    fn refuse_second(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        match listener.accept() {
            Ok(second) => {
                warn!(
                    "disk {}: a second front-end is refused: {}; one is connected",
                    self.name,
                    describe_peer(&second)
                );
                Ok(())
            }
            Err(e) => {
                warn!("disk {}: cannot accept a second front-end, even to refuse it: {e}", self.name);
                back_off(stop)
            }
        }
    }
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
fn back_off(stop: BorrowedFd<'_>) -> Result<()> {
    let little = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    wait(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], Some(&little))
}
