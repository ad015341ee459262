//! R4: one script, run once for each of its operations and each kind of fault. In each run one operation meets the
//! fault.

use diffdisk::storage::sim::{Fault, FaultPlan, Random};
use diffdisk::units::SectorRange;

use crate::checker::Checker;
use crate::layouts::{BLOCK, Layout};
use crate::world::{CheckOptions, World};

/// Kind of fault that one operation meets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FaultKind {
    Io,
    NoSpace,
    Short,
    /// The operation completes after all other operations in flight.
    Late,
}

/// Runs a script of `acts` actions in which operation `at` meets the fault. Returns false if the script has fewer
/// operations.
pub(crate) fn run(
    layout: &Layout,
    acts: u64,
    wrong: FaultKind,
    at: u64,
    checker: &mut Checker,
) -> Result<bool, String> {
    let mut random = Random::new(5);
    let checks = CheckOptions { sample: 0, interval: 1, journal: false };
    let mut world = World::new(layout, 5, 1, checks, checker);
    // In every second run the disk caches only one bitmap sector, so that repeated reads of bitmaps meet faults, too.
    if at.is_multiple_of(2) {
        world.limit_bitmap_cache(1);
    }
    let steps = world.host.counts().steps;
    let fault = match wrong {
        FaultKind::Io => Fault::Io,
        FaultKind::NoSpace => Fault::NoSpace,
        FaultKind::Short => Fault::Short,
        FaultKind::Late => {
            world.set_faults(FaultPlan { late: vec![at], ..FaultPlan::default() });
            return script(&mut world, &mut random, acts, at, None).map_err(|e| add_context(e, &world, wrong, at));
        }
    };
    world.set_faults(FaultPlan { fail: vec![(steps + at, fault)], ..FaultPlan::default() });
    script(&mut world, &mut random, acts, at, Some(steps)).map_err(|e| add_context(e, &world, wrong, at))
}

fn add_context(e: String, world: &World<'_>, wrong: FaultKind, at: u64) -> String {
    let tail = world.trace.len().saturating_sub(40);
    format!("{e}\n  failing operation {at}: {wrong:?}\n  ...\n  {}", world.trace[tail..].join("\n  "))
}

fn script(world: &mut World<'_>, random: &mut Random, acts: u64, at: u64, steps: Option<u64>) -> Result<bool, String> {
    for act in 0..acts {
        let start = random.below(world.sectors() - BLOCK);
        let range = SectorRange::between(start, start + 1 + random.below(BLOCK));
        match act % 10 {
            0..=5 if !world.is_busy(range) => world.write(0, range),
            6 if !world.is_busy(range) => world.zero(0, range, act % 20 < 10),
            7 if !world.is_busy(range) => world.discard(0, range),
            8 => world.flush(0),
            _ => {
                world.finish()?;
                world.read(0, SectorRange::between(0, world.sectors()));
                world.finish()?;
            }
        }
        if act % 3 == 0 {
            world.finish()?;
        }
    }
    world.finish()?;
    let counts = world.host.counts();
    let reached = steps.map_or(counts.submitted >= at, |steps| counts.steps >= steps + at);
    // After a kill or a crash the flushed data must be there, and the disk must take writes.
    if at.is_multiple_of(2) {
        world.kill()?
    } else {
        world.crash()?
    }
    world.write(0, SectorRange::between(0, 3));
    world.flush(0);
    world.finish()?;
    world.crash()?;
    Ok(reached)
}
