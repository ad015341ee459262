//! How long a queue's thread goes on looking for work before it sleeps.
//!
//! To sleep and be woken takes two event counters and tens of microseconds, far more than a read from the page cache.
//! Looking is worth the processor only where work comes within that time, so the wait follows what it would have caught:
//! it grows at once to twice the last gap between two pieces of work, and is halved by every gap that is longer than the
//! longest wait allowed, until a queue that is idle, or slow, sleeps without waiting at all.

use std::time::{Duration, Instant};

/// Shorter waits catch nothing.
const MIN_WINDOW: Duration = Duration::from_micros(4);

/// The wait of one queue.
#[derive(Debug)]
pub(super) struct AdaptivePoll {
    max_window: Duration,
    window: Duration,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
}

impl AdaptivePoll {
    /// At most so long; zero: never.
    pub(super) fn new(max_window: Duration) -> AdaptivePoll {
        AdaptivePoll { max_window, window: max_window, idle_since: None }
    }

    /// There was work at `now`.
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

    /// There is nothing to do at `now`: whether to look once more rather than to sleep.
    pub(super) fn should_poll(&mut self, now: Instant) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        now.saturating_duration_since(since) < self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Whether it still polls at each of these times after work, and then work comes.
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
    fn a_slow_queue_sleeps_and_a_fast_one_is_looked_at() {
        let (mut poll, mut now) = (AdaptivePoll::new(US * 50), Instant::now());
        assert!(polls(&mut poll, &mut now, 20), "it begins with hope");
        assert!(!polls(&mut poll, &mut now, 60));
        let mut sleeps = 0;
        while poll.should_poll(now) {
            polls(&mut poll, &mut now, 200);
            sleeps += 1;
            assert!(sleeps < 10, "a queue with gaps of 200 us is not worth looking at");
        }
        polls(&mut poll, &mut now, 20);
        assert!(polls(&mut poll, &mut now, 20), "gaps of 20 us are, after the first");
        assert!(!polls(&mut AdaptivePoll::new(Duration::ZERO), &mut now, 1));
    }
}
