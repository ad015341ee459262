//! Discards and zeroing in pieces: a disk punches one piece at a time.
//!
//! A file system locks a file while it punches a hole into it, and all writes to the file wait. The time depends on the
//! number of extents that are freed, which can be hundreds of thousands. So a range is punched in pieces of
//! [`PUNCH_SECTORS`], and all queues of a disk share one lock. A request holds the lock for one piece and then queues
//! for the lock again. Between two pieces the file is unlocked, and other requests of the queue are served.
//!
//! Measured on ext4 (November 2026, two busy processors): a trim of 1 GiB, three quarters of which had every second 16
//! KiB punched before, with concurrent 4 KiB writes at queue depth 1.
//!
//! | | longest write | trim | writes a second |
//! | --- | --- | --- | --- |
//! | whole ranges | 194 ms | 4.0 s | 11 |
//! | pieces of 4 MiB | 81 ms | 4.1 s | 102 |
//! | pieces of 2 MiB | 40 ms | 4.6 s | 124 |
//! | qemu-storage-daemon, raw file | 1970 ms | 3.5 s | 1 |

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mailbox::{LaneEvent, Mailbox};

/// Maximum number of sectors of a piece: 2 MiB, the default block size.
pub(super) const PUNCH_SECTORS: u64 = 4096;

/// The lock of a disk for punching. One lane holds the lock at a time; waiting lanes get it in the order in which they
/// requested it.
#[derive(Debug, Default)]
pub(super) struct PunchLock(Mutex<PunchLockState>);

#[derive(Debug, Default)]
struct PunchLockState {
    holder: Option<Arc<Mailbox>>,
    waiting: VecDeque<Arc<Mailbox>>,
}

impl PunchLock {
    /// Acquires the lock if it is free, and returns whether it was. Otherwise queues the lane;
    /// [`LaneEvent::PunchLockGranted`] announces that the lane holds the lock. The lane must not call this function
    /// again before that event.
    fn acquire(&self, lane: &Arc<Mailbox>) -> bool {
        let mut state = self.lock();
        if state.holder.is_some() {
            state.waiting.push_back(lane.clone());
            return false;
        }
        state.holder = Some(lane.clone());
        true
    }

    /// Releases the lock if the lane holds it. Otherwise removes the lane from the queue for the lock.
    pub(super) fn release(&self, lane: &Arc<Mailbox>) {
        let mut state = self.lock();
        if state.holder.as_ref().is_some_and(|holder| Arc::ptr_eq(holder, lane)) {
            state.holder = state.waiting.pop_front();
            if let Some(next) = &state.holder {
                next.post(LaneEvent::PunchLockGranted);
            }
        } else {
            state.waiting.retain(|other| !Arc::ptr_eq(other, lane));
        }
    }

    fn lock(&self) -> MutexGuard<'_, PunchLockState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests of one lane that need the punch lock, and the lane's state with respect to the lock.
#[derive(Debug, Default)]
pub(super) struct PunchQueue {
    lock: LockShare,
    /// Requests that wait to punch their next piece.
    queue: VecDeque<u32>,
}

/// The state of a lane with respect to the [`PunchLock`] of its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum LockShare {
    #[default]
    None,
    Waiting,
    /// The lane holds the lock for the request with this number.
    Held(u32),
}

impl PunchQueue {
    /// Returns whether a request may punch its next piece now. If not, queues the request; [`PunchQueue::granted`] or
    /// [`PunchQueue::start_next`] returns its number later.
    pub(super) fn may_punch(&mut self, number: u32, lock: &PunchLock, lane: &Arc<Mailbox>) -> bool {
        if self.lock == LockShare::Held(number) {
            return true;
        }
        if self.lock == LockShare::None && self.queue.is_empty() && self.acquire(number, lock, lane) {
            return true;
        }
        self.queue.push_back(number);
        false
    }

    fn acquire(&mut self, number: u32, lock: &PunchLock, lane: &Arc<Mailbox>) -> bool {
        let held = lock.acquire(lane);
        self.lock = if held { LockShare::Held(number) } else { LockShare::Waiting };
        held
    }

    /// Releases the lock if the request holds it, and queues the request after all others of the lane.
    pub(super) fn requeue(&mut self, number: u32, lock: &PunchLock, lane: &Arc<Mailbox>) {
        self.release(number, lock, lane);
        self.queue.push_back(number);
    }

    /// Releases the lock if this request holds it: its piece is complete, or the request waits for another event.
    pub(super) fn release(&mut self, number: u32, lock: &PunchLock, lane: &Arc<Mailbox>) {
        if self.lock == LockShare::Held(number) {
            self.lock = LockShare::None;
            lock.release(lane);
        }
    }

    /// Records that the lane was granted the lock. Returns the request that holds the lock now.
    pub(super) fn granted(&mut self) -> u32 {
        let number = self.queue.pop_front().expect("a lane waits for the lock only while a request of it is queued");
        self.lock = LockShare::Held(number);
        number
    }

    /// Acquires the lock for the next queued request if the lock is free. Returns that request.
    pub(super) fn start_next(&mut self, lock: &PunchLock, lane: &Arc<Mailbox>) -> Option<u32> {
        if !self.has_queued() {
            return None;
        }
        let number = self.queue.pop_front().expect("a request is queued");
        if self.acquire(number, lock, lane) {
            return Some(number);
        }
        self.queue.push_front(number);
        None
    }

    /// Whether a request is queued while the lane neither holds the lock nor waits for it.
    pub(super) fn has_queued(&self) -> bool {
        self.lock == LockShare::None && !self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_lanes_are_granted_the_lock_in_order() {
        let lock = PunchLock::default();
        let [a, b, c] = [(); 3].map(|()| Arc::new(Mailbox::new().unwrap()));
        assert!(lock.acquire(&a));
        assert!(!lock.acquire(&b) && !lock.acquire(&c));
        lock.release(&a);
        assert_eq!((a.take(), b.take(), c.take()), (vec![], vec![LaneEvent::PunchLockGranted], vec![]));
        assert!(!lock.acquire(&a), "after the lanes that wait");
        lock.release(&c);
        lock.release(&b);
        assert_eq!((a.take(), c.take()), (vec![LaneEvent::PunchLockGranted], vec![]), "c has left");
        lock.release(&a);
        assert!(lock.acquire(&c));
    }
}
