//! The thread of one queue: it alone touches the queue's ring while the ring runs.
//!
//! A worker lives as long as the disk. The control thread talks to it in commands; a command is put into the channel
//! first and then rung for. All waiting is one edge-triggered `epoll_wait` over the bell, the kick of the ring and
//! what the lane wakes by. An edge-triggered event counter reports each write to it without ever being read, so a
//! kick costs no call of its own; and a front-end that reads its own kick cannot make the thread wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, warn};
use vhost_user_backend::VringT;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use zerocopy::IntoBytes;

use super::edges::{Epoll, Source};
use super::patience::Patience;
use super::unshared::{SHARE, Sharing};
use crate::device::{Device, Memory, Queue, Record, Turn, Vring};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::EngineKind;

/// What every worker of a disk is started with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) engine: EngineKind,
    /// The longest time for which a queue looks for more work before it sleeps.
    pub(super) poll: Duration,
}

/// A ring that is ready to run.
pub(super) struct Ring {
    pub(super) vring: Vring,
    pub(super) memory: Arc<Memory>,
    /// What is in flight, where a kill does not reach.
    pub(super) record: Option<Record>,
    /// By what the guest announces requests; none if the ring is to be polled.
    pub(super) kick: Option<Arc<File>>,
    /// Told when the ring breaks.
    pub(super) err: Option<File>,
    /// Where it starts: the number of the next available entry.
    pub(super) base: u16,
    /// What is known about the guest's memory.
    pub(super) sharing: Sharing,
}

enum Command {
    Start(Box<Ring>, SyncSender<Result<()>>),
    SetCall(Option<File>),
    SetErr(Option<File>),
    Stop(SyncSender<u16>),
    Exit,
}

/// The control thread's end of a worker. Dropping it drains the queue and ends the thread.
pub(super) struct Worker {
    commands: Sender<Command>,
    bell: EventNotifier,
    thread: Option<JoinHandle<()>>,
    /// What carries out its I/O, in a word for the log.
    pub(super) engine: &'static str,
}

impl Worker {
    /// Starts the thread of queue `index` of `device`; returns when its lane stands.
    ///
    /// # Errors
    /// Where the host has no room for a thread or a lane.
    pub(super) fn start(device: &Arc<Device>, index: usize, settings: Settings, disk: &str) -> Result<Worker> {
        let cannot = |e| Error::io("cannot start the thread of a queue", e);
        let (bell_end, bell) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).map_err(cannot)?;
        let (commands, receiver) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (device, name) = (device.clone(), format!("disk {disk}, queue {index}"));
        let body = move || {
            // The lane is made by the thread that uses it: a ring of the host may belong to one thread.
            let lane = device.disk().lane(settings.engine, usize::from(device.queue_size()));
            let engine = lane.as_ref().map_or("", |lane| lane.engine().name());
            let made = lane.and_then(|lane| {
                let queue = Queue::new(device, lane, index);
                QueueThread::new(queue, receiver, bell_end, settings.poll, name)
                    .map_err(|e| Error::io("cannot make the event loop of a queue", e))
            });
            match made {
                Ok(mut thread) => {
                    let _ = ready.send(Ok(engine));
                    thread.run();
                }
                Err(e) => drop(ready.send(Err(e))),
            }
        };
        let thread = thread::Builder::new().name(format!("queue-{index}")).spawn(body).map_err(cannot)?;
        let mut worker = Worker { commands, bell, thread: Some(thread), engine: "" };
        worker.engine = is_ready.recv().unwrap_or_else(|_| Err(Worker::lost()))?;
        Ok(worker)
    }

    /// Runs a ring. The queue must be stopped.
    ///
    /// # Errors
    /// Where the ring cannot be run, or the queue is broken for good.
    pub(super) fn start_ring(&self, ring: Ring) -> Result<()> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Start(Box::new(ring), reply));
        answer.recv().unwrap_or_else(|_| Err(Worker::lost()))
    }

    /// Puts another event counter in the place of the one by which the guest learns of completions.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.send(Command::SetCall(call));
    }

    /// The same for the one by which the front-end learns of a broken ring.
    pub(super) fn set_err(&self, err: Option<File>) {
        self.send(Command::SetErr(err));
    }

    /// Stops the ring: takes no more requests, and the answer comes when those taken are complete. The answer is the
    /// number of the next available entry; none where the thread is lost.
    pub(super) fn stop_ring(&self) -> Receiver<u16> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Stop(reply));
        answer
    }

    fn send(&self, command: Command) {
        // A thread that is gone drops the command, and with it the sender of its answer: the caller sees that.
        let _ = self.commands.send(command);
        if let Err(e) = self.bell.notify()
            && e.kind() != io::ErrorKind::WouldBlock
        {
            error!("cannot wake the thread of a queue: {e}");
        }
    }

    fn lost() -> Error {
        Error::new(ErrorKind::Io, "the thread of the queue has ended; this queue is out of service")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send(Command::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread of a queue ended by a fault");
        }
    }
}

/// How the queue stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// No ring.
    Stopped,
    Running,
    /// The ring broke a rule: nothing more is taken from it, what was taken is completed. Mended by the next start.
    Broken,
    /// We broke a rule of our own: the queue is not touched again.
    Faulty,
}

/// Between two ticks of a lane: what waits for time to pass (a full disk, a commit in the background) goes on then.
const TICK: Duration = Duration::from_secs(1);
/// How often a ring without a kick is looked at.
const POLL: Duration = Duration::from_millis(1);

struct QueueThread {
    queue: Queue,
    ring: Option<Box<Ring>>,
    /// When the ring had its first kick.
    kicked: Option<Instant>,
    state: State,
    commands: Receiver<Command>,
    /// Never read; kept so that ringing it stays possible.
    _bell: EventConsumer,
    epoll: Epoll,
    patience: Patience,
    name: String,
}

impl QueueThread {
    fn new(
        queue: Queue,
        commands: Receiver<Command>,
        bell: EventConsumer,
        poll: Duration,
        name: String,
    ) -> io::Result<QueueThread> {
        let epoll = Epoll::new()?;
        epoll.add(bell.as_raw_fd(), Source::Inside)?;
        for fd in queue.wake_fds().into_iter().flatten() {
            epoll.add(fd.as_raw_fd(), Source::Inside)?;
        }
        Ok(QueueThread {
            queue,
            ring: None,
            kicked: None,
            state: State::Stopped,
            commands,
            _bell: bell,
            epoll,
            patience: Patience::new(poll),
            name,
        })
    }

    fn run(&mut self) {
        let mut tick_at = Instant::now() + TICK;
        loop {
            match self.commands.try_recv() {
                Ok(Command::Exit) | Err(TryRecvError::Disconnected) => {
                    self.stop();
                    return;
                }
                Ok(command) => {
                    self.obey(command);
                    continue;
                }
                Err(TryRecvError::Empty) => {}
            }
            let turn = self.serve();
            let now = Instant::now();
            if now >= tick_at {
                tick_at = now + TICK;
                // A broken ring's lane may lead a commit that is held.
                if matches!(self.state, State::Running | State::Broken) {
                    self.queue.lane().tick();
                    self.check_sharing(now);
                    continue; // what it began goes on in the next turn
                }
            }
            match turn {
                Turn::More => self.patience.busy(now),
                Turn::Idle if self.state == State::Running && self.patience.waits(now) => std::hint::spin_loop(),
                Turn::Idle if self.rests() => {}
                Turn::Idle | Turn::Broken => self.sleep(),
            }
        }
    }

    /// Sleeps until there may be work.
    fn sleep(&mut self) {
        let polled = self.state == State::Running && self.ring.as_ref().is_some_and(|ring| ring.kick.is_none());
        if self.epoll.wait(if polled { POLL } else { TICK }) {
            self.kicked.get_or_insert_with(Instant::now);
        }
    }

    /// Warns if the guest kicks and nothing of what it writes arrives.
    fn check_sharing(&self, now: Instant) {
        let Some(ring) = &self.ring else { return };
        if ring.sharing.is_missing(self.kicked, now, || self.queue.is_blank()) {
            warn!(
                "{}: the guest announces requests, but its rings are blank: the front-end seems not to share the guest's \
                 memory, and the guest will wait for ever. {SHARE}",
                self.name
            );
        }
    }

    /// Asks for kicks before the thread sleeps; true where there is work after all.
    fn rests(&mut self) -> bool {
        let (State::Running, Some(ring)) = (self.state, self.ring.as_ref()) else { return false };
        self.queue.rest(&ring.vring)
    }

    /// One turn of the ring, if it runs.
    fn serve(&mut self) -> Turn {
        let (State::Running | State::Broken, Some(ring)) = (self.state, self.ring.as_ref()) else {
            return Turn::Idle;
        };
        let turn = match catch_unwind(AssertUnwindSafe(|| self.queue.serve(&ring.vring))) {
            Ok(Ok(turn)) => turn,
            Ok(Err(e)) => {
                error!("{}: the ring cannot be served: {e}", self.name);
                Turn::Broken
            }
            Err(_) => {
                error!("{}: a fault of our own while serving; the queue is out of service", self.name);
                self.state = State::Faulty;
                self.tell_broken();
                return Turn::Broken;
            }
        };
        if matches!(turn, Turn::Broken) && self.state == State::Running {
            warn!("{}: the ring is broken; nothing more is taken from it until it is set up again", self.name);
            self.state = State::Broken;
            self.tell_broken();
        }
        turn
    }

    /// Stops listening to the kick and tells the front-end, if it wants to know.
    fn tell_broken(&self) {
        let Some(ring) = &self.ring else { return };
        self.ignore_kicks(ring);
        if let Some(mut err) = ring.err.as_ref()
            && let Err(e) = err.write(1u64.as_bytes())
        {
            warn!("{}: the front-end cannot be told of the broken ring: {e}", self.name);
        }
    }

    fn ignore_kicks(&self, ring: &Ring) {
        if let Some(kick) = &ring.kick {
            self.epoll.remove(kick.as_raw_fd());
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(ring, reply) => {
                let started = self.start(ring);
                let _ = reply.send(started);
            }
            Command::SetCall(call) => {
                if matches!(self.state, State::Running | State::Broken)
                    && let Some(ring) = &self.ring
                {
                    ring.vring.set_call(call);
                    // What completed before the change was told to the old counter, and may have been missed.
                    if let Err(e) = ring.vring.signal_used_queue() {
                        warn!("{}: the guest cannot be told of completions: {e}", self.name);
                    }
                }
            }
            Command::SetErr(err) => {
                if let Some(ring) = &mut self.ring {
                    ring.err = err;
                }
            }
            Command::Stop(reply) => {
                let base = self.stop();
                let _ = reply.send(base);
            }
            Command::Exit => unreachable!("the loop ends before it"),
        }
    }

    fn start(&mut self, ring: Box<Ring>) -> Result<()> {
        if self.state == State::Faulty {
            return Err(Error::new(ErrorKind::Io, "the queue is out of service until the daemon is started again"));
        }
        assert!(self.ring.is_none(), "a ring is started only where none runs");
        self.queue.start(&ring.vring, ring.memory.clone(), ring.record.clone())?;
        self.kicked = None;
        let kick = ring.kick.as_ref();
        if let Err(e) = kick.map_or(Ok(()), |kick| self.epoll.add(kick.as_raw_fd(), Source::Kick)) {
            let _ = self.queue.stop(&ring.vring);
            return Err(Error::io("the kick of the ring cannot be waited for", e));
        }
        self.ring = Some(ring);
        self.state = State::Running;
        Ok(())
    }

    /// Drains the queue; the number of the next available entry.
    fn stop(&mut self) -> u16 {
        let Some(ring) = self.ring.take() else { return 0 };
        if self.state == State::Running {
            self.ignore_kicks(&ring);
        }
        if self.state == State::Faulty {
            return ring.base;
        }
        self.state = State::Stopped;
        match catch_unwind(AssertUnwindSafe(|| self.queue.stop(&ring.vring))) {
            Ok(Ok(base)) => base,
            Ok(Err(e)) => {
                error!("{}: the ring did not stop cleanly: {e}", self.name);
                ring.base
            }
            Err(_) => {
                error!("{}: a fault of our own while stopping; the queue is out of service", self.name);
                self.state = State::Faulty;
                ring.base
            }
        }
    }
}
