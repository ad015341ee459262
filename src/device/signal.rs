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
///
/// The clock is asked only where something is left: a guest with one request at a time would wait for that, too.
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
        if !self.owed || left == 0 || self.pace * u32::from(left) <= WAKE {
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
        let (mut s, _) = signals(US);
        assert!(s.is_due(16, || unreachable!("nor here")), "fast ones are told at once");
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
        let (mut s, now) = signals(US * 400);
        assert!(!s.is_due(1, || now) && s.is_due(1, || now + US * 400));
    }
}
