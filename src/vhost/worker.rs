//! The control thread's end of the thread of a queue (`queue_thread.rs`).
//!
//! A worker lives as long as the disk. The control thread talks to it in commands; a command is put into the channel
//! first and then rung for. No wait for a worker is without an end: the storage may never answer the requests in flight.

use std::fs::File;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::error;

use super::queue_thread::{QueueCommand, QueueThread, ReadyRing};
use crate::device::{Device, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{EngineKind, Notifier};

/// What every worker of a disk is started with.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkerSettings {
    pub(super) engine: EngineKind,
    /// The longest time for which a queue looks for more work before it sleeps.
    pub(super) poll: Duration,
}

/// How long a thread may take to end: it waits for the requests in flight, and the storage may not answer.
pub(super) const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked whether a thread has ended.
const EXIT_CHECK_PERIOD: Duration = Duration::from_millis(2);

/// The control thread's end of a worker. Dropping it drains the queue and ends the thread, or leaves the thread behind if its
/// requests do not end in time.
pub(super) struct Worker {
    commands: Sender<QueueCommand>,
    wakeup: Arc<Notifier>,
    thread: Option<JoinHandle<()>>,
    /// What carries out its I/O, in a word for the log.
    pub(super) engine: &'static str,
    /// The answer to a stop that was not waited for any longer.
    unanswered_stop: Mutex<Option<Receiver<u16>>>,
    /// When a thread that was asked to end has to be over.
    exit_deadline: OnceLock<Instant>,
}

/// What became of a wait for the thread of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WaitOutcome<T> {
    /// Its answer.
    Answer(T),
    /// It did not answer in time. Its requests are still in flight.
    TimedOut,
    /// The thread is lost.
    ThreadLost,
}

impl Worker {
    /// Starts the thread of queue `index` of `device`; returns when its lane stands. `alarm` is rung when a page of the
    /// guest's memory cannot be had.
    ///
    /// # Errors
    /// Where the host has no room for a thread or a lane.
    pub(super) fn start(
        device: &Arc<Device>,
        index: usize,
        settings: WorkerSettings,
        disk: &str,
        alarm: &Arc<Notifier>,
    ) -> Result<Worker> {
        let cannot = |e| Error::io("cannot start the thread of a queue", e);
        let bell = Arc::new(Notifier::new()?);
        let bells = (bell.clone(), alarm.clone());
        let (commands, receiver) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (device, name) = (device.clone(), format!("disk {disk}, queue {index}"));
        let body = move || {
            // The lane is made by the thread that uses it: a ring of the host may belong to one thread.
            let lane = device.disk().lane(settings.engine, usize::from(device.queue_size()));
            let engine = lane.as_ref().map_or("", |lane| lane.engine().name());
            let made = lane.and_then(|lane| {
                let queue = Queue::new(device, lane, index);
                QueueThread::new(queue, receiver, bells, settings.poll, name)
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
        let mut worker = Worker {
            commands,
            wakeup: bell,
            thread: Some(thread),
            engine: "",
            unanswered_stop: Mutex::default(),
            exit_deadline: OnceLock::new(),
        };
        worker.engine = is_ready.recv().unwrap_or_else(|_| Err(Worker::thread_lost()))?;
        Ok(worker)
    }

    /// Runs a ring. The queue must be stopped. `is_late` returns whether the wait has become too long.
    ///
    /// # Errors
    /// If the ring cannot be run, the queue is broken for good, or requests of an earlier ring are still in flight.
    pub(super) fn start_ring(&self, ring: ReadyRing, is_late: impl Fn() -> bool) -> Result<()> {
        if self.has_unanswered_stop() {
            let what = "requests of an earlier ring are still in flight: the storage does not answer";
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(QueueCommand::Start(Box::new(ring), reply));
        match wait_for_reply(&answer, &is_late) {
            WaitOutcome::Answer(outcome) => outcome,
            WaitOutcome::ThreadLost => Err(Worker::thread_lost()),
            WaitOutcome::TimedOut => {
                // If it starts the ring after all, it stops it right after.
                self.keep_unanswered_stop(self.stop_ring());
                Err(Error::new(ErrorKind::Busy, "the thread of the queue does not answer: the storage does not"))
            }
        }
    }

    /// Whether an earlier stop has no answer yet.
    pub(super) fn has_unanswered_stop(&self) -> bool {
        let mut late = self.unanswered_stop.lock().unwrap_or_else(PoisonError::into_inner);
        if late.as_ref().is_some_and(|answer| answer.try_recv() != Err(TryRecvError::Empty)) {
            *late = None;
        }
        late.is_some()
    }

    /// Remembers a stop that is not waited for any longer.
    pub(super) fn keep_unanswered_stop(&self, answer: Receiver<u16>) {
        *self.unanswered_stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// Asks the thread to end, without waiting for it. It has time until `by`, or as long as an earlier call gave it.
    pub(super) fn request_exit(&self, by: Instant) {
        self.exit_deadline.get_or_init(|| {
            self.send(QueueCommand::Exit);
            by
        });
    }

    /// Waits for a thread that was asked to end; false if it has not ended in its time.
    pub(super) fn wait_for_exit(&self) -> bool {
        let (Some(thread), Some(by)) = (&self.thread, self.exit_deadline.get()) else { return false };
        while !thread.is_finished() {
            if Instant::now() >= *by {
                return false;
            }
            thread::sleep(EXIT_CHECK_PERIOD);
        }
        true
    }

    /// Puts another event counter in the place of the one by which the guest learns of completions.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.send(QueueCommand::SetCall(call));
    }

    /// The same for the one by which the front-end learns of a broken ring.
    pub(super) fn set_err(&self, err: Option<File>) {
        self.send(QueueCommand::SetErr(err));
    }

    /// Stops the ring: takes no more requests, and the answer comes when those taken are complete. The answer is the
    /// number of the next available entry; none where the thread is lost.
    pub(super) fn stop_ring(&self) -> Receiver<u16> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(QueueCommand::Stop(reply));
        answer
    }

    fn send(&self, command: QueueCommand) {
        // A thread that is gone drops the command, and with it the sender of its answer: the caller sees that.
        let _ = self.commands.send(command);
        self.wakeup.notify();
    }

    fn thread_lost() -> Error {
        Error::new(ErrorKind::Io, "the thread of the queue has ended; this queue is out of service")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.request_exit(Instant::now() + EXIT_TIMEOUT);
        if !self.wait_for_exit() {
            error!("the thread of a queue is left behind: its requests do not end");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread of a queue ended by a fault");
        }
    }
}

/// Waits for an answer of a thread; `is_late` returns whether the wait has become too long.
pub(super) fn wait_for_reply<T>(answer: &Receiver<T>, is_late: impl Fn() -> bool) -> WaitOutcome<T> {
    loop {
        match answer.recv_timeout(Duration::from_millis(20)) {
            Ok(answer) => return WaitOutcome::Answer(answer),
            Err(RecvTimeoutError::Disconnected) => return WaitOutcome::ThreadLost,
            Err(RecvTimeoutError::Timeout) if is_late() => return WaitOutcome::TimedOut,
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
