//! The thread of one queue, the only one that accesses the queue's ring while the ring runs.
//!
//! The thread waits in one edge-triggered `epoll_wait` for commands, the kick of the ring, and the descriptors of the
//! lane. An edge-triggered eventfd reports each write to it although it is never read. So a kick costs no system call
//! in addition, and a front-end that reads its own kick eventfd cannot block the thread.

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

/// Everything that the thread needs to run a ring.
pub(super) struct ReadyRing {
    pub(super) vring: Vring,
    pub(super) memory: Arc<SharedMemory>,
    /// The in-flight record, in memory that survives a kill of the daemon.
    pub(super) record: Option<InFlightRecord>,
    /// The kick eventfd, by which the guest announces requests. `None` if the ring must be polled.
    pub(super) kick: Option<Arc<File>>,
    /// The error eventfd, which the thread writes when the ring breaks.
    pub(super) err: Option<File>,
    /// Index of the first available entry to pop.
    pub(super) base: u16,
    /// The check that guest memory is shared.
    pub(super) sharing: SharingCheck,
}

/// A command from the control thread.
pub(super) enum QueueCommand {
    Start(Box<ReadyRing>, SyncSender<Result<()>>),
    SetCall(Option<File>),
    SetErr(Option<File>),
    Stop(SyncSender<u16>),
    Exit,
}

/// State of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum QueueState {
    /// The queue has no ring.
    Stopped,
    Running,
    /// The ring is out of service: the driver broke a rule, memory is lost, or the engine failed. No more requests are
    /// popped, and those in flight complete unless the engine failed. Stopping the ring ends this state.
    Broken,
    /// The thread panicked while it served or stopped a ring, or the lane failed while there was no ring. The queue is
    /// not used any more.
    Failed,
}

/// Interval of the lane's ticks. A tick retries stalled writes and starts background commits.
const TICK: Duration = Duration::from_secs(1);
/// Interval at which a ring without a kick is polled.
const NO_KICK_POLL: Duration = Duration::from_millis(1);

/// The state of the thread of one queue.
pub(super) struct QueueThread {
    queue: Queue,
    ring: Option<Box<ReadyRing>>,
    /// Time at which a kick of the ring first woke the thread.
    first_kick: Option<Instant>,
    state: QueueState,
    commands: Receiver<QueueCommand>,
    /// Notified when an access to guest memory fails.
    memory_lost: Arc<Notifier>,
    epoll: Epoll,
    adaptive_poll: AdaptivePoll,
    name: String,
}

impl QueueThread {
    /// Creates the thread's state for `queue`, without a ring. The first notifier announces commands to the thread. The
    /// thread notifies the second one when an access to guest memory fails.
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

    /// Serves the queue until [`QueueCommand::Exit`].
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
            let result = self.serve();
            let now = Instant::now();
            if now >= tick_at {
                tick_at = now + TICK;
                // The lane of a broken ring still ticks, since it may lead a stalled commit.
                if matches!(self.state, QueueState::Running | QueueState::Broken) {
                    self.queue.lane().tick();
                    self.check_sharing(now);
                    continue; // the next call of `serve` continues the work that the tick started
                }
            }
            match result {
                ServeResult::More => self.adaptive_poll.record_work(now),
                ServeResult::Idle if self.state == QueueState::Running && self.adaptive_poll.should_poll(now) => {
                    std::hint::spin_loop()
                }
                ServeResult::Idle if self.enable_kicks() => {}
                ServeResult::Idle | ServeResult::Broken => self.sleep(),
            }
        }
    }

    /// Sleeps until an event, but at most for [`TICK`], or for [`NO_KICK_POLL`] if the ring must be polled.
    fn sleep(&mut self) {
        let polled = self.state == QueueState::Running && self.ring.as_ref().is_some_and(|ring| ring.kick.is_none());
        if self.epoll.wait(if polled { NO_KICK_POLL } else { TICK }) {
            self.first_kick.get_or_insert_with(Instant::now);
        }
    }

    /// Logs a warning if the guest sends kicks but none of its stores to the rings arrive.
    fn check_sharing(&self, now: Instant) {
        let Some(ring) = &self.ring else { return };
        if ring.sharing.should_warn(self.first_kick, now, || self.queue.is_unused()) {
            warn!(
                "{}: the guest sends kicks, but its rings are blank. The front-end does not seem to share the guest's \
                 memory, so the guest's requests never complete. {SHARE_HINT}",
                self.name
            );
        }
    }

    /// Enables kicks, before the thread sleeps. Returns whether requests arrived in the meantime.
    fn enable_kicks(&mut self) -> bool {
        let (QueueState::Running, Some(ring)) = (self.state, self.ring.as_ref()) else { return false };
        self.queue.enable_kicks(&ring.vring)
    }

    /// Serves one batch of the ring, if there is a ring that runs or is broken.
    fn serve(&mut self) -> ServeResult {
        let (QueueState::Running | QueueState::Broken, Some(ring)) = (self.state, self.ring.as_ref()) else {
            self.poll_without_ring();
            return ServeResult::Idle;
        };
        let result = match catch_unwind(AssertUnwindSafe(|| self.queue.serve(&ring.vring))) {
            Ok(Ok(result)) => result,
            Ok(Err(e)) => {
                error!("{}: cannot serve the ring: {e}", self.name);
                ServeResult::Broken
            }
            Err(_) => {
                error!("{}: panic while serving; the queue is out of service", self.name);
                self.fail();
                self.report_broken();
                return ServeResult::Broken;
            }
        };
        if matches!(result, ServeResult::Broken) && self.state == QueueState::Running {
            if self.queue.is_memory_lost() {
                self.memory_lost.notify();
            } else {
                warn!("{}: the ring is broken; no requests are taken until the driver resets the device", self.name);
            }
            self.state = QueueState::Broken;
            self.report_broken();
        }
        result
    }

    /// Lets the lane of a queue without a ring handle its events: a change of the disk's version waits for all lanes.
    fn poll_without_ring(&mut self) {
        if self.state == QueueState::Stopped {
            let polled = catch_unwind(AssertUnwindSafe(|| self.queue.poll_without_ring()));
            if !matches!(polled, Ok(Ok(()))) {
                error!("{}: the I/O engine failed; the queue is out of service", self.name);
                self.fail();
            }
        }
    }

    /// Takes the queue out of service. Other queues, commits and changes of the disk do not wait for it any more.
    fn fail(&mut self) {
        self.state = QueueState::Failed;
        if catch_unwind(AssertUnwindSafe(|| self.queue.lane().retire())).is_err() {
            error!("{}: panic while the queue is taken out of service", self.name);
        }
    }

    /// Removes the kick from epoll, and writes the error eventfd if there is one.
    fn report_broken(&self) {
        let Some(ring) = &self.ring else { return };
        self.unwatch_kick(ring);
        if let Some(mut err) = ring.err.as_ref()
            && let Err(e) = err.write(1u64.as_bytes())
        {
            warn!("{}: cannot write the error eventfd of the broken ring: {e}", self.name);
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
                    // Earlier completions were signalled on the old eventfd, and the guest may have missed them.
                    if let Err(e) = ring.vring.signal_used_queue() {
                        warn!("{}: cannot write the call eventfd: {e}", self.name);
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
            QueueCommand::Exit => unreachable!("handled by run"),
        }
    }

    fn start(&mut self, ring: Box<ReadyRing>) -> Result<()> {
        if self.state == QueueState::Failed {
            return Err(Error::new(ErrorKind::Io, "the queue is out of service until the daemon is started again"));
        }
        assert!(self.ring.is_none(), "a ring is started while another runs");
        self.queue.start(&ring.vring, ring.memory.clone(), ring.record.clone())?;
        self.first_kick = None;
        let kick = ring.kick.as_ref();
        if let Err(e) = kick.map_or(Ok(()), |kick| self.epoll.add(kick.as_fd(), WakeSource::Kick)) {
            let _ = self.queue.stop(&ring.vring);
            return Err(Error::io("cannot wait for the kick of the ring", e));
        }
        self.ring = Some(ring);
        self.state = QueueState::Running;
        Ok(())
    }

    /// Stops the ring and drains the queue. Returns the index of the next available entry: 0 if there is no ring, and
    /// the index at which the ring started if the queue cannot be drained.
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
                error!("{}: panic while stopping; the queue is out of service", self.name);
                self.fail();
                ring.base
            }
        }
    }
}
