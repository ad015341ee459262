//! Group commit: all flushes that arrive while a commit runs share the next commit.
//!
//! A commit and its flushes are a *round*. A flush joins a round that starts after the flush has arrived, never the running one,
//! whose snapshot is already taken. The lane whose flush starts a round leads it on its own engine; the other lanes get an event
//! when it ends. If flushes wait for the next round then, the same lane leads that, too.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mailbox::{LaneEvent, Mailbox};
use crate::mutant::{self, Mutant};

/// The commit rounds of a disk.
#[derive(Debug, Default)]
pub struct GroupCommit {
    state: Mutex<GroupCommitState>,
    /// Number of threads that wait for a round and must not wait until a full file system has space.
    urgent: AtomicUsize,
}

/// Marks a thread that waits for a round and must not wait for space on the file system, until the mark is dropped.
pub(super) struct UrgentGuard<'a>(&'a AtomicUsize);

impl Drop for UrgentGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct GroupCommitState {
    running: bool,
    /// Number of the running round, or of the last one if none runs.
    round: u64,
    /// Mailboxes that wait for the running round.
    current: Vec<Arc<Mailbox>>,
    /// Mailboxes that wait for the round after it.
    next: Vec<Arc<Mailbox>>,
}

/// A place in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JoinedRound {
    /// The round to wait for.
    pub round: u64,
    /// Whether the round starts now, and the caller has to lead it.
    pub lead: bool,
}

impl GroupCommit {
    /// Joins the next round to start. Its end is posted to `mailbox`, once per round.
    pub fn join(&self, mailbox: &Arc<Mailbox>) -> JoinedRound {
        let mut state = self.lock();
        let lead = !state.running;
        if lead {
            state.running = true;
            state.round += 1;
        }
        let round = state.round + u64::from(!lead && !mutant::enabled(Mutant::JoinRunning));
        let waiting = if round == state.round { &mut state.current } else { &mut state.next };
        if !waiting.iter().any(|m| Arc::ptr_eq(m, mailbox)) {
            waiting.push(mailbox.clone());
        }
        JoinedRound { round, lead }
    }

    /// Makes rounds that find the file system full fail within a second, until the guard is dropped. For a queue that
    /// stops and for the control thread, which wait for the round.
    pub(super) fn mark_urgent(&self) -> UrgentGuard<'_> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        UrgentGuard(&self.urgent)
    }

    /// Whether a round that finds the file system full must fail.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0
    }

    /// Ends the running round and posts its end to all mailboxes that wait for it. Returns the number of the next round if flushes
    /// wait for one; the caller has to lead it.
    pub fn finish(&self, ok: bool) -> Option<u64> {
        let mut state = self.lock();
        assert!(state.running, "only a running round ends");
        let event = LaneEvent::Committed { round: state.round, ok };
        state.current.drain(..).for_each(|m| m.post(event));
        if state.next.is_empty() {
            state.running = false;
            return None;
        }
        state.round += 1;
        state.current = std::mem::take(&mut state.next);
        Some(state.round)
    }

    fn lock(&self) -> MutexGuard<'_, GroupCommitState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_joins_a_round_that_starts_after_it() {
        let rounds = GroupCommit::default();
        let [a, b] = [(); 2].map(|()| Arc::new(Mailbox::new().unwrap()));
        assert_eq!(rounds.join(&a), JoinedRound { round: 1, lead: true });
        assert_eq!(rounds.join(&b), JoinedRound { round: 2, lead: false });
        assert_eq!(rounds.join(&a), JoinedRound { round: 2, lead: false });
        assert_eq!(rounds.join(&a), JoinedRound { round: 2, lead: false });
        assert_eq!(rounds.finish(true), Some(2));
        assert_eq!(a.take(), [LaneEvent::Committed { round: 1, ok: true }]);
        assert!(b.take().is_empty());
        assert_eq!(rounds.finish(false), None);
        for m in [&a, &b] {
            assert_eq!(m.take(), [LaneEvent::Committed { round: 2, ok: false }]);
        }
        assert_eq!(rounds.join(&b), JoinedRound { round: 3, lead: true });
    }

    #[test]
    fn rounds_are_urgent_until_the_last_guard_is_dropped() {
        let rounds = GroupCommit::default();
        let (first, second) = (rounds.mark_urgent(), rounds.mark_urgent());
        drop(first);
        assert!(rounds.is_urgent());
        drop(second);
        assert!(!rounds.is_urgent());
    }
}
