//! The thread of one queue: it alone touches the queue's ring while the ring runs.
//!
//! A worker lives as long as the disk. The control thread talks to it in commands; a command is put into the channel
//! first and then rung for. All waiting is one edge-triggered `epoll_wait` over the bell, the kick of the ring and
//! what the lane wakes by. An edge-triggered event counter reports each write to it without ever being read, so a
//! kick costs no call of its own; and a front-end that reads its own kick cannot make the thread wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, warn};
use vhost_user_backend::VringT;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use zerocopy::IntoBytes;

use super::edges::Epoll;
use super::patience::Patience;
use crate::device::{Device, Queue, Record, SharedMemory, Turn, Vring};
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
    pub(super) memory: Arc<SharedMemory>,
    /// What is in flight, where a kill does not reach.
    pub(super) record: Option<Record>,
    pub(super) kick: Arc<File>,
    /// Told when the ring breaks.
    pub(super) err: Option<File>,
    /// Where it starts: the number of the next available entry.
    pub(super) base: u16,
}

enum Command {
    Start(Box<Ring>, SyncSender<Result<()>>),
    SetCall(Option<File>),
    SetErr(Option<File>),
    Stop(SyncSender<u16>),
    Exit,
}

/// How long a thread may take to end: it waits for the requests in flight, and the storage may not answer.
const END: Duration = Duration::from_secs(5);
/// How often it is looked whether a thread has ended.
const LOOK: Duration = Duration::from_millis(2);

/// The control thread's end of a worker. Dropping it drains the queue and ends the thread, or leaves the thread behind if its
/// requests do not end in time.
pub(super) struct Worker {
    commands: Sender<Command>,
    bell: EventNotifier,
    thread: Option<JoinHandle<()>>,
    /// The answer to a stop that was not waited for any longer.
    late: Mutex<Option<Receiver<u16>>>,
    /// When the thread was asked to end.
    asked: OnceLock<Instant>,
}

/// What became of a wait for the thread of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waited<T> {
    /// Its answer.
    Answer(T),
    /// It did not answer in time. Its requests are still in flight.
    Late,
    /// The thread is lost.
    Lost,
}

impl Worker {
    /// Starts the thread of queue `index` of `device`; returns when its lane stands. `alarm` is rung when a page of the guest's memory cannot be had.
    ///
    /// # Errors
    /// Where the host has no room for a thread or a lane.
    pub(super) fn start(
        device: &Arc<Device>,
        index: usize,
        settings: Settings,
        disk: &str,
        alarm: EventNotifier,
    ) -> Result<Worker> {
        let cannot = |e| Error::io("cannot start the thread of a queue", e);
        let (bell_end, bell) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).map_err(cannot)?;
        let (commands, receiver) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (device, name) = (device.clone(), format!("disk {disk}, queue {index}"));
        let body = move || {
            // The lane is made by the thread that uses it: a ring of the host may belong to one thread.
            let lane = device.disk().lane(settings.engine, usize::from(device.queue_size()));
            let made = lane.and_then(|lane| {
                let queue = Queue::new(device, lane, index);
                QueueThread::new(queue, receiver, (bell_end, alarm), settings.poll, name)
                    .map_err(|e| Error::io("cannot make the event loop of a queue", e))
            });
            match made {
                Ok(mut thread) => {
                    let _ = ready.send(Ok(()));
                    thread.run();
                }
                Err(e) => drop(ready.send(Err(e))),
            }
        };
        let thread = thread::Builder::new().name(format!("queue-{index}")).spawn(body).map_err(cannot)?;
        let worker = Worker {
            commands,
            bell,
            thread: Some(thread),
            late: Mutex::default(),
            asked: OnceLock::new(),
        };
        is_ready.recv().unwrap_or_else(|_| Err(Worker::lost()))?;
        Ok(worker)
    }

    /// Runs a ring. The queue must be stopped. `is_late` returns whether a wait of so long is too long.
    ///
    /// # Errors
    /// If the ring cannot be run, the queue is broken for good, or requests of an earlier ring are still in flight.
    pub(super) fn start_ring(&self, ring: Ring, is_late: impl Fn(Duration) -> bool) -> Result<()> {
        if self.is_late() {
            let what = "requests of an earlier ring are still in flight: the storage does not answer";
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Start(Box::new(ring), reply));
        match wait_for(&answer, &is_late) {
            Waited::Answer(outcome) => outcome,
            Waited::Lost => Err(Worker::lost()),
            Waited::Late => {
                // If it starts the ring after all, it stops it right after.
                self.keep_late(self.stop_ring());
                Err(Error::new(ErrorKind::Busy, "the thread of the queue does not answer: the storage does not"))
            }
        }
    }

    /// Whether an earlier stop has no answer yet.
    pub(super) fn is_late(&self) -> bool {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if late.as_ref().is_some_and(|answer| answer.try_recv() != Err(TryRecvError::Empty)) {
            *late = None;
        }
        late.is_some()
    }

    /// Remembers a stop that is not waited for any longer.
    pub(super) fn keep_late(&self, answer: Receiver<u16>) {
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// Asks the thread to end, without waiting for it.
    pub(super) fn ask_to_end(&self) {
        self.asked.get_or_init(|| {
            self.send(Command::Exit);
            Instant::now()
        });
    }

    /// Waits until the thread has ended, or has had its time since it was asked to; whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ask_to_end();
        let time = if self.is_late() { Duration::ZERO } else { END };
        let Some(thread) = &self.thread else { return true };
        while !thread.is_finished() {
            if self.asked.get().is_none_or(|asked| asked.elapsed() >= time) {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
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
        let ended = self.has_ended();
        match self.thread.take() {
            Some(thread) if ended && thread.join().is_err() => error!("the thread of a queue ended by a fault"),
            Some(_) if !ended => error!("the thread of a queue is left behind: its requests do not end"),
            _ => {}
        }
    }
}

/// Waits for an answer of a thread; `is_late` returns whether a wait of so long is too long.
pub(super) fn wait_for<T>(answer: &Receiver<T>, is_late: impl Fn(Duration) -> bool) -> Waited<T> {
    let begun = Instant::now();
    loop {
        match answer.recv_timeout(Duration::from_millis(20)) {
            Ok(answer) => return Waited::Answer(answer),
            Err(RecvTimeoutError::Disconnected) => return Waited::Lost,
            Err(RecvTimeoutError::Timeout) if is_late(begun.elapsed()) => return Waited::Late,
            Err(RecvTimeoutError::Timeout) => {}
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

struct QueueThread {
    queue: Queue,
    ring: Option<Box<Ring>>,
    state: State,
    commands: Receiver<Command>,
    /// Never read; kept so that ringing it stays possible.
    _bell: EventConsumer,
    /// Rung when a page of the guest's memory cannot be had.
    alarm: EventNotifier,
    epoll: Epoll,
    patience: Patience,
    name: String,
}

impl QueueThread {
    fn new(
        queue: Queue,
        commands: Receiver<Command>,
        (bell, alarm): (EventConsumer, EventNotifier),
        poll: Duration,
        name: String,
    ) -> io::Result<QueueThread> {
        let epoll = Epoll::new()?;
        epoll.add(bell.as_fd())?;
        for fd in queue.wake_fds().into_iter().flatten() {
            epoll.add(fd)?;
        }
        Ok(QueueThread {
            queue,
            ring: None,
            state: State::Stopped,
            commands,
            _bell: bell,
            alarm,
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
                if self.state == State::Running {
                    self.queue.lane().tick();
                    continue; // what it began goes on in the next turn
                }
            }
            match turn {
                Turn::More => self.patience.busy(now),
                Turn::Idle if self.state == State::Running && self.patience.waits(now) => std::hint::spin_loop(),
                Turn::Idle if self.rests() => {}
                Turn::Idle | Turn::Broken => self.epoll.wait(TICK),
            }
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
        if self.queue.is_memory_lost() && self.state == State::Running {
            // Rings and requests may be zeros of ours by now: nothing more may follow from them.
            error!(
                "{}: a page of the guest's memory cannot be had: the front-end has taken it back, or the host has none left; \
                 the disk is out of service until a front-end connects again",
                self.name
            );
            self.state = State::Broken;
            self.tell_broken();
            if let Err(e) = self.alarm.notify()
                && e.kind() != io::ErrorKind::WouldBlock
            {
                error!("{}: the control thread cannot be woken: {e}", self.name);
            }
            return Turn::Broken;
        }
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
        self.epoll.remove(ring.kick.as_fd());
        if let Some(mut err) = ring.err.as_ref()
            && let Err(e) = err.write(1u64.as_bytes())
        {
            warn!("{}: the front-end cannot be told of the broken ring: {e}", self.name);
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
        if let Err(e) = self.epoll.add(ring.kick.as_fd()) {
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
            self.epoll.remove(ring.kick.as_fd());
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
