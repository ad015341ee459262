//! Random numbers for tests and benchmarks: SplitMix64, the generator of the simulated host, with a printed seed so
//! that a failure can be replayed.

/// The generator. Its source file is included, because the library exports the module only with the feature `sim`.
#[path = "../../src/random.rs"]
#[allow(dead_code, unreachable_pub, unused_imports, reason = "it is written for the library")]
mod split_mix;

/// A stream of random numbers that depends only on its seed.
pub(crate) struct Rng(split_mix::Random);

impl Rng {
    /// Starts the stream of the seed in `DIFFDISK_SEED`, or of a seed taken from the clock. Prints `test` and the seed.
    pub(crate) fn from_env(test: &str) -> Rng {
        let seed = seed_of_env().unwrap_or_else(|| {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            since.map_or(1, |t| u64::from(t.subsec_nanos()) ^ (t.as_secs() << 20))
        });
        println!("{test}: DIFFDISK_SEED={seed}");
        Rng::new(seed)
    }

    /// Starts the stream of the seed in `DIFFDISK_SEED`, or of `default`. Prints the seed.
    pub(crate) fn seeded(default: u64) -> Rng {
        Rng::new(seed_or(default))
    }

    /// Starts the stream of `seed`. Prints nothing.
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(split_mix::Random::new(seed))
    }

    /// Returns the next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns a random number below `end`. `end` must not be zero.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0.below(end)
    }

    /// Returns a random element of `items`.
    pub(crate) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.0.index(items.len())]
    }
}

/// Returns the seed in `DIFFDISK_SEED`, or `default`, and prints it.
pub(crate) fn seed_or(default: u64) -> u64 {
    let seed = seed_of_env().unwrap_or(default);
    println!("DIFFDISK_SEED={seed}");
    seed
}

/// Returns the seed in `DIFFDISK_SEED`, if the variable is set.
pub(crate) fn seed_of_env() -> Option<u64> {
    let text = std::env::var("DIFFDISK_SEED").ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("DIFFDISK_SEED={text} is not a decimal number")))
}

#[test]
fn a_seed_decides_the_sequence() {
    let (mut a, mut b, mut c) = (Rng::new(7), Rng::new(7), Rng::new(8));
    let run = |r: &mut Rng| (0..4).map(|_| r.below(1000)).collect::<Vec<_>>();
    let first = run(&mut a);
    assert_eq!(first, run(&mut b));
    assert_ne!(first, run(&mut c));
}
