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

use super::connection::{Connection, Fate, invalid};
use super::frame::{self, Next};
use super::handler::{Handler, more_queues};
use super::socket::{Listener, Socket, peer};
use super::worker::{END, Settings, Worker};
use super::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::device::Device;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Notifier, EngineKind};

/// A front-end that sends the first half of a message has this long for the second.
const PATIENCE: Duration = Duration::from_secs(5);
/// What idle threads have to end in.
const MOMENT: Duration = Duration::from_millis(500);
/// How often a half message is looked at again.
const GLANCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How often such rings are looked at again.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How often the names of the served files are looked up.
const NAMES_PERIOD: Duration = Duration::from_secs(5);

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct Service {
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
pub struct Daemon {
    name: String,
    device: Arc<Device>,
    workers: Vec<Worker>,
    socket: Socket,
    /// Readable when a page of the guest's memory could not be had.
    alarm: Arc<Notifier>,
    /// Whether the last front-end left because it uses more queues, as it seems.
    wants_more: Cell<bool>,
    /// When the names of the served files are looked up next.
    names_due: Cell<Instant>,
    /// The thread that looks them up.
    names: Cell<Option<JoinHandle<()>>>,
    /// When the stop signal was seen.
    stopped: Cell<Option<Instant>>,
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
        let alarm = Arc::new(Notifier::new()?);
        let start = |index| Worker::start(&device, usize::from(index), settings, &service.name, &alarm);
        let workers = (0..service.queues).map(start).collect::<Result<Vec<_>>>()?;
        let names_due = Cell::new(Instant::now() + NAMES_PERIOD);
        let (name, wants_more, stopped) = (service.name.clone(), Cell::new(false), Cell::new(None));
        let names = Cell::new(None);
        Ok(Daemon { name, device, workers, socket, alarm, wants_more, names_due, names, stopped })
    }

    /// What carries out I/O, in a word for the log.
    pub fn engine(&self) -> &'static str {
        self.workers.first().map_or("none", |worker| worker.engine)
    }

    /// Looks up the names of the served files if that is due. Returns the time until it is due again.
    ///
    /// A thread of its own does it: a file system that does not answer must not keep this one from answering.
    fn watch_names(&self) -> Timespec {
        if Instant::now() >= self.names_due.get() {
            let last = self.names.take();
            self.names.set(match last.filter(|thread| !thread.is_finished()) {
                Some(busy) => Some(busy),
                None => self.look_up_names(),
            });
            self.names_due.set(Instant::now() + NAMES_PERIOD);
        }
        let left = self.names_due.get().saturating_duration_since(Instant::now());
        Timespec::try_from(left).unwrap_or(GLANCE)
    }

    fn look_up_names(&self) -> Option<JoinHandle<()>> {
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
            Socket::Listening(ref listener) => self.serve_all(listener, stop.as_fd()),
            Socket::Connected(ref stream) => {
                let stream = stream.try_clone().map_err(|e| Error::io("cannot take over the connection", e));
                stream.map(|stream| {
                    self.serve_one(stream, None, stop.as_fd());
                })
            }
        };
        // What the drain of the rings took of the time is gone, but for a moment in which idle threads end.
        let now = Instant::now();
        let by = (self.stopped.get().unwrap_or(now) + END).max(now + MOMENT);
        self.workers.iter().for_each(|worker| worker.ask_to_end(by));
        let late = self.workers.iter().filter(|worker| !worker.has_ended()).count();
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

    fn serve_all(&self, listener: &Listener, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            wait(&mut fds, Some(&self.watch_names()))?;
            if !fds[0].revents().is_empty() {
                self.stopped.set(Some(Instant::now()));
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
                return Ok(Fate::Gone);
            }
            if connection.is_stuck() {
                return Ok(Fate::Gone);
            }
            // The listener stands before the connection: a front-end that closed and came back is seen as gone here
            // before its return could be taken for a second front-end.
            let mut fds = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&*self.alarm, PollFlags::IN)];
            fds.extend(listener.map(|l| PollFd::new(l, PollFlags::IN)));
            let interest = if half_since.is_some() { PollFlags::empty() } else { PollFlags::IN };
            fds.push(PollFd::new(&socket, interest));
            let lacks_memory = connection.watch_memory();
            let names = self.watch_names();
            let at_most = if lacks_memory { names.min(LOOK) } else { names };
            wait(&mut fds, Some(if half_since.is_some() { &GLANCE } else { &at_most }))?;
            if !fds[0].revents().is_empty() {
                self.stopped.set(Some(Instant::now()));
                return Ok(Fate::Stop);
            }
            if !fds[1].revents().is_empty() {
                // May be about memory of an earlier front-end.
                self.alarm.drain();
            }
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
                Next::Gone => {
                    self.explain_end(&connection);
                    return Ok(Fate::Gone);
                }
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
                    if let Fate::Gone = connection.handle(frame, &socket)? {
                        return Ok(Fate::Gone);
                    }
                }
            }
        }
    }

    /// Warns if the front-end left because it uses more queues than it was offered. It checks that itself, and retries.
    fn explain_end(&self, connection: &Connection<'_>) {
        let offered = self.workers.len();
        let has_rings = connection.handler.lock().unwrap_or_else(PoisonError::into_inner).has_rings();
        let asked = connection.last == Some(FrontendReq::GET_QUEUE_NUM as u32) && !has_rings;
        if asked && !self.wants_more.get() {
            let what = more_queues(offered);
            warn!("disk {}: the front-end left when it had the number of queues: it may use more. {what}", self.name);
        }
        self.wants_more.set(asked);
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
