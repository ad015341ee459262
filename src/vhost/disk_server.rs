//! The control thread of a served disk. It starts the workers, serves one front-end after another, and closes the disk.
//!
//! The control thread waits in one `poll` for the stop signal, the listening socket and the front-end. It reads a
//! message only when the whole message has arrived, and handles the message only if the socket has space for the reply.
//! So no front-end can keep the thread from accepting or refusing connections, or from ending.

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
use super::server_status::ServerStatus;
use super::socket::{Listener, Peer, Socket};
use super::worker::{EXIT_TIMEOUT, Worker, WorkerSettings};
use crate::device::Device;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{EngineKind, Notifier};

/// Time within which a front-end must complete a message that it began to send.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum time that workers have to exit, even if draining the rings took longer than [`EXIT_TIMEOUT`].
const IDLE_EXIT_TIMEOUT: Duration = Duration::from_millis(500);
/// Interval at which the control thread checks whether the rest of an incomplete message has arrived.
const PARTIAL_MESSAGE_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// Interval at which the control thread checks rings that lack only guest memory.
const NO_MEMORY_POLL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Interval at which the control thread checks the names of the served files.
const NAME_CHECK_PERIOD: Duration = Duration::from_secs(5);

/// Options for serving a disk.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The name of the disk in the log.
    pub name: String,
    /// Number of queues that are offered, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Expected size of a queue: a power of two, at most [`MAX_QUEUE_SIZE`]. Larger rings are served, too.
    pub queue_size: u16,
    /// The I/O engine.
    pub engine: EngineKind,
    /// Maximum time for which the thread of a queue polls before it sleeps.
    pub poll: Duration,
    /// Whether the device offers the guest a write cache, which the guest must flush for durability.
    pub write_back: bool,
}

/// A served disk: the device, the threads of its queues, and the socket to which front-ends connect.
pub struct DiskServer {
    name: String,
    device: Arc<Device>,
    workers: Vec<Worker>,
    socket: Socket,
    status: Arc<ServerStatus>,
    /// Notified by a worker whose access to guest memory failed.
    memory_lost: Arc<Notifier>,
    /// Whether the last front-end seems to have disconnected because it uses more queues than are offered.
    queue_shortage_suspected: Cell<bool>,
    /// Time at which the next check of file names is due.
    name_check_due: Cell<Instant>,
    /// The thread of the last check of file names, if it may still run.
    name_check: Cell<Option<JoinHandle<()>>>,
    /// Time at which the stop signal was seen.
    stop_seen: Cell<Option<Instant>>,
}

impl DiskServer {
    /// Starts the threads of the disk's queues. Front-ends may connect from now on; [`run`](Self::run) serves them.
    ///
    /// # Errors
    /// `Io` if a thread, its lane or its event loop cannot be created, and any other error of [`Disk::lane`].
    ///
    /// # Panics
    /// If the number or the size of the queues in `options` is out of range.
    pub fn new(disk: Arc<Disk>, options: &ServeOptions, socket: Socket) -> Result<DiskServer> {
        assert!((1..=MAX_QUEUES).contains(&options.queues), "a disk has 1 to 64 queues");
        let size = options.queue_size;
        assert!(size.is_power_of_two() && size <= MAX_QUEUE_SIZE, "a queue's size is a power of two up to 32768");
        let device = Device::new(disk, options.queues, size, options.write_back);
        let settings = WorkerSettings { engine: options.engine, poll: options.poll };
        let memory_lost = Arc::new(Notifier::new()?);
        let start = |index| Worker::start(&device, usize::from(index), settings, &options.name, &memory_lost);
        let workers = (0..options.queues).map(start).collect::<Result<Vec<_>>>()?;
        let engine = workers.first().map_or("none", |worker| worker.engine);
        let status = Arc::new(ServerStatus::new(socket.path(), (options.queues, size), options.write_back, engine));
        Ok(DiskServer {
            name: options.name.clone(),
            device,
            workers,
            socket,
            status,
            memory_lost,
            queue_shortage_suspected: Cell::new(false),
            name_check_due: Cell::new(Instant::now() + NAME_CHECK_PERIOD),
            name_check: Cell::new(None),
            stop_seen: Cell::new(None),
        })
    }

    /// Returns the state of the served disk, which stays valid while [`run`](Self::run) serves it.
    pub fn status(&self) -> &Arc<ServerStatus> {
        &self.status
    }

    /// Checks the names of the served files if a check is due. Returns the time until the next check.
    ///
    /// The check runs in a thread of its own, because a file system that does not respond would block the control
    /// thread.
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
        thread.inspect_err(|e| warn!("disk {}: cannot check the names of its files: {e}", self.name)).ok()
    }

    /// Serves front-ends, one at a time, until `stop` is readable. If the socket is a connection that was handed over,
    /// serves only that front-end, until it disconnects. Then drains the queues, commits, and closes the disk.
    ///
    /// # Errors
    /// * `Io` if requests in flight do not complete, so that the image is not closed, or if waiting on the sockets
    ///   fails.
    /// * Any error of closing the disk. Then writes that were not flushed may be lost.
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
        // The time limit includes the time that draining the rings took, but the threads always get IDLE_EXIT_TIMEOUT.
        let now = Instant::now();
        let by = (self.stop_seen.get().unwrap_or(now) + EXIT_TIMEOUT).max(now + IDLE_EXIT_TIMEOUT);
        self.workers.iter().for_each(|worker| worker.request_exit(by));
        let late = self.workers.iter().filter(|worker| !worker.wait_for_exit()).count();
        if late > 0 {
            let what = format!(
                "the storage does not respond: requests of {late} queues do not complete, and the image is not closed. The \
                next daemon recovers the acknowledged writes"
            );
            error!("disk {}: {what}", self.name);
            return Err(Error::new(ErrorKind::Io, what));
        }
        self.workers.clear();
        let closed = self.device.disk().close();
        match &closed {
            Ok(()) => info!("disk {}: closed", self.name),
            Err(e) => error!("disk {}: cannot close: {}", self.name, e.line()),
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

    /// Serves one front-end, and refuses others while it is connected.
    fn serve_connection(&self, stream: UnixStream, listener: Option<&Listener>, stop: BorrowedFd<'_>) -> ConnectionEnd {
        let peer = Peer::of(&stream);
        info!("disk {}: front-end connected: {peer}", self.name);
        self.status.set_front_end(peer, true, self.device.disk());
        let end = match self.message_loop(stream, listener, stop) {
            Ok(end) => end,
            Err(e) => {
                warn!("disk {}: the connection is closed: {}", self.name, e.line());
                ConnectionEnd::Disconnected
            }
        };
        info!("disk {}: front-end disconnected: {peer}", self.name);
        self.status.set_front_end(peer, false, self.device.disk());
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
        let mut connection = Connection::new(&self.name, &self.status, stream, handler);
        let mut partial_since = None;
        loop {
            if connection.is_memory_lost() {
                error!(
                    "disk {}: an access to guest memory failed: the front-end truncated the memory file, or the host is out of \
                    memory. The disk is out of service until a front-end connects again",
                    self.name
                );
                return Ok(ConnectionEnd::Disconnected);
            }
            if connection.is_stuck() {
                return Ok(ConnectionEnd::Disconnected);
            }
            // `poll` checks the listener before the connection, so the order of `fds` matters. If a front-end has
            // reconnected, a `poll` that finds its new connection also finds the hang-up of its old connection. So the
            // new connection is not mistaken for that of a second front-end.
            let mut fds =
                vec![PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&*self.memory_lost, PollFlags::IN)];
            fds.extend(listener.map(|l| PollFd::new(l, PollFlags::IN)));
            let interest = if partial_since.is_some() { PollFlags::empty() } else { PollFlags::IN };
            fds.push(PollFd::new(&socket, interest));
            let lacks_memory = connection.check_memory();
            let next_check = self.check_names_if_due();
            let at_most = if lacks_memory { next_check.min(NO_MEMORY_POLL) } else { next_check };
            wait(&mut fds, Some(if partial_since.is_some() { &PARTIAL_MESSAGE_POLL } else { &at_most }))?;
            if !fds[0].revents().is_empty() {
                self.stop_seen.set(Some(Instant::now()));
                return Ok(ConnectionEnd::Shutdown);
            }
            if !fds[1].revents().is_empty() {
                // The notification may concern the memory of an earlier front-end, so the loop calls is_memory_lost()
                // itself.
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
            if from_front_end.is_empty() && partial_since.is_none() {
                continue;
            }
            match frame::peek(&socket).map_err(|e| Error::io("I/O on the connection failed", e))? {
                PeekedMessage::Closed => {
                    self.warn_of_queue_shortage(&connection);
                    return Ok(ConnectionEnd::Disconnected);
                }
                PeekedMessage::Malformed => {
                    return Err(Error::io("received bytes that are no vhost-user message", protocol_error()));
                }
                PeekedMessage::Partial if gone => return Ok(ConnectionEnd::Disconnected),
                PeekedMessage::Partial => {
                    let since = *partial_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > MESSAGE_TIMEOUT {
                        return Err(Error::io("the front-end sent an incomplete message", protocol_error()));
                    }
                }
                PeekedMessage::Whole(frame) => {
                    partial_since = None;
                    if !frame::can_send_reply(&socket) {
                        return Err(Error::io("the front-end does not read its replies", protocol_error()));
                    }
                    if let Some(end) = connection.handle(frame, &socket)? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// Warns if the front-end seems to have disconnected because it uses more queues than are offered. Such a front-end
    /// disconnects right after GET_QUEUE_NUM. It may connect again and again, so the warning is not repeated until a
    /// front-end disconnects at another point.
    fn warn_of_queue_shortage(&self, connection: &Connection<'_>) {
        let offered = self.workers.len();
        let has_rings = connection.handler.lock().unwrap_or_else(PoisonError::into_inner).has_rings();
        let asked = connection.last_request == Some(FrontendReq::GET_QUEUE_NUM as u32) && !has_rings;
        if asked && !self.queue_shortage_suspected.get() {
            let what = queue_count_hint(offered);
            warn!("disk {}: the front-end disconnected after it asked for the number of queues. {what}", self.name);
        }
        self.queue_shortage_suspected.set(asked);
    }

    fn refuse_second(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        match listener.accept() {
            Ok(second) => {
                warn!("disk {}: a second front-end is refused: {}; one is connected", self.name, Peer::of(&second));
                Ok(())
            }
            Err(e) => {
                warn!(
                    "disk {}: cannot accept the connection of another front-end in order to refuse it: {e}",
                    self.name
                );
                back_off(stop)
            }
        }
    }
}

/// Waits until one of the descriptors is ready, or until `at_most`, if given, has passed.
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

/// Waits 100 ms or until the stop signal, so that the thread does not spin while a failure lasts.
fn back_off(stop: BorrowedFd<'_>) -> Result<()> {
    let little = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    wait(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], Some(&little))
}
