//! Pseudorandom numbers: splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).

/// Pseudorandom number generator. The numbers depend only on the seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Creates a generator with a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Creates a generator with the seed in `DIFFDISK_SEED`, or `default`, and prints the seed.
    pub fn from_env(default: u64) -> Random {
        let seed = std::env::var("DIFFDISK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(default);
        println!("DIFFDISK_SEED={seed}");
        Random(seed)
    }

    /// Returns a number from the whole range of `u64`.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number below `n` > 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "nothing is below zero");
        self.next_u64() % n
    }

    /// Returns an index below `n` > 0.
    pub fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).expect("below a usize")
    }

    /// Fills `bytes` with random values.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.next_u64().to_be_bytes()[0]);
    }

    /// Returns `true` with probability `yes / of`.
    pub fn chance(&mut self, yes: u64, of: u64) -> bool {
        self.below(of) < yes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_reference_implementation() {
        // First outputs of the reference implementation for seed 1234567.
        let mut r = Random::new(1_234_567);
        assert_eq!(
            [r.next_u64(), r.next_u64(), r.next_u64()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        assert!((0..1000).all(|_| r.below(3) < 3 && !r.chance(0, 5) && r.chance(5, 5)));
    }
}
