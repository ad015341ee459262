//! Group commit: all flushes that arrive while a commit runs share the next one.
//!
//! A flush joins a round that starts after it was asked, never the one that runs: that one has taken its snapshot. The
//! lane whose flush starts a round leads it on its own engine; the others get a letter. When a round ends and some wait
//! for the next, the same lane leads on.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mailbox::{LaneEvent, Mailbox};
use crate::mutant::{self, Mutant};

/// The rounds of a disk.
#[derive(Debug, Default)]
pub struct GroupCommit {
    state: Mutex<GroupCommitState>,
    /// Threads that cannot wait until a full host has room again.
    urgent: AtomicUsize,
}

/// A thread that waits for a round and cannot wait for room on the host.
pub(super) struct UrgentGuard<'a>(&'a AtomicUsize);

impl Drop for UrgentGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct GroupCommitState {
    running: bool,
    /// The number of the running round, or of the last one.
    round: u64,
    /// Who waits for the running round.
    current: Vec<Arc<Mailbox>>,
    /// Who waits for the one after.
    next: Vec<Arc<Mailbox>>,
}

/// A place in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JoinedRound {
    /// The round to wait for.
    pub round: u64,
    /// Whether it starts now, and the one who joined has to lead it.
    pub lead: bool,
}

impl GroupCommit {
    /// Joins the next round to start. The letter about its end comes to `mailbox`, once a round.
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

    /// Has a round that is held because the host is full fail within a second, for as long as the result lives: a queue that
    /// stops, or the control thread, waits for it.
    pub(super) fn mark_urgent(&self) -> UrgentGuard<'_> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        UrgentGuard(&self.urgent)
    }

    /// Whether a round must not be held.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0
    }

    /// Ends the running round and tells all who wait for it. Some: the round that the caller has to lead now.
    pub fn finish(&self, ok: bool) -> Option<u64> {
        let mut state = self.lock();
        assert!(state.running, "only a running round ends");
        let letter = LaneEvent::Committed { round: state.round, ok };
        state.current.drain(..).for_each(|m| m.post(letter));
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
    fn a_round_is_hurried_as_long_as_one_thread_hurries() {
        let rounds = GroupCommit::default();
        let (first, second) = (rounds.mark_urgent(), rounds.mark_urgent());
        drop(first);
        assert!(rounds.is_urgent());
        drop(second);
        assert!(!rounds.is_urgent());
    }
}
