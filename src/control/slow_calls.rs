//! The threads for methods that the server thread must not wait for.
//!
//! One thread carries out all methods that may wait for a file system. If a file system does not respond, the thread is
//! stuck, and further calls fail with `Busy` once its queue is full. A method that changes disks has a thread of its
//! own for each call, so that other methods are answered meanwhile.
//!
//! The server thread takes the outcomes when [`SlowCalls`] is readable. A call ends by itself, even if its client has
//! disconnected. The threads are never joined.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::context::ControlContext;
use super::methods::{Outcome, Params};
use super::rpc_error::{INTERNAL_ERROR, RpcError};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Notifier;

/// Maximum number of calls that wait for the thread.
const MAX_WAITING: usize = 256;
/// Maximum number of calls that change disks at the same time.
const MAX_CHANGES: usize = 8;

/// The function of a method.
pub(super) type MethodFn = fn(&ControlContext, Params) -> Outcome;

/// The request to which a slow call belongs: the client, the message, and the id of the request.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct CallOrigin {
    /// Number of the client.
    pub(super) client: u64,
    /// Number of the client's message.
    pub(super) message: u64,
    /// The id of the request. `None` for a notification.
    pub(super) id: Option<serde_json::Value>,
}

/// A call for the thread.
struct SlowCall {
    origin: CallOrigin,
    run: MethodFn,
    params: Params,
}

/// Passes calls to threads and collects their outcomes.
pub(super) struct SlowCalls {
    context: Arc<ControlContext>,
    calls: SyncSender<SlowCall>,
    /// Number of calls that change disks now.
    changes: Arc<AtomicUsize>,
    finished: Arc<Finished>,
}

struct Finished {
    outcomes: Mutex<Vec<(CallOrigin, Outcome)>>,
    notifier: Notifier,
}

impl Finished {
    fn add(&self, origin: CallOrigin, outcome: Outcome) {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).push((origin, outcome));
        self.notifier.notify();
    }
}

/// Counts a call that changes disks until the value is dropped.
struct ChangeSlot(Arc<AtomicUsize>);

impl ChangeSlot {
    /// Returns `None` if [`MAX_CHANGES`] calls are counted.
    fn take(changes: &Arc<AtomicUsize>) -> Option<ChangeSlot> {
        let add = |count| (count < MAX_CHANGES).then_some(count + 1);
        changes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(ChangeSlot(changes.clone()))
    }
}

impl Drop for ChangeSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl SlowCalls {
    /// Starts the thread for calls that wait for file systems. The thread ends after the value is dropped and all calls
    /// that were submitted have returned.
    ///
    /// # Errors
    /// `Io` if the thread cannot be started, or the process has no file descriptors left.
    pub(super) fn start(context: Arc<ControlContext>) -> Result<SlowCalls> {
        let (calls, receiver) = mpsc::sync_channel::<SlowCall>(MAX_WAITING);
        let finished = Arc::new(Finished { outcomes: Mutex::default(), notifier: Notifier::new()? });
        let (called, results) = (context.clone(), finished.clone());
        let body = move || {
            for call in receiver {
                results.add(call.origin, run_guarded(|| (call.run)(&called, call.params)));
            }
        };
        start_thread("control-files", body)?;
        Ok(SlowCalls { context, calls, changes: Arc::default(), finished })
    }

    /// Passes a call to the thread for calls that wait for file systems.
    ///
    /// # Errors
    /// `Busy` if too many calls wait, or the thread has ended.
    pub(super) fn submit(&self, origin: CallOrigin, run: MethodFn, params: Params) -> Result<(), RpcError> {
        self.calls.try_send(SlowCall { origin, run, params }).map_err(|_| {
            let busy = Error::new(ErrorKind::Busy, "too many requests wait for the file systems of the images");
            RpcError::from(busy).with_hint("try again later; if this lasts, a file system does not respond")
        })
    }

    /// Carries out a call that changes disks, on a thread of its own.
    ///
    /// # Errors
    /// - `Busy` if too many such calls have not ended
    /// - `Io` if the thread cannot be started
    pub(super) fn start_change(&self, origin: CallOrigin, run: MethodFn, params: Params) -> Result<(), RpcError> {
        let slot = ChangeSlot::take(&self.changes).ok_or_else(|| {
            let busy = Error::new(ErrorKind::Busy, format!("{MAX_CHANGES} changes of disks are in progress"));
            RpcError::from(busy).with_hint("try again later")
        })?;
        let (context, results) = (self.context.clone(), self.finished.clone());
        let body = move || {
            let outcome = run_guarded(|| run(&context, params));
            // A client may start another change as soon as it has the answer.
            drop(slot);
            results.add(origin, outcome);
        };
        Ok(start_thread("control-change", body)?)
    }

    /// Removes and returns the outcomes of finished calls.
    pub(super) fn take(&self) -> Vec<(CallOrigin, Outcome)> {
        self.finished.notifier.drain();
        std::mem::take(&mut *self.finished.outcomes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for SlowCalls {
    /// Returns the descriptor that is readable while outcomes wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.finished.notifier.as_fd()
    }
}

fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let cannot = |e| Error::io("cannot start a thread of the control socket", e);
    thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(cannot)
}

/// Runs a method. If the method panics, returns an error, and the thread continues.
pub(super) fn run_guarded(run: impl FnOnce() -> Outcome) -> Outcome {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(RpcError::of_form(INTERNAL_ERROR, "internal error; the log of the daemon has details")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_at_once_are_limited() {
        let changes = Arc::default();
        let mut slots: Vec<ChangeSlot> = (0..MAX_CHANGES).map(|_| ChangeSlot::take(&changes).unwrap()).collect();
        assert!(ChangeSlot::take(&changes).is_none());
        slots.pop();
        assert!(ChangeSlot::take(&changes).is_some());
    }

    #[test]
    fn a_panic_becomes_an_internal_error() {
        let outcome = run_guarded(|| panic!("a defect"));
        assert_eq!(outcome.unwrap_err().code, INTERNAL_ERROR);
    }
}
