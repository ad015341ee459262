//! Group commit: all flushes that arrive while a commit runs share the next commit.
//!
//! A commit and its flushes are a *round*. A flush joins a round that starts after the flush has arrived, never the
//! running round, whose snapshot is already taken. The lane whose flush starts a round leads the round on its own
//! engine; the other lanes get an event when the round ends. If flushes wait for the next round then, the same lane
//! leads the next round, too. A thread that commits without a lane leaves the next round to a waiter.
//!
//! If the file system is full, a round *stalls*: its leader keeps the round open, and leads it again later. The control
//! thread and a queue that stops must not wait for space. They are *urgent*: they leave a round that stalls, and only
//! their own flushes fail. An urgent leader leaves the round without a leader, and the first waiter that claims the
//! lead takes the round over.
//!
//! A live operation that changes which file takes the writes *holds* the rounds: no round begins until they are
//! released. So no flush is answered by a commit of the wrong file.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::mailbox::{LaneEvent, Mailbox};
use crate::mutant::{self, Mutant};

/// The commit rounds of a disk.
#[derive(Debug, Default)]
pub struct GroupCommit {
    state: Mutex<GroupCommitState>,
    /// Notified when a round ends and no other round begins.
    at_rest: Condvar,
}

#[derive(Debug, Default)]
struct GroupCommitState {
    running: bool,
    /// Whether no round may begin.
    held: bool,
    /// Whether the running round has no leader.
    leaderless: bool,
    /// Number of the running round, or of the last one if none runs.
    round: u64,
    /// Waiters for the running round.
    current: Vec<RoundWaiter>,
    /// Waiters for the next round: after the running round, or after the release of held rounds.
    next: Vec<RoundWaiter>,
}

/// A lane or thread that waits for a round.
#[derive(Debug)]
struct RoundWaiter {
    mailbox: Arc<Mailbox>,
    /// Whether the lane or thread leaves a round that stalls.
    urgent: bool,
}

impl RoundWaiter {
    fn has(&self, mailbox: &Arc<Mailbox>) -> bool {
        Arc::ptr_eq(&self.mailbox, mailbox)
    }
}

/// A place in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JoinedRound {
    /// The round to wait for.
    pub round: u64,
    /// Whether the round starts now, and the caller has to lead it.
    pub lead: bool,
}

impl GroupCommitState {
    /// Starts the next round, in place of the running round if one runs. Returns false if no waiter waits for the next
    /// round, or the rounds are held; then no round runs any more.
    fn advance(&mut self) -> bool {
        self.running = !self.next.is_empty() && !self.held;
        if self.running {
            self.round += 1;
            self.current = std::mem::take(&mut self.next);
        }
        self.running
    }

    /// Posts the end of the running round to its waiters.
    fn post_end(&mut self, ok: bool) {
        assert!(self.running, "only a running round ends");
        let event = LaneEvent::Committed { round: self.round, ok };
        self.current.drain(..).for_each(|waiter| waiter.mailbox.post(event));
    }

    /// Offers the lead of the running round to its waiters. If no round runs, or the running round has no waiters,
    /// tries to start the next round, and offers the lead of the next round.
    fn offer_lead(&mut self) {
        self.leaderless = !self.current.is_empty() || self.advance();
        self.current.iter().for_each(|waiter| waiter.mailbox.post(LaneEvent::Leaderless));
    }

    /// Removes the waiters that `leaves` selects from both rounds, and posts `LeftRound` to each of them.
    fn remove_waiters(&mut self, leaves: impl Fn(&RoundWaiter) -> bool) {
        for (waiters, round) in [(&mut self.current, self.round), (&mut self.next, self.round + 1)] {
            let left = waiters.extract_if(.., |waiter| leaves(waiter));
            left.for_each(|waiter| waiter.mailbox.post(LaneEvent::LeftRound { round }));
        }
    }
}

impl GroupCommit {
    /// Joins the next round to start. `mailbox` gets one event for the round: that it ended, or that an urgent waiter
    /// left it.
    pub fn join(&self, mailbox: &Arc<Mailbox>) -> JoinedRound {
        let mut state = self.lock();
        let lead = !state.running && !state.held;
        if lead {
            state.running = true;
            state.round += 1;
        }
        let round = state.round + u64::from(!lead && !mutant::enabled(Mutant::JoinRunning));
        let waiters = if round == state.round { &mut state.current } else { &mut state.next };
        if !waiters.iter().any(|waiter| waiter.has(mailbox)) {
            waiters.push(RoundWaiter { mailbox: mailbox.clone(), urgent: false });
        }
        if state.leaderless {
            // The waiters of the running round may be lanes that do not respond.
            mailbox.post(LaneEvent::Leaderless);
        }
        JoinedRound { round, lead }
    }

    /// Makes the waiter with this mailbox urgent in the rounds for which it waits now.
    pub(super) fn mark_urgent(&self, mailbox: &Arc<Mailbox>) {
        let state = &mut *self.lock();
        let waiters = state.current.iter_mut().chain(&mut state.next);
        waiters.filter(|waiter| waiter.has(mailbox)).for_each(|waiter| waiter.urgent = true);
    }

    /// Removes the urgent waiters from both rounds: the running round found the file system full, and its leader is
    /// going to lead it again.
    pub(super) fn stall(&self) {
        self.lock().remove_waiters(|waiter| waiter.urgent);
    }

    /// Removes all waiters from both rounds: no round can begin, and flushes must not wait.
    pub(super) fn fail_waiters(&self) {
        self.lock().remove_waiters(|_| true);
    }

    /// Removes the leader of the running round, whose mailbox is `mailbox`, from both rounds, and offers the lead to
    /// the other waiters: the round found the file system full, and its leader must not wait for space.
    pub(super) fn hand_over(&self, mailbox: &Arc<Mailbox>) {
        let mut state = self.lock();
        state.remove_waiters(|waiter| waiter.has(mailbox));
        state.offer_lead();
        self.notify_at_rest(&state);
    }

    /// Claims the lead of the running round if the round has no leader. Returns whether the caller has to lead it now.
    pub(super) fn claim_lead(&self) -> bool {
        std::mem::take(&mut self.lock().leaderless)
    }

    /// Ends the running round and posts its end to its waiters. If waiters wait for the next round and the rounds are
    /// not held, starts the next round and returns its number; the caller has to lead that round.
    pub fn finish(&self, ok: bool) -> Option<u64> {
        let mut state = self.lock();
        state.post_end(ok);
        let next = state.advance().then_some(state.round);
        self.notify_at_rest(&state);
        next
    }

    /// Ends the running round as [`GroupCommit::finish`] does, but leaves the lead of the next round to a waiter of
    /// that round.
    pub(super) fn finish_and_hand_over(&self, ok: bool) {
        let mut state = self.lock();
        state.post_end(ok);
        state.offer_lead();
        self.notify_at_rest(&state);
    }

    /// Removes the waiter with this mailbox from all rounds, without an event. The lane of the mailbox has no flush in
    /// flight, or is taken out of service without answering its requests.
    pub(super) fn leave(&self, mailbox: &Arc<Mailbox>) {
        let mut state = self.lock();
        state.current.retain(|waiter| !waiter.has(mailbox));
        state.next.retain(|waiter| !waiter.has(mailbox));
        if state.leaderless && state.current.is_empty() {
            state.offer_lead();
            self.notify_at_rest(&state);
        }
    }

    /// Lets no round begin until [`GroupCommit::release`]. A running round continues.
    pub(super) fn hold(&self) {
        self.lock().held = true;
    }

    /// Whether no round runs.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.lock().running
    }

    /// Waits until no round runs, at most for `at_most`.
    pub(super) fn wait_at_rest(&self, at_most: Duration) {
        let _ = self.at_rest.wait_timeout_while(self.lock(), at_most, |state| state.running);
    }

    /// Lets rounds begin again. If flushes wait for a round, offers them its lead.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        if !state.running {
            state.offer_lead();
        }
    }

    /// Notifies the threads that wait in `wait_at_rest` if no round runs.
    fn notify_at_rest(&self, state: &GroupCommitState) {
        if !state.running {
            self.at_rest.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, GroupCommitState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn mailboxes<const N: usize>() -> [Arc<Mailbox>; N] {
        [(); N].map(|()| Arc::new(Mailbox::new().unwrap()))
    }

    #[test]
    fn a_flush_joins_a_round_that_starts_after_it() {
        let rounds = GroupCommit::default();
        let [a, b] = mailboxes();
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
    fn only_urgent_waiters_leave_a_round_that_stalls() {
        let rounds = GroupCommit::default();
        let [leader, control, lane] = mailboxes();
        rounds.join(&leader);
        rounds.join(&control);
        rounds.join(&lane);
        rounds.mark_urgent(&control);
        rounds.stall();
        assert_eq!(control.take(), [LaneEvent::LeftRound { round: 2 }]);
        assert!(leader.take().is_empty() && lane.take().is_empty());
        assert_eq!(rounds.finish(true), Some(2));
        assert_eq!(rounds.finish(true), None);
        assert_eq!(lane.take(), [LaneEvent::Committed { round: 2, ok: true }]);
        assert!(control.take().is_empty());
    }

    #[test]
    fn a_leader_that_leaves_hands_the_round_over() {
        let rounds = GroupCommit::default();
        let [stopping, first, second] = mailboxes();
        rounds.join(&stopping);
        rounds.join(&first);
        rounds.join(&second);
        assert!(!rounds.claim_lead(), "the round has a leader");
        rounds.hand_over(&stopping);
        assert_eq!(stopping.take(), [LaneEvent::LeftRound { round: 1 }]);
        assert!([&first, &second].iter().all(|m| m.take() == [LaneEvent::Leaderless]));
        // A waiter that leaves before it claims the lead does not take the round with it.
        rounds.leave(&first);
        assert!(rounds.claim_lead() && !rounds.claim_lead());
        rounds.join(&stopping);
        rounds.finish_and_hand_over(true);
        assert_eq!(second.take(), [LaneEvent::Committed { round: 2, ok: true }]);
        assert_eq!(stopping.take(), [LaneEvent::Leaderless]);
        rounds.leave(&stopping);
        assert!(!rounds.claim_lead(), "no round runs");
        assert_eq!(rounds.join(&first), JoinedRound { round: 4, lead: true });
    }

    /// A waiter in the random test, and the rounds whose end it has not received.
    struct TestWaiter {
        mailbox: Arc<Mailbox>,
        rounds: Vec<u64>,
    }

    /// Takes the events of a waiter, and claims the lead if it is offered. `leader` is the index of the leader.
    fn take_events(rounds: &GroupCommit, waiters: &mut [TestWaiter], index: usize, leader: &mut Option<usize>) {
        for event in waiters[index].mailbox.take() {
            match event {
                LaneEvent::Committed { round, .. } | LaneEvent::LeftRound { round } => {
                    let waits = &mut waiters[index].rounds;
                    let at = waits.iter().position(|waited| *waited == round).expect("one event per round");
                    waits.swap_remove(at);
                }
                LaneEvent::Leaderless if rounds.claim_lead() => {
                    assert_eq!(leader.replace(index), None, "two leaders");
                }
                _ => {}
            }
        }
    }

    #[test]
    fn each_waiter_gets_one_event_per_round_and_no_round_stays_without_a_leader() {
        let mut random = Random::from_env(1);
        let rounds = GroupCommit::default();
        let (mut leader, mut held) = (None, false);
        let mut waiters = mailboxes::<4>().map(|mailbox| TestWaiter { mailbox, rounds: Vec::new() });
        for step in 0..200_000 {
            let index = random.index(waiters.len());
            // Step 60 of each hundred releases the rounds. In the steps after it, waiters only take events and end
            // rounds.
            let action = match step % 100 {
                0..60 => random.below(10),
                60 => 9,
                _ => 6 + random.below(2),
            };
            let mailbox = waiters[index].mailbox.clone();
            match (action, leader) {
                (0 | 1, _) => {
                    // A flush that joins a round which its lane has just left would fail by the event of the earlier
                    // flush.
                    take_events(&rounds, &mut waiters, index, &mut leader);
                    let JoinedRound { round, lead } = rounds.join(&mailbox);
                    if !waiters[index].rounds.contains(&round) {
                        waiters[index].rounds.push(round);
                    }
                    if lead {
                        assert!(!held, "a round begins although rounds are held");
                        assert_eq!(leader.replace(index), None, "two leaders");
                    }
                }
                (8, _) => {
                    rounds.hold();
                    held = true;
                }
                (9, _) => {
                    rounds.release();
                    held = false;
                }
                (2, _) => rounds.mark_urgent(&mailbox),
                (3, Some(_)) => rounds.stall(),
                (4, Some(leading)) => {
                    rounds.hand_over(&waiters[leading].mailbox);
                    leader = None;
                }
                (5, Some(_)) => {
                    rounds.finish_and_hand_over(true);
                    leader = None;
                }
                (6, Some(_)) => leader = leader.filter(|_| rounds.finish(true).is_some()),
                _ => take_events(&rounds, &mut waiters, index, &mut leader),
            }
            // A lane stops. It waits for commits in the background only.
            if step % 10 == 0 && leader != Some(index) {
                rounds.leave(&mailbox);
                take_events(&rounds, &mut waiters, index, &mut leader);
                waiters[index].rounds.clear();
            }
            if step % 100 == 99 {
                let is_at_rest = |waiters: &[TestWaiter]| waiters.iter().all(|waiter| waiter.rounds.is_empty());
                while leader.is_some() || !is_at_rest(&waiters) {
                    (0..waiters.len()).for_each(|index| take_events(&rounds, &mut waiters, index, &mut leader));
                    assert!(leader.is_some() || is_at_rest(&waiters), "no leader at step {step}");
                    leader = leader.filter(|_| rounds.finish(true).is_some());
                }
            }
        }
    }
}
