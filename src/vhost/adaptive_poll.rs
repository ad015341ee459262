//! Adaptive busy polling of one virtqueue, like poll-max-ns in QEMU.
//!
//! To sleep and to be woken costs tens of microseconds, much more than a read from the page cache. Polling saves this
//! time only if work arrives while the thread polls. So the polling window follows the gaps between work. A gap of at
//! most the maximum window raises a window that is shorter than twice the gap to twice the gap, limited by the maximum.
//! A longer gap halves the window. So the window of a slow queue shrinks to zero.

use std::time::{Duration, Instant};

/// Minimum window. A window that shrinks below the minimum becomes zero.
const MIN_WINDOW: Duration = Duration::from_micros(4);

/// The polling window of one queue.
#[derive(Debug)]
pub(super) struct AdaptivePoll {
    max_window: Duration,
    window: Duration,
    /// Time since which the queue has had no work.
    idle_since: Option<Instant>,
}

impl AdaptivePoll {
    /// Creates a window that begins at its maximum, `max_window`. Zero disables polling.
    pub(super) fn new(max_window: Duration) -> AdaptivePoll {
        AdaptivePoll { max_window, window: max_window, idle_since: None }
    }

    /// Records work at `now`, and adapts the window to the gap before the work.
    pub(super) fn record_work(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        let gap = now.saturating_duration_since(since);
        self.window = if gap > self.max_window {
            self.window / 2
        } else {
            self.window.max(gap * 2).max(MIN_WINDOW).min(self.max_window)
        };
        if self.window < MIN_WINDOW {
            self.window = Duration::ZERO;
        }
    }

    /// Records that the queue has no work at `now`. Returns whether to poll again instead of sleeping.
    pub(super) fn should_poll(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        now.saturating_duration_since(since) < self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Simulates a gap of `gap` microseconds, followed by work. Returns whether the queue was still polled at the end
    /// of the gap.
    fn polls(poll: &mut AdaptivePoll, start: &mut Instant, gap: u32) -> bool {
        let mut polled = true;
        for us in 0..=gap {
            polled = poll.should_poll(*start + US * us);
        }
        *start += US * gap;
        poll.record_work(*start);
        polled
    }

    #[test]
    fn a_slow_queue_sleeps_and_a_fast_one_is_polled() {
        let (mut poll, mut now) = (AdaptivePoll::new(US * 50), Instant::now());
        assert!(polls(&mut poll, &mut now, 20), "the window begins at its maximum");
        assert!(!polls(&mut poll, &mut now, 60));
        let mut sleeps = 0;
        while poll.should_poll(now) {
            polls(&mut poll, &mut now, 200);
            sleeps += 1;
            assert!(sleeps < 10, "a queue with gaps of 200 us is not worth polling");
        }
        polls(&mut poll, &mut now, 20);
        assert!(polls(&mut poll, &mut now, 20), "gaps of 20 us are, after the first");
        assert!(!polls(&mut AdaptivePoll::new(Duration::ZERO), &mut now, 1));
    }
}
