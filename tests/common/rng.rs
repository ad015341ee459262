//! A seeded random source (SplitMix64) that prints its seed, so that a failure can be replayed.

/// Random numbers from one seed.
pub(crate) struct Rng(u64);

impl Rng {
    /// The seed of `DIFFDISK_SEED`, or one taken from the clock; printed either way.
    pub(crate) fn from_env(who: &str) -> Rng {
        let seed = match std::env::var("DIFFDISK_SEED") {
            Ok(text) => text.parse().expect("DIFFDISK_SEED is a decimal number"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |t| u64::from(t.subsec_nanos()) ^ (t.as_secs() << 20)),
        };
        println!("{who}: DIFFDISK_SEED={seed}");
        Rng::new(seed)
    }

    /// The seed of `DIFFDISK_SEED`, or `default`; printed either way.
    pub(crate) fn seeded(default: u64) -> Rng {
        let seed = std::env::var("DIFFDISK_SEED").map_or(default, |text| text.parse().expect("a decimal number"));
        println!("DIFFDISK_SEED={seed}");
        Rng::new(seed)
    }

    /// One of several.
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).expect("an index")]
    }

    /// The sequence of this seed.
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[test]
fn a_seed_decides_the_sequence() {
    let (mut a, mut b, mut c) = (Rng::new(7), Rng::new(7), Rng::new(8));
    let run = |r: &mut Rng| (0..4).map(|_| r.below(1000)).collect::<Vec<_>>();
    let first = run(&mut a);
    assert_eq!(first, run(&mut b));
    assert_ne!(first, run(&mut c));
}
