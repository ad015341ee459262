//! Mailboxes: events are posted to a lane, or to a thread that waits for a commit, and wake the receiver by an eventfd.
//! A read posts no event.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::storage::{FileSlot, Notifier};
use crate::units::SectorRange;

/// An event for a lane, or for a thread that waits for a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaneEvent {
    /// A commit round ended.
    Committed {
        /// Number of the round.
        round: u64,
        /// Whether the commit succeeded.
        ok: bool,
    },
    /// The receiver was removed from a commit round that cannot end or begin now. Either the file system is full, or a
    /// snapshot that holds the rounds repeats a step that fails, and the receiver must not wait.
    LeftRound {
        /// Number of the round.
        round: u64,
    },
    /// The running commit round has no leader. The first waiter that claims the lead has to lead the round.
    Leaderless,
    /// A step of growth ended.
    GrowthEnded(GrowthResult),
    /// The lane holds the punch lock of the disk.
    PunchLockGranted,
    /// Register the new file of the change with this number with the engine and the page cache.
    Register(u64),
    /// Remove the file in a slot from the engine and the page cache. No operation uses the slot.
    Unregister(FileSlot),
    /// Hold the writes of a range of the disk until the gate opens.
    Hold(SectorRange),
    /// Plan with the current version of the disk from now on.
    Adopt,
    /// Plan the writes that were held.
    Open,
}

/// The result of a step of growth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrowthResult {
    /// The file has room for new blocks.
    Grown,
    /// The file system is full.
    NoSpace,
    /// The step failed for another reason.
    Failed,
}

/// The events of one lane or waiting thread.
#[derive(Debug)]
pub struct Mailbox {
    events: Mutex<Vec<LaneEvent>>,
    notified: AtomicBool,
    event_fd: Notifier,
}

impl Mailbox {
    /// Creates an empty mailbox.
    ///
    /// # Errors
    /// `Io` if the process has no file descriptors left.
    pub fn new() -> Result<Mailbox> {
        Ok(Mailbox { events: Mutex::default(), notified: AtomicBool::new(false), event_fd: Notifier::new()? })
    }

    /// Adds an event and wakes the receiver.
    pub fn post(&self, event: LaneEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        if !self.notified.swap(true, Ordering::SeqCst) {
            self.event_fd.notify();
        }
    }

    /// Takes all events. Makes no system call if no event was posted since the last call began.
    pub fn take(&self) -> Vec<LaneEvent> {
        // A load is cheaper than a swap, and mailboxes are nearly always empty. No event is lost if the load still
        // returns false: `post` sets the flag before it notifies, and the descriptor stays readable until a later
        // `take` finds the flag set and drains the descriptor.
        if !self.notified.load(Ordering::Acquire) || !self.notified.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        self.event_fd.drain();
        std::mem::take(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until there are events or a signal arrives. Does not take them.
    pub fn sleep(&self) {
        self.event_fd.wait();
    }

    /// Waits as [`Mailbox::sleep`] does, but at most for `at_most`.
    pub(super) fn sleep_at_most(&self, at_most: Duration) {
        self.event_fd.wait_at_most(at_most);
    }

    /// Waits until there are events, and takes them.
    pub fn wait(&self) -> Vec<LaneEvent> {
        loop {
            let events = self.take();
            if !events.is_empty() {
                return events;
            }
            self.sleep();
        }
    }

    /// A descriptor that is readable (level-triggered) while there are events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event_fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn events_arrive_from_another_thread() {
        let to = Arc::new(Mailbox::new().unwrap());
        assert!(to.take().is_empty());
        let from = to.clone();
        let thread =
            std::thread::spawn(move || (0..100).for_each(|_| from.post(LaneEvent::GrowthEnded(GrowthResult::Grown))));
        let mut got = 0;
        while got < 100 {
            got += to.wait().len();
        }
        thread.join().unwrap();
        assert!(to.take().is_empty());
    }
}
