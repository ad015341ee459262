//! The thread for methods that may wait for a file system.
//!
//! The server thread passes calls to this thread, and takes the outcomes when [`SlowCalls`] is readable. If a file
//! system does not respond, the thread is stuck, and further calls fail with `Busy` once its queue is full. The thread
//! is never joined.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
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

/// The function of a method.
pub(super) type MethodFn = fn(&ControlContext, Params) -> Outcome;

/// The request that a slow call belongs to: the client, the message, and the id of the request.
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

/// Passes calls to the thread and collects their outcomes.
pub(super) struct SlowCalls {
    calls: SyncSender<SlowCall>,
    finished: Arc<Finished>,
}

struct Finished {
    outcomes: Mutex<Vec<(CallOrigin, Outcome)>>,
    notifier: Notifier,
}

impl SlowCalls {
    /// Starts the thread. The thread ends after the value is dropped and all calls that were submitted have returned.
    ///
    /// # Errors
    /// `Io` if the thread cannot be started, or the process has no file descriptors left.
    pub(super) fn start(context: Arc<ControlContext>) -> Result<SlowCalls> {
        let (calls, receiver) = mpsc::sync_channel::<SlowCall>(MAX_WAITING);
        let finished = Arc::new(Finished { outcomes: Mutex::default(), notifier: Notifier::new()? });
        let results = finished.clone();
        let body = move || {
            for call in receiver {
                let outcome = run_guarded(|| (call.run)(&context, call.params));
                results.outcomes.lock().unwrap_or_else(PoisonError::into_inner).push((call.origin, outcome));
                results.notifier.notify();
            }
        };
        let cannot = |e| Error::io("cannot start a thread of the control socket", e);
        thread::Builder::new().name("control-files".into()).spawn(body).map_err(cannot)?;
        Ok(SlowCalls { calls, finished })
    }

    /// Passes a call to the thread.
    ///
    /// # Errors
    /// `Busy` if too many calls wait, or the thread has ended.
    pub(super) fn submit(&self, origin: CallOrigin, run: MethodFn, params: Params) -> Result<(), RpcError> {
        self.calls.try_send(SlowCall { origin, run, params }).map_err(|_| {
            let busy = Error::new(ErrorKind::Busy, "too many requests wait for the file systems of the images");
            RpcError::from(busy).with_hint("try again later; if this lasts, a file system does not respond")
        })
    }

    /// Removes the outcomes of finished calls.
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

/// Runs a method. A panic becomes an error of the answer, and the thread continues.
pub(super) fn run_guarded(run: impl FnOnce() -> Outcome) -> Outcome {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(RpcError::of_form(INTERNAL_ERROR, "internal error; the log of the daemon has details")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_internal_error() {
        let outcome = run_guarded(|| panic!("a defect"));
        assert_eq!(outcome.unwrap_err().code, INTERNAL_ERROR);
    }
}
