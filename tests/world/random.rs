//! R2: random requests on every layout, with crashes, kills, faults and one or two lanes; crash outcomes are checked at
//! random steps.

use diffdisk::storage::sim::{FaultPlan, Random};
use diffdisk::units::SectorRange;

use crate::checker::Checker;
use crate::layouts::{BLOCK, Layout};
use crate::world::{CheckOptions, World};

/// Number of cycles in one run. Each cycle ends in a crash, a kill or a clean close, and the next cycle continues from
/// the resulting state.
const CYCLES: u64 = 6;

/// Whether the run of a seed takes snapshots of the disk.
pub(crate) fn takes_snapshots(seed: u64) -> bool {
    seed % 5 == 4
}

/// Runs one seed. The error contains the trace.
pub(crate) fn run(layouts: &[Layout], seed: u64, checks: CheckOptions, checker: &mut Checker) -> Result<(), String> {
    let mut random = Random::new(seed);
    let layout = &layouts[random.index(layouts.len())];
    let lanes = 1 + random.index(2);
    let takes_snapshots = takes_snapshots(seed);
    let checks = if takes_snapshots { CheckOptions { sample: 6, interval: 8, ..checks } } else { checks };
    checker.snapshots = takes_snapshots;
    let mut world = World::new(layout, random.next_u64(), lanes, checks, checker);
    // In three of four runs the cache is too small for all bitmaps.
    let granules = [None, Some(0), Some(1), Some(4)][(seed / 2 % 4) as usize];
    if let Some(granules) = granules {
        world.limit_bitmap_cache(granules);
    }
    // In one of five runs, the version of the disk changes while requests run.
    if seed % 5 == 3 {
        world.change_versions(Random::new(seed));
    }
    // In another one of five runs, snapshots of the disk are taken.
    if takes_snapshots {
        world.take_snapshots(Random::new(seed));
    }
    let result = run_cycles(&mut world, &mut random);
    result.map_err(|e| {
        let trace = world.trace.join("\n  ");
        let steps = world.host.counts().steps;
        format!(
            "{e}\n  layout: {}, {lanes} lanes, cached bitmap sectors {granules:?}, step {steps}\n  {trace}",
            layout.name
        )
    })
}

fn run_cycles(world: &mut World<'_>, random: &mut Random) -> Result<(), String> {
    for _ in 0..CYCLES {
        random_requests(world, random)?;
        match random.below(4) {
            0 => {
                world.finish()?;
                world.reopen()?;
                if !world.is_open() {
                    world.crash()?;
                }
            }
            1 => world.kill()?,
            _ => world.crash()?,
        }
    }
    world.finish()?;
    world.read(0, SectorRange::between(0, world.sectors()));
    world.finish()
}

/// Submits the random requests of one cycle.
fn random_requests(world: &mut World<'_>, random: &mut Random) -> Result<(), String> {
    // Half of the cycles use only the first four blocks. The others use all blocks, so that the file grows.
    let sectors = if random.chance(1, 2) { world.sectors() } else { 4 * BLOCK };
    let acts = 4 + random.below(24);
    let fault = random.chance(1, 4).then(|| random.below(acts));
    for act in 0..acts {
        if fault == Some(act) {
            plan_fault(world, random);
        }
        let lane = random.index(world.lanes.len());
        let start = random.below(sectors);
        let longest = [1, 3, 8, 20][random.index(4)];
        let range = SectorRange::between(start, (start + 1 + random.below(longest)).min(sectors));
        match random.below(16) {
            0..=8 if !world.is_busy(range) => world.write(lane, range),
            9 if !world.is_busy(range) => world.zero(lane, range, random.chance(1, 2)),
            10 if !world.is_busy(range) => world.discard(lane, range),
            11 if !world.is_busy(range) => world.read(lane, range),
            _ => world.flush(lane),
        }
        for _ in 0..random.below(8) {
            let lane = random.index(world.lanes.len());
            world.step(lane)?;
        }
        if random.chance(1, 6) {
            world.finish()?;
        }
    }
    Ok(())
}

fn plan_fault(world: &mut World<'_>, random: &mut Random) {
    use diffdisk::storage::sim::Fault;
    let steps = world.host.counts().steps;
    let mut plan = FaultPlan::default();
    match random.below(4) {
        0 => plan.capacity = Some(world.allocated() + 4096 * random.below(6)),
        1 => plan.no_allocate = true,
        _ => {
            for _ in 0..1 + random.below(3) {
                let kind = [Fault::Io, Fault::NoSpace, Fault::Short][random.index(3)];
                plan.fail.push((steps + 1 + random.below(30), kind));
            }
        }
    }
    world.set_faults(plan);
}
