//! When the driver gets its signal.
//!
//! A signal costs this thread more than a small request (one that wakes a sleeping guest's processor, 10 to 20 us), and it
//! takes the guest tens of microseconds to come and bring more. So it may wait while there is still enough to do that the
//! guest is back before that is done: of 32 writes of 4 us, 24 are told by one signal, and 8 are made while the guest wakes.
//! Fast requests, as reads from memory, are told of after every turn, since all that is left takes less time than the guest;
//! slow ones, too, since beside them a signal is nothing.

use std::time::{Duration, Instant};

/// What it takes a guest to wake and add requests.
const GUEST_WAKE: Duration = Duration::from_micros(40);
/// Beside chains that take as long, a signal costs little: it never waits for them.
const SLOW_CHAIN: Duration = Duration::from_micros(16);
/// The longest that a signal waits; looked at after each turn.
const MAX_DELAY: Duration = Duration::from_micros(100);

/// The signals of one queue.
///
/// The clock is asked only where a signal may wait, and for turns of some length: a guest with few requests at a time would
/// wait for that, too.
#[derive(Debug, Default)]
pub(super) struct InterruptCoalescing {
    /// Whether the driver is owed one, and since when it waits.
    pending: bool,
    pending_since: Option<Instant>,
    /// What a chain took in the last turns.
    time_per_chain: Duration,
}

impl InterruptCoalescing {
    /// A turn took so many chains, and so long for them.
    pub(super) fn record_batch(&mut self, chains: u32, took: Duration) {
        if chains > 0 {
            self.time_per_chain = (self.time_per_chain * 3 + took / chains) / 4;
        }
    }

    /// A turn ended early, of few and large chains: what they took is not known, and no signal is to wait for the next.
    pub(super) fn record_large_batch(&mut self) {
        self.time_per_chain = Duration::ZERO;
    }

    /// The driver is owed a signal.
    pub(super) fn request(&mut self) {
        self.pending = true;
    }

    /// Whether the driver is owed one.
    pub(super) fn is_pending(&self) -> bool {
        self.pending
    }

    /// Whether one that is owed is to be given, `now` being the time. `left`: chains that will be taken at once.
    pub(super) fn is_due(&mut self, left: u16, now: impl FnOnce() -> Instant) -> bool {
        if !self.pending || self.time_per_chain >= SLOW_CHAIN || self.time_per_chain * u32::from(left) <= GUEST_WAKE {
            return self.pending;
        }
        let now = now();
        now.saturating_duration_since(*self.pending_since.get_or_insert(now)) >= MAX_DELAY
    }

    /// It is given; whether one was owed.
    pub(super) fn take(&mut self) -> bool {
        self.pending_since = None;
        std::mem::take(&mut self.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// After turns with that pace, with a signal owed.
    fn signals(pace: Duration) -> (InterruptCoalescing, Instant) {
        let (mut signals, now) = (InterruptCoalescing::default(), Instant::now());
        (0..40).for_each(|_| signals.record_batch(16, pace * 16));
        signals.record_batch(0, US * 1000);
        assert!(!signals.is_pending() && !signals.is_due(0, || now), "none is owed");
        signals.request();
        (signals, now)
    }

    #[test]
    fn a_signal_waits_while_more_is_left_than_a_guest_takes_to_wake() {
        let (mut s, now) = signals(US * 4);
        assert!(!s.is_due(16, || now) && !s.is_due(11, || now) && s.is_due(9, || now));
        assert!(s.is_due(0, || unreachable!("the clock is not asked")));
        assert!(s.take() && !s.take() && !s.is_due(0, || now), "it was given");
        for pace in [US, US * 17, US * 5000] {
            let (mut s, _) = signals(pace);
            assert!(s.is_due(16, || unreachable!("nor here")), "fast ones are told at once, and slow ones");
        }
        let (mut s, now) = signals(US * 4);
        s.record_large_batch();
        assert!(s.is_due(100, || now));
    }

    #[test]
    fn no_signal_waits_for_long() {
        let (mut s, now) = signals(US * 4);
        assert!(!s.is_due(200, || now));
        s.request();
        assert!(!s.is_due(200, || now + US * 99));
        assert!(s.is_due(200, || now + US * 100), "counted from the first that waits");
        s.take();
        s.request();
        assert!(!s.is_due(200, || now + US * 101), "counted anew");
    }
}
