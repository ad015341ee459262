//! When the driver gets its signal.
//!
//! A signal costs this thread more than a small request (one that wakes a sleeping guest's processor, 10 to 20 us), and it takes the
//! guest tens of microseconds to come and bring more. So it may wait while there is still enough to do that the guest is
//! back before that is done: with writes of 4 us, 23 of 32 are told at once, and the other 9 are made while it wakes. What is
//! fast enough, as reads from memory, is told after every turn, as all that is left takes less than the guest.

use std::time::{Duration, Instant};

/// What it takes a guest to wake and add requests.
const WAKE: Duration = Duration::from_micros(40);
/// The longest that a signal waits.
const MOST: Duration = Duration::from_micros(100);

/// The signals of one queue.
#[derive(Debug, Default)]
pub(super) struct Signals {
    /// Since when the driver is owed one.
    owed: Option<Instant>,
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

    /// From `now` on the driver is owed a signal.
    pub(super) fn owe(&mut self, now: Instant) {
        self.owed.get_or_insert(now);
    }

    /// Whether the driver is owed one.
    pub(super) fn is_owed(&self) -> bool {
        self.owed.is_some()
    }

    /// Whether one that is owed is to be given at `now`. `left`: chains that will be taken at once.
    pub(super) fn is_due(&self, now: Instant, left: u16) -> bool {
        self.owed
            .is_some_and(|since| self.pace * u32::from(left) <= WAKE || now.saturating_duration_since(since) >= MOST)
    }

    /// It is given; whether one was owed.
    pub(super) fn settle(&mut self) -> bool {
        self.owed.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// After turns with that pace, with a signal owed since now.
    fn signals(pace: Duration) -> (Signals, Instant) {
        let (mut signals, now) = (Signals::default(), Instant::now());
        (0..40).for_each(|_| signals.turn(16, pace * 16));
        signals.turn(0, US * 1000);
        assert!(!signals.is_owed() && !signals.is_due(now, 0), "none is owed");
        signals.owe(now);
        (signals, now)
    }

    #[test]
    fn a_signal_waits_while_more_is_left_than_a_guest_takes_to_wake() {
        let (mut s, now) = signals(US * 4);
        assert!(!s.is_due(now, 16) && !s.is_due(now, 11) && s.is_due(now, 9) && s.is_due(now, 0));
        assert!(s.settle() && !s.settle() && !s.is_due(now, 0), "it was given");
        let (s, now) = signals(US);
        assert!(s.is_due(now, 16), "fast ones are told at once");
    }

    #[test]
    fn no_signal_waits_for_long() {
        let (mut s, now) = signals(US * 4);
        s.owe(now + US * 90);
        assert!(!s.is_due(now + US * 99, 200));
        assert!(s.is_due(now + US * 100, 200), "counted from the first that is owed");
        let (s, now) = signals(US * 400);
        assert!(!s.is_due(now, 1) && s.is_due(now + US * 400, 1));
    }
}
