//! R9: the file system becomes full at every point of a script. The script runs with no free page, with one, with two,
//! and so on, until the limit affects no request.

use diffdisk::disk::{Allocation, WhenFull};
use diffdisk::storage::sim::{FaultPlan, Random};
use diffdisk::units::SectorRange;

use crate::checker::Checker;
use crate::layouts::Layout;
use crate::world::{CheckOptions, SpacePolicy, World};

/// Number of actions in the script.
const ACTS: u64 = 24;
/// Bytes in a page of the simulated host.
const PAGE: u64 = 4096;

/// Event at the end of the script, when the file system may be full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    /// Space is freed.
    Freed,
    /// The process is killed.
    Killed,
    /// The power fails.
    PowerCut,
}

/// Runs all cases on one layout. Returns the number of runs.
pub(crate) fn run_all(layout: &Layout, checker: &mut Checker) -> Result<u64, String> {
    let mut runs = 0;
    for (when_full, allocation) in [
        (WhenFull::Park, Allocation::Sparse),
        (WhenFull::Park, Allocation::Block),
        (WhenFull::Fail, Allocation::Sparse),
        (WhenFull::Fail, Allocation::Block),
    ] {
        for copy_on_write in [false, true] {
            for end in [Ending::Freed, Ending::Killed, Ending::PowerCut] {
                let policy = SpacePolicy { when_full, allocation };
                let mut pages = 0;
                loop {
                    runs += 1;
                    let tell = |e| {
                        format!("{e}\n  {}, {policy:?}, copies {copy_on_write}, {end:?}, {pages} pages", layout.name)
                    };
                    if !run(layout, policy, copy_on_write, end, pages, checker).map_err(tell)? {
                        break;
                    }
                    pages += 1;
                }
                if pages < 10 {
                    return Err(format!("{}, {policy:?}: the script needs only {pages} pages", layout.name));
                }
            }
        }
    }
    Ok(runs)
}

/// Runs the script with `pages` free pages. Returns whether the limit affected a request.
fn run(
    layout: &Layout,
    policy: SpacePolicy,
    copy_on_write: bool,
    end: Ending,
    pages: u64,
    checker: &mut Checker,
) -> Result<bool, String> {
    let checks = CheckOptions { sample: 0, interval: 1, journal: true };
    let roomy = FaultPlan { copy_on_write, ..FaultPlan::default() };
    let mut world = World::with_faults(layout, 7 + pages, 1, checks, checker, policy, &roomy);
    let room = world.host.allocated_bytes() + pages * PAGE;
    let plan = FaultPlan { capacity: Some(room), ..roomy.clone() };
    match policy.when_full {
        WhenFull::Fail => world.set_faults(plan),
        // With `Park` no request may fail: a request without space waits.
        WhenFull::Park => world.host.set_faults(plan),
    }
    let result = script(&mut world, end, &roomy);
    result.map_err(|e| format!("{e}\n  {}", world.trace.join("\n  ")))
}

fn script(world: &mut World<'_>, end: Ending, roomy: &FaultPlan) -> Result<bool, String> {
    let mut random = Random::new(3);
    for act in 0..ACTS {
        let start = random.below(world.sectors() - 12);
        let range = SectorRange::between(start, start + 1 + random.below(12));
        match act % 4 {
            3 => world.flush(0),
            2 if !world.is_busy(range) && act % 8 == 6 => world.zero(0, range, true),
            _ if !world.is_busy(range) => world.write(0, range),
            _ => {}
        }
        for _ in 0..random.below(12) {
            world.step(0)?;
        }
        if act % 5 == 4 {
            world.lanes[0].tick();
        }
    }
    // After these steps every request that needs no space is complete, and a commit that needs space has been tried
    // more than once.
    for _ in 0..3 {
        for _ in 0..200 {
            world.step(0)?;
        }
        world.lanes[0].tick();
    }
    if world.host.counts().failed_syncs > 0 {
        return Err("a full file system poisons the image".into());
    }
    let met = world.in_flight() > 0 || world.trace.iter().any(|line| line.ends_with("failed"));
    match end {
        Ending::Freed => {
            world.free_space(roomy);
            world.lanes[0].tick();
            world.finish()?;
            // With free space no request fails, under either policy.
            world.write(0, SectorRange::between(0, 9));
            world.flush(0);
            world.finish()?;
            world.read(0, SectorRange::between(0, world.sectors()));
            world.finish()?;
            world.kill()?;
        }
        Ending::Killed => world.kill()?,
        Ending::PowerCut => world.crash()?,
    }
    world.write(0, SectorRange::between(3, 5));
    world.flush(0);
    world.finish()?;
    world.crash()?;
    Ok(met)
}
