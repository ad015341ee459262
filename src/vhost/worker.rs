//! The handle by which the control thread controls the thread of a queue (`queue_thread.rs`).
//!
//! A worker exists as long as the disk is served. The control thread sends commands through a channel, and then
//! notifies the thread's eventfd. Except at the start of the thread, every wait for a worker has a time limit, because
//! the storage may never complete the requests in flight.

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

/// Settings that all workers of a disk share.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkerSettings {
    pub(super) engine: EngineKind,
    /// Maximum time for which a queue is polled before its thread sleeps.
    pub(super) poll: Duration,
}

/// Time that the thread of a queue has to exit. The thread waits for the requests in flight, and the storage may not
/// respond.
pub(super) const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which the control thread checks whether the thread of a queue has ended.
const EXIT_CHECK_PERIOD: Duration = Duration::from_millis(2);

/// Handle of the thread of a queue. Dropping it drains the queue and ends the thread; if the requests in flight do not
/// complete in time, the thread is abandoned.
pub(super) struct Worker {
    commands: Sender<QueueCommand>,
    wakeup: Arc<Notifier>,
    thread: Option<JoinHandle<()>>,
    /// Name of the I/O engine.
    pub(super) engine: &'static str,
    /// Reply channel of a stop whose wait timed out.
    unanswered_stop: Mutex<Option<Receiver<u16>>>,
    /// Deadline for the exit of the thread. Not set until exit is requested.
    exit_deadline: OnceLock<Instant>,
}

/// Result of waiting for the thread of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WaitOutcome<T> {
    /// The thread replied.
    Answer(T),
    /// The thread did not reply in time. Requests may still be in flight.
    TimedOut,
    /// The thread has ended.
    ThreadLost,
}

impl Worker {
    /// Starts the thread of queue `index` of `device`, and returns when the lane of the thread has been created. The
    /// thread notifies `memory_lost` when an access to guest memory fails.
    ///
    /// # Errors
    /// `Io` if the thread, its lane or its event loop cannot be created, and any other error of
    /// [`Disk::lane`](crate::disk::Disk::lane).
    pub(super) fn start(
        device: &Arc<Device>,
        index: usize,
        settings: WorkerSettings,
        disk: &str,
        memory_lost: &Arc<Notifier>,
    ) -> Result<Worker> {
        let cannot = |e| Error::io("cannot start the thread of a queue", e);
        let wakeup = Arc::new(Notifier::new()?);
        let notifiers = (wakeup.clone(), memory_lost.clone());
        let (commands, receiver) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (device, name) = (device.clone(), format!("disk {disk}, queue {index}"));
        let body = move || {
            // The lane is created by the thread that uses it, since an io_uring may be limited to one thread.
            let lane = device.disk().lane(settings.engine, usize::from(device.queue_size()));
            let engine = lane.as_ref().map_or("", |lane| lane.engine().name());
            let created = lane.and_then(|lane| {
                let queue = Queue::new(device, lane, index);
                QueueThread::new(queue, receiver, notifiers, settings.poll, name)
                    .map_err(|e| Error::io("cannot create the event loop of a queue", e))
            });
            match created {
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
            wakeup,
            thread: Some(thread),
            engine: "",
            unanswered_stop: Mutex::default(),
            exit_deadline: OnceLock::new(),
        };
        worker.engine = is_ready.recv().unwrap_or_else(|_| Err(Worker::thread_lost()))?;
        Ok(worker)
    }

    /// Starts a ring on a queue that is stopped. `is_late` returns whether the wait for the thread has become too long.
    ///
    /// # Errors
    /// * `Busy` if requests of an earlier ring are still in flight, or the thread does not reply in time.
    /// * `Invalid` if the ring violates V1, or its in-flight record is not valid.
    /// * `Io` if the queue is out of service, guest memory is lost, or the kick cannot be added to epoll.
    pub(super) fn start_ring(&self, ring: ReadyRing, is_late: impl Fn() -> bool) -> Result<()> {
        if self.has_unanswered_stop() {
            let what = "the storage does not respond: requests of an earlier ring are still in flight";
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(QueueCommand::Start(Box::new(ring), reply));
        match wait_for_reply(&answer, &is_late) {
            WaitOutcome::Answer(outcome) => outcome,
            WaitOutcome::ThreadLost => Err(Worker::thread_lost()),
            WaitOutcome::TimedOut => {
                // The thread may start the ring later. Then it processes this stop command next.
                self.keep_unanswered_stop(self.stop_ring());
                Err(Error::new(
                    ErrorKind::Busy,
                    "the storage does not respond, so the thread of the queue does not reply",
                ))
            }
        }
    }

    /// Returns whether an earlier stop has no reply yet.
    pub(super) fn has_unanswered_stop(&self) -> bool {
        let mut late = self.unanswered_stop.lock().unwrap_or_else(PoisonError::into_inner);
        if late.as_ref().is_some_and(|answer| answer.try_recv() != Err(TryRecvError::Empty)) {
            *late = None;
        }
        late.is_some()
    }

    /// Keeps the reply channel of a stop whose wait timed out.
    pub(super) fn keep_unanswered_stop(&self, answer: Receiver<u16>) {
        *self.unanswered_stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// Requests the exit of the thread and does not wait. The deadline is `by` at the first call; later calls do not
    /// change it.
    pub(super) fn request_exit(&self, by: Instant) {
        self.exit_deadline.get_or_init(|| {
            self.send(QueueCommand::Exit);
            by
        });
    }

    /// Waits for the exit of the thread until its deadline. Returns false if the thread still runs, or if no exit was
    /// requested.
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

    /// Replaces the call eventfd, which signals completions to the guest.
    pub(super) fn set_call(&self, call: Option<File>) {
        self.send(QueueCommand::SetCall(call));
    }

    /// Replaces the error eventfd, which signals a broken ring to the front-end.
    pub(super) fn set_err(&self, err: Option<File>) {
        self.send(QueueCommand::SetErr(err));
    }

    /// Stops the ring. The thread pops no more requests, and replies with the index of the next available entry when
    /// the requests in flight have completed. If the thread has ended, the channel is closed without a reply.
    pub(super) fn stop_ring(&self) -> Receiver<u16> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(QueueCommand::Stop(reply));
        answer
    }

    fn send(&self, command: QueueCommand) {
        // If the thread has ended, the command is dropped together with its reply channel, and the caller detects the
        // closed channel.
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
            error!("abandoned the thread of a queue: its requests do not complete");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread of a queue panicked");
        }
    }
}

/// Waits for the reply of a thread. `is_late` returns whether the wait has become too long.
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
