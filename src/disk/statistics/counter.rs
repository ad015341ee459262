//! A counter with one writer and any number of readers.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that one thread increases. A load and a store cost less than an atomic addition (1 ns and 8 ns), and
/// suffice because no other thread stores. Readers see a recent value.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(super) const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds `n`. Only the thread of the lane may call this: additions of two threads could be lost.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Returns the current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_see_a_value_that_never_decreases() {
        let counter = Counter::new();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..100_000).for_each(|_| counter.add(3)));
            let mut last = 0;
            while last < 300_000 {
                let now = counter.get();
                assert!(now >= last && now.is_multiple_of(3));
                last = now;
            }
        });
        assert_eq!(counter.get(), 300_000);
    }
}
