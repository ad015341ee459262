//! How long a queue's thread goes on looking for work before it sleeps.
//!
//! To sleep and be woken takes two event counters and tens of microseconds, far more than a read from the page cache.
//! Looking is worth the processor only where work comes within that time, so the wait follows what it would have caught:
//! it grows at once to twice the last gap between two pieces of work, and is halved by every gap that is longer than the
//! longest wait allowed, until a queue that is idle, or slow, sleeps without waiting at all.

use std::time::{Duration, Instant};

/// Shorter waits catch nothing.
const LEAST: Duration = Duration::from_micros(4);

/// The wait of one queue.
#[derive(Debug)]
pub(super) struct Patience {
    most: Duration,
    now: Duration,
    /// Since when there is nothing to do.
    idle: Option<Instant>,
}

impl Patience {
    /// At most so long; zero: never.
    pub(super) fn new(most: Duration) -> Patience {
        Patience { most, now: most, idle: None }
    }

    /// There was work at `now`.
    pub(super) fn busy(&mut self, now: Instant) {
        let Some(since) = self.idle.take() else { return };
        let gap = now.saturating_duration_since(since);
        self.now = if gap > self.most { self.now / 2 } else { self.now.max(gap * 2).max(LEAST).min(self.most) };
        if self.now < LEAST {
            self.now = Duration::ZERO;
        }
    }

    /// There is nothing to do at `now`: whether to look once more rather than to sleep.
    pub(super) fn waits(&mut self, now: Instant) -> bool {
        let since = *self.idle.get_or_insert(now);
        now.saturating_duration_since(since) < self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Whether it still looks at each of these times after work, and then work comes.
    fn looks(patience: &mut Patience, start: &mut Instant, gap: u32) -> bool {
        let mut looked = true;
        for us in 0..=gap {
            looked = patience.waits(*start + US * us);
        }
        *start += US * gap;
        patience.busy(*start);
        looked
    }

    #[test]
    fn a_slow_queue_sleeps_and_a_fast_one_is_looked_at() {
        let (mut patience, mut now) = (Patience::new(US * 50), Instant::now());
        assert!(looks(&mut patience, &mut now, 20), "it begins with hope");
        assert!(!looks(&mut patience, &mut now, 60));
        let mut sleeps = 0;
        while patience.waits(now) {
            looks(&mut patience, &mut now, 200);
            sleeps += 1;
            assert!(sleeps < 10, "a queue with gaps of 200 us is not worth looking at");
        }
        looks(&mut patience, &mut now, 20);
        assert!(looks(&mut patience, &mut now, 20), "gaps of 20 us are, after the first");
        assert!(!looks(&mut Patience::new(Duration::ZERO), &mut now, 1));
    }
}
