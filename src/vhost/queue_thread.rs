//! The thread of one queue: it alone touches the queue's ring while the ring runs.
//!
//! All waiting is one edge-triggered `epoll_wait` over the bell, the kick of the ring and what the lane wakes by. An
//! edge-triggered event counter reports each write to it without ever being read, so a kick costs no call of its own; and a
//! front-end that reads its own kick cannot make the thread wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use log::{error, warn};
use vhost_user_backend::VringT;
use zerocopy::IntoBytes;

use super::adaptive_poll::AdaptivePoll;
use super::epoll::{Epoll, WakeSource};
use super::memory_sharing::{SHARE_HINT, SharingCheck};
use crate::device::{InFlightRecord, Queue, ServeResult, SharedMemory, Vring};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Notifier;

/// A ring that is ready to run.
pub(super) struct ReadyRing {
    pub(super) vring: Vring,
    pub(super) memory: Arc<SharedMemory>,
    /// What is in flight, where a kill does not reach.
    pub(super) record: Option<InFlightRecord>,
    /// By what the guest announces requests; none if the ring is to be polled.
    pub(super) kick: Option<Arc<File>>,
    /// Told when the ring breaks.
    pub(super) err: Option<File>,
    /// Where it starts: the number of the next available entry.
    pub(super) base: u16,
    /// What is known about the guest's memory.
    pub(super) sharing: SharingCheck,
}

/// What the control thread asks of the thread of a queue.
pub(super) enum QueueCommand {
    Start(Box<ReadyRing>, SyncSender<Result<()>>),
    SetCall(Option<File>),
    SetErr(Option<File>),
    Stop(SyncSender<u16>),
    Exit,
}

/// How the queue stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum QueueState {
    /// No ring.
    Stopped,
    Running,
    /// The ring broke a rule: nothing more is taken from it, what was taken is completed. Mended by the next start.
    Broken,
    /// We broke a rule of our own: the queue is not touched again.
    Failed,
}

/// Between two ticks of a lane: what waits for time to pass (a full disk, a commit in the background) goes on then.
const TICK: Duration = Duration::from_secs(1);
/// How often a ring without a kick is looked at.
const NO_KICK_POLL: Duration = Duration::from_millis(1);

/// See the top of this file.
pub(super) struct QueueThread {
    queue: Queue,
    ring: Option<Box<ReadyRing>>,
    /// When the ring had its first kick.
    first_kick: Option<Instant>,
    state: QueueState,
    commands: Receiver<QueueCommand>,
    /// Rung when a page of the guest's memory cannot be had.
    memory_lost: Arc<Notifier>,
    epoll: Epoll,
    adaptive_poll: AdaptivePoll,
    name: String,
}

impl QueueThread {
    /// The thread of `queue`, stopped. `alarm` is rung when a page of the guest's memory cannot be had.
    pub(super) fn new(
        queue: Queue,
        commands: Receiver<QueueCommand>,
        (wakeup, memory_lost): (Arc<Notifier>, Arc<Notifier>),
        poll: Duration,
        name: String,
    ) -> io::Result<QueueThread> {
        let epoll = Epoll::new()?;
        epoll.add(wakeup.as_fd(), WakeSource::Internal)?;
        for fd in queue.wake_fds().into_iter().flatten() {
            epoll.add(fd, WakeSource::Internal)?;
        }
        Ok(QueueThread {
            queue,
            ring: None,
            first_kick: None,
            state: QueueState::Stopped,
            commands,
            memory_lost,
            epoll,
            adaptive_poll: AdaptivePoll::new(poll),
            name,
        })
    }

    /// Serves the queue until it is asked to end.
    pub(super) fn run(&mut self) {
        let mut tick_at = Instant::now() + TICK;
        loop {
            match self.commands.try_recv() {
                Ok(QueueCommand::Exit) | Err(TryRecvError::Disconnected) => {
                    self.stop();
                    return;
                }
                Ok(command) => {
                    self.execute(command);
                    continue;
                }
                Err(TryRecvError::Empty) => {}
            }
            let turn = self.serve();
            let now = Instant::now();
            if now >= tick_at {
                tick_at = now + TICK;
                // A broken ring's lane may lead a commit that is held.
                if matches!(self.state, QueueState::Running | QueueState::Broken) {
                    self.queue.lane().tick();
                    self.check_sharing(now);
                    continue; // what it began goes on in the next turn
                }
            }
            match turn {
                ServeResult::More => self.adaptive_poll.record_work(now),
                ServeResult::Idle if self.state == QueueState::Running && self.adaptive_poll.should_poll(now) => {
                    std::hint::spin_loop()
                }
                ServeResult::Idle if self.enable_kicks() => {}
                ServeResult::Idle | ServeResult::Broken => self.sleep(),
            }
        }
    }

    /// Sleeps until there may be work.
    fn sleep(&mut self) {
        let polled = self.state == QueueState::Running && self.ring.as_ref().is_some_and(|ring| ring.kick.is_none());
        if self.epoll.wait(if polled { NO_KICK_POLL } else { TICK }) {
            self.first_kick.get_or_insert_with(Instant::now);
        }
    }

    /// Warns if the guest kicks and nothing of what it writes arrives.
    fn check_sharing(&self, now: Instant) {
        let Some(ring) = &self.ring else { return };
        if ring.sharing.should_warn(self.first_kick, now, || self.queue.is_unused()) {
            warn!(
                "{}: the guest announces requests, but its rings are blank: the front-end seems not to share the guest's \
                 memory, and the guest will wait for ever. {SHARE_HINT}",
                self.name
            );
        }
    }

    /// Asks for kicks before the thread sleeps; true where there is work after all.
    fn enable_kicks(&mut self) -> bool {
        let (QueueState::Running, Some(ring)) = (self.state, self.ring.as_ref()) else { return false };
        self.queue.enable_kicks(&ring.vring)
    }

    /// One turn of the ring, if it runs.
    fn serve(&mut self) -> ServeResult {
        let (QueueState::Running | QueueState::Broken, Some(ring)) = (self.state, self.ring.as_ref()) else {
            return ServeResult::Idle;
        };
        let turn = match catch_unwind(AssertUnwindSafe(|| self.queue.serve(&ring.vring))) {
            Ok(Ok(turn)) => turn,
            Ok(Err(e)) => {
                error!("{}: the ring cannot be served: {e}", self.name);
                ServeResult::Broken
            }
            Err(_) => {
                error!("{}: a fault of our own while serving; the queue is out of service", self.name);
                self.state = QueueState::Failed;
                self.report_broken();
                return ServeResult::Broken;
            }
        };
        if matches!(turn, ServeResult::Broken) && self.state == QueueState::Running {
            if self.queue.is_memory_lost() {
                self.memory_lost.notify();
            } else {
                warn!("{}: the ring is broken; nothing more is taken from it until it is set up again", self.name);
            }
            self.state = QueueState::Broken;
            self.report_broken();
        }
        turn
    }

    /// Stops listening to the kick and tells the front-end, if it wants to know.
    fn report_broken(&self) {
        let Some(ring) = &self.ring else { return };
        self.unwatch_kick(ring);
        if let Some(mut err) = ring.err.as_ref()
            && let Err(e) = err.write(1u64.as_bytes())
        {
            warn!("{}: the front-end cannot be told of the broken ring: {e}", self.name);
        }
    }

    fn unwatch_kick(&self, ring: &ReadyRing) {
        if let Some(kick) = &ring.kick {
            self.epoll.remove(kick.as_fd());
        }
    }

    fn execute(&mut self, command: QueueCommand) {
        match command {
            QueueCommand::Start(ring, reply) => {
                let started = self.start(ring);
                let _ = reply.send(started);
            }
            QueueCommand::SetCall(call) => {
                if matches!(self.state, QueueState::Running | QueueState::Broken)
                    && let Some(ring) = &self.ring
                {
                    ring.vring.set_call(call);
                    // What completed before the change was told to the old counter, and may have been missed.
                    if let Err(e) = ring.vring.signal_used_queue() {
                        warn!("{}: the guest cannot be told of completions: {e}", self.name);
                    }
                }
            }
            QueueCommand::SetErr(err) => {
                if let Some(ring) = &mut self.ring {
                    ring.err = err;
                }
            }
            QueueCommand::Stop(reply) => {
                let base = self.stop();
                let _ = reply.send(base);
            }
            QueueCommand::Exit => unreachable!("the loop ends before it"),
        }
    }

    fn start(&mut self, ring: Box<ReadyRing>) -> Result<()> {
        if self.state == QueueState::Failed {
            return Err(Error::new(ErrorKind::Io, "the queue is out of service until the daemon is started again"));
        }
        assert!(self.ring.is_none(), "a ring is started only where none runs");
        self.queue.start(&ring.vring, ring.memory.clone(), ring.record.clone())?;
        self.first_kick = None;
        let kick = ring.kick.as_ref();
        if let Err(e) = kick.map_or(Ok(()), |kick| self.epoll.add(kick.as_fd(), WakeSource::Kick)) {
            let _ = self.queue.stop(&ring.vring);
            return Err(Error::io("the kick of the ring cannot be waited for", e));
        }
        self.ring = Some(ring);
        self.state = QueueState::Running;
        Ok(())
    }

    /// Drains the queue; the number of the next available entry.
    fn stop(&mut self) -> u16 {
        let Some(ring) = self.ring.take() else { return 0 };
        if self.state == QueueState::Running {
            self.unwatch_kick(&ring);
        }
        if self.state == QueueState::Failed {
            return ring.base;
        }
        self.state = QueueState::Stopped;
        match catch_unwind(AssertUnwindSafe(|| self.queue.stop(&ring.vring))) {
            Ok(Ok(base)) => base,
            Ok(Err(e)) => {
                error!("{}: the ring did not stop cleanly: {e}", self.name);
                ring.base
            }
            Err(_) => {
                error!("{}: a fault of our own while stopping; the queue is out of service", self.name);
                self.state = QueueState::Failed;
                ring.base
            }
        }
    }
}
