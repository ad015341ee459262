//! Interrupt coalescing: decides when a pending interrupt is sent to the driver.
//!
//! An interrupt that wakes a sleeping guest processor costs the thread of the queue 10 to 20 us, more than a small
//! request. The guest then takes tens of microseconds until it adds more requests. So an interrupt waits while serving
//! the chains that are left takes longer than the guest takes to wake: of 32 writes of 4 us each, one interrupt
//! announces 24, and the other 8 are served while the guest wakes. Fast requests, such as reads from the page cache,
//! are announced after every batch, since serving the rest takes less time than the guest needs. Slow requests are also
//! announced after every batch, since the cost of an interrupt is small in comparison.

use std::time::{Duration, Instant};

/// Time that a guest takes to wake and to add requests. With 20 us coalescing gains nothing; 60 us perform like 40 us.
const GUEST_WAKE: Duration = Duration::from_micros(40);
/// Minimum time per chain for which an interrupt never waits, since its cost is small in comparison.
const SLOW_CHAIN: Duration = Duration::from_micros(16);
/// Maximum time that an interrupt waits. The time is checked after each batch.
const MAX_DELAY: Duration = Duration::from_micros(100);

/// The pending interrupt of one queue.
///
/// The clock is read only if an interrupt may wait, and only batches of some length are timed. Otherwise reading the
/// clock would delay a guest with few requests in flight.
#[derive(Debug, Default)]
pub(super) struct InterruptCoalescing {
    /// Whether an interrupt is pending.
    pending: bool,
    /// Time at which the first check found that the pending interrupt may wait.
    pending_since: Option<Instant>,
    /// Moving average of the time per chain.
    time_per_chain: Duration,
}

impl InterruptCoalescing {
    /// Records the number of chains of a batch and the time that it took.
    pub(super) fn record_batch(&mut self, chains: u32, took: Duration) {
        if chains > 0 {
            self.time_per_chain = (self.time_per_chain * 3 + took / chains) / 4;
        }
    }

    /// Records a batch that was full after few requests, which are large, and was not timed. No interrupt waits for the
    /// batch after it.
    pub(super) fn record_large_batch(&mut self) {
        self.time_per_chain = Duration::ZERO;
    }

    /// Makes an interrupt pending.
    pub(super) fn request(&mut self) {
        self.pending = true;
    }

    /// Whether an interrupt is pending.
    pub(super) fn is_pending(&self) -> bool {
        self.pending
    }

    /// Returns whether the pending interrupt is to be sent now. `left` is the number of chains that the next batches
    /// can pop without waiting for another event, and `now` returns the time.
    pub(super) fn is_due(&mut self, left: u16, now: impl FnOnce() -> Instant) -> bool {
        if !self.pending || self.time_per_chain >= SLOW_CHAIN || self.time_per_chain * u32::from(left) <= GUEST_WAKE {
            return self.pending;
        }
        let now = now();
        now.saturating_duration_since(*self.pending_since.get_or_insert(now)) >= MAX_DELAY
    }

    /// Clears the pending interrupt. Returns whether there was one.
    pub(super) fn take(&mut self) -> bool {
        self.pending_since = None;
        std::mem::take(&mut self.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Returns the state after batches with this time per chain, with an interrupt pending, and the current time.
    fn pending(per_chain: Duration) -> (InterruptCoalescing, Instant) {
        let (mut state, now) = (InterruptCoalescing::default(), Instant::now());
        (0..40).for_each(|_| state.record_batch(16, per_chain * 16));
        state.record_batch(0, US * 1000);
        assert!(!state.is_pending() && !state.is_due(0, || now), "none is pending");
        state.request();
        (state, now)
    }

    #[test]
    fn an_interrupt_waits_while_the_rest_takes_longer_than_a_guest_to_wake() {
        let (mut s, now) = pending(US * 4);
        assert!(!s.is_due(16, || now) && !s.is_due(11, || now) && s.is_due(9, || now));
        assert!(s.is_due(0, || unreachable!("the clock is not read")));
        assert!(s.take() && !s.take() && !s.is_due(0, || now), "it was taken");
        for per_chain in [US, US * 17, US * 5000] {
            let (mut s, _) = pending(per_chain);
            assert!(s.is_due(16, || unreachable!("the clock is not read")), "fast and slow chains do not delay it");
        }
        let (mut s, now) = pending(US * 4);
        s.record_large_batch();
        assert!(s.is_due(100, || now));
    }

    #[test]
    fn no_interrupt_waits_longer_than_the_maximum() {
        let (mut s, now) = pending(US * 4);
        assert!(!s.is_due(200, || now));
        s.request();
        assert!(!s.is_due(200, || now + US * 99));
        assert!(s.is_due(200, || now + US * 100), "the time counts from the first check");
        s.take();
        s.request();
        assert!(!s.is_due(200, || now + US * 101), "the time counts again from zero");
    }
}
