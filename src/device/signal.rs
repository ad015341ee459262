//! When the driver gets its signal.
//!
//! A signal costs this thread more than a small request (one that wakes a sleeping guest's processor, 10 to 20 us), and it
//! takes the guest tens of microseconds to come and bring more. So it may wait while there is still enough to do that the
//! guest is back before that is done: of 32 writes of 4 us, 24 are told by one signal, and 8 are made while the guest wakes.
//! Fast requests, as reads from memory, are told of after every turn, since all that is left takes less time than the guest;
//! slow ones, too, since beside them a signal is nothing.

use std::time::{Duration, Instant};

/// What it takes a guest to wake and add requests.
const WAKE: Duration = Duration::from_micros(40);
/// Beside chains that take as long, a signal costs little: it never waits for them.
const SLOW: Duration = Duration::from_micros(16);
/// The longest that a signal waits; looked at after each turn.
const MOST: Duration = Duration::from_micros(100);

/// The signals of one queue.
///
/// The clock is asked only where a signal may wait, and for turns of some length: a guest with few requests at a time would
/// wait for that, too.
#[derive(Debug, Default)]
pub(super) struct Signals {
    /// Whether the driver is owed one, and since when it waits.
    owed: bool,
    since: Option<Instant>,
    /// What a chain took in the last turns.
    pace: Duration,
}

impl Signals {
    /// A turn took so many chains, and so long for them.
    pub(super) fn turn(&mut self, chains: u32, took: Duration) {
        if chains > 0 {
            self.pace = (self.pace * 3 + took / chains) / 4;
        }
    }

    /// A turn ended early, of few and large chains: what they took is not known, and no signal is to wait for the next.
    pub(super) fn large_turn(&mut self) {
        self.pace = Duration::ZERO;
    }

    /// The driver is owed a signal.
    pub(super) fn owe(&mut self) {
        self.owed = true;
    }

    /// Whether the driver is owed one.
    pub(super) fn is_owed(&self) -> bool {
        self.owed
    }

    /// Whether one that is owed is to be given, `now` being the time. `left`: chains that will be taken at once.
    pub(super) fn is_due(&mut self, left: u16, now: impl FnOnce() -> Instant) -> bool {
        if !self.owed || self.pace >= SLOW || self.pace * u32::from(left) <= WAKE {
            return self.owed;
        }
        let now = now();
        now.saturating_duration_since(*self.since.get_or_insert(now)) >= MOST
    }

    /// It is given; whether one was owed.
    pub(super) fn settle(&mut self) -> bool {
        self.since = None;
        std::mem::take(&mut self.owed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// After turns with that pace, with a signal owed.
    fn signals(pace: Duration) -> (Signals, Instant) {
        let (mut signals, now) = (Signals::default(), Instant::now());
        (0..40).for_each(|_| signals.turn(16, pace * 16));
        signals.turn(0, US * 1000);
        assert!(!signals.is_owed() && !signals.is_due(0, || now), "none is owed");
        signals.owe();
        (signals, now)
    }

    #[test]
    fn a_signal_waits_while_more_is_left_than_a_guest_takes_to_wake() {
        let (mut s, now) = signals(US * 4);
        assert!(!s.is_due(16, || now) && !s.is_due(11, || now) && s.is_due(9, || now));
        assert!(s.is_due(0, || unreachable!("the clock is not asked")));
        assert!(s.settle() && !s.settle() && !s.is_due(0, || now), "it was given");
        for pace in [US, US * 17, US * 5000] {
            let (mut s, _) = signals(pace);
            assert!(s.is_due(16, || unreachable!("nor here")), "fast ones are told at once, and slow ones");
        }
        let (mut s, now) = signals(US * 4);
        s.large_turn();
        assert!(s.is_due(100, || now));
    }

    #[test]
    fn no_signal_waits_for_long() {
        let (mut s, now) = signals(US * 4);
        assert!(!s.is_due(200, || now));
        s.owe();
        assert!(!s.is_due(200, || now + US * 99));
        assert!(s.is_due(200, || now + US * 100), "counted from the first that waits");
        s.settle();
        s.owe();
        assert!(!s.is_due(200, || now + US * 101), "counted anew");
    }
}
