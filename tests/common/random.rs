//! Numbers for random tests, all from one seed that is printed: `DIFFDISK_SEED=N` repeats a run.

/// splitmix64.
pub struct Random(u64);

impl Random {
    /// From `DIFFDISK_SEED`, or `default`.
    pub fn new(default: u64) -> Random {
        let seed = std::env::var("DIFFDISK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(default);
        println!("DIFFDISK_SEED={seed}");
        Random(seed)
    }

    /// Sixty-four random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.next() as usize % of.len()]
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
