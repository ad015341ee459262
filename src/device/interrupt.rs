//! Interrupt coalescing: when a pending interrupt is sent to the driver.
//!
//! An interrupt that wakes a sleeping guest processor costs this thread 10 to 20 us, more than a small request, and the guest
//! takes tens of microseconds until it adds more requests. So an interrupt waits while the chains that are left take longer than
//! that: of 32 writes of 4 us, one interrupt announces 24, and 8 are served while the guest wakes. Fast requests, such as reads
//! from the page cache, are announced after every batch, since the rest takes less time than the guest needs. Slow requests are,
//! too, since an interrupt costs little in comparison.

use std::time::{Duration, Instant};

/// Time that a guest takes to wake and to add requests. 20 us gain nothing, 60 us perform the same.
const GUEST_WAKE: Duration = Duration::from_micros(40);
/// Time per chain from which an interrupt costs little in comparison and never waits.
const SLOW_CHAIN: Duration = Duration::from_micros(16);
/// Longest time that an interrupt waits. Checked after each batch.
const MAX_DELAY: Duration = Duration::from_micros(100);

/// The pending interrupt of one queue.
///
/// The clock is read only if an interrupt may wait, and batches are timed only if they have some length: otherwise a guest with
/// few requests in flight would wait for the clock, too.
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

    /// Records a batch of few and large chains, which was not timed: no interrupt waits for the next batch.
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

    /// Whether the pending interrupt is to be sent now. `left` is the number of chains that the next batch pops at once; `now`
    /// returns the time.
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

    /// The state after batches with this time per chain, with an interrupt pending.
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
