//! How lanes wake each other: a bell and a few letters. Nothing on the way of a read comes here.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::storage::Notifier;

/// What one lane has to tell another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaneEvent {
    /// A commit is over.
    Committed {
        /// Its number.
        round: u64,
        /// Whether what it covers is durable.
        ok: bool,
    },
    /// Growth is over.
    GrowthEnded(GrowthResult),
    /// The lane has the disk's turn to punch.
    PunchLockGranted,
}

/// How a step of growth ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrowthResult {
    /// There is room now.
    Grown,
    /// The host has none.
    NoSpace,
    /// It failed.
    Failed,
}

/// Letters to one lane.
#[derive(Debug)]
pub struct Mailbox {
    events: Mutex<Vec<LaneEvent>>,
    notified: AtomicBool,
    event_fd: Notifier,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// Where the host has no descriptor left for the bell.
    pub fn new() -> Result<Mailbox> {
        Ok(Mailbox { events: Mutex::default(), notified: AtomicBool::new(false), event_fd: Notifier::new()? })
    }

    /// Puts a letter in and rings.
    pub fn post(&self, letter: LaneEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        if !self.notified.swap(true, Ordering::SeqCst) {
            self.event_fd.notify();
        }
    }

    /// Takes all letters out; no system call where there are none.
    pub fn take(&self) -> Vec<LaneEvent> {
        // A look is cheaper than a swap, and nearly always there are none. Who posts rings after it set this.
        if !self.notified.load(Ordering::Acquire) || !self.notified.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        self.event_fd.drain();
        std::mem::take(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until there are letters (or a signal comes), and leaves them.
    pub fn sleep(&self) {
        self.event_fd.wait();
    }

    /// Waits until there are letters, and takes them.
    pub fn wait(&self) -> Vec<LaneEvent> {
        loop {
            let letters = self.take();
            if !letters.is_empty() {
                return letters;
            }
            self.sleep();
        }
    }

    /// Readable (level-triggered) while there are letters.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event_fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn letters_arrive_from_another_thread() {
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
