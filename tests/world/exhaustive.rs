//! R1: short workloads on four layouts. At every step of a workload's last action all crash outcomes are checked, or a
//! sample if there are many.

use diffdisk::storage::sim::CompletionOrder;
use diffdisk::units::SectorRange;

use crate::checker::Checker;
use crate::layouts::{BLOCK, Layout};
use crate::world::{CheckOptions, World};

/// An action of the guest or the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// A write to part of the first block. If repeated, it is an overwrite.
    WriteFirst,
    /// A write to a sector of a later block.
    WriteLater,
    /// A write to the end of the first block and the beginning of the next.
    WriteAcross,
    Flush,
    /// A flush with one write before it and four writes while it runs.
    FlushAmongWrites,
    Zero,
    Reopen,
    Kill,
    Discard,
    /// A flush whose first sync fails, if the flush needs one, then a crash.
    FailSync,
}

pub(crate) const ALL: [Action; 10] = [
    Action::WriteFirst,
    Action::WriteLater,
    Action::WriteAcross,
    Action::Flush,
    Action::FlushAmongWrites,
    Action::Zero,
    Action::Reopen,
    Action::Kill,
    Action::Discard,
    Action::FailSync,
];

/// Runs workloads of `len` actions that use only the first `kinds` kinds of actions. The workloads are numbered. Every
/// `of`-th workload runs, beginning with number `share`. Returns the number of workloads run.
pub(crate) fn run_all(
    layout: &Layout,
    len: u32,
    kinds: usize,
    (share, of): (usize, usize),
    checker: &mut Checker,
) -> Result<u64, String> {
    let mut runs = 0;
    for number in (share..kinds.pow(len)).step_by(of) {
        let acts: Vec<Action> = (0..len).map(|n| ALL[number / kinds.pow(n) % kinds]).collect();
        // Two consecutive flushes or reopens are left out, since the second has no effect.
        if acts.windows(2).any(|w| w[0] == w[1] && matches!(w[0], Action::Flush | Action::Reopen)) {
            continue;
        }
        run(layout, &acts, checker).map_err(|e| format!("{e}\n  layout: {}, workload: {acts:?}", layout.name))?;
        runs += 1;
    }
    Ok(runs)
}

/// Runs one workload and checks crash outcomes during its last action only. Each earlier action is the last one of a
/// shorter workload, which is checked on its own.
fn run(layout: &Layout, acts: &[Action], checker: &mut Checker) -> Result<(), String> {
    let blind = CheckOptions { sample: 0, interval: 1, journal: false };
    let mut world = World::new(layout, 1, 1, blind, checker);
    world.host.set_order(CompletionOrder::Pushed);
    let (last, before) = acts.split_last().expect("a workload has acts");
    let result = (|| {
        before.iter().try_for_each(|act| perform(&mut world, *act))?;
        world.checks = CheckOptions { sample: 256, ..blind };
        perform(&mut world, *last)
    })();
    result.map_err(|e: String| format!("{e}\n  {}", world.trace.join("\n  ")))
}

fn perform(world: &mut World<'_>, act: Action) -> Result<(), String> {
    match act {
        Action::WriteFirst => world.write(0, SectorRange::between(1, 3)),
        Action::WriteLater => world.write(0, SectorRange::between(2 * BLOCK + 4, 2 * BLOCK + 5)),
        Action::WriteAcross => world.write(0, SectorRange::between(BLOCK - 1, BLOCK + 1)),
        Action::Zero => world.zero(0, SectorRange::between(2, 4), true),
        Action::Discard => world.discard(0, SectorRange::between(0, BLOCK)),
        Action::Flush => world.flush(0),
        Action::FlushAmongWrites => {
            // The writes go to the block of the first write and to another block.
            world.write(0, SectorRange::between(1, 2));
            world.flush(0);
            for sector in [3 * BLOCK, 4, 3 * BLOCK + 1, 5] {
                world.step(0)?;
                world.write(0, SectorRange::between(sector, sector + 1));
                world.step(0)?;
            }
        }
        Action::Reopen => return world.reopen(),
        Action::Kill => return world.kill(),
        Action::FailSync => {
            world.fail_sync()?;
            return world.crash();
        }
    }
    world.finish()
}
