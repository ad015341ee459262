//! R1: every short workload on every layout, and every fate of every moment of it.

use diffdisk::storage::sim::CompletionOrder;
use diffdisk::units::SectorRange;

use crate::judge::Judge;
use crate::layouts::{BLOCK, Layout};
use crate::world::{Care, World};

/// What a guest and its host may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Act {
    /// Part of the first block; again: an overwrite.
    WriteFirst,
    /// A sector of a later block.
    WriteLater,
    /// The end of the first block and the beginning of the next.
    WriteAcross,
    Flush,
    /// A flush, with a write before each of its steps.
    FlushAmongWrites,
    Zero,
    Reopen,
    Kill,
    Discard,
    /// A flush whose sync fails; then a crash.
    FailSync,
}

pub(crate) const ALL: [Act; 10] = [
    Act::WriteFirst,
    Act::WriteLater,
    Act::WriteAcross,
    Act::Flush,
    Act::FlushAmongWrites,
    Act::Zero,
    Act::Reopen,
    Act::Kill,
    Act::Discard,
    Act::FailSync,
];

/// Every workload of `len` acts out of the first `kinds` whose number is `share` modulo `of`; how many there were.
pub(crate) fn all(
    layout: &Layout,
    len: u32,
    kinds: usize,
    (share, of): (usize, usize),
    judge: &mut Judge,
) -> Result<u64, String> {
    let mut runs = 0;
    for number in (share..kinds.pow(len)).step_by(of) {
        let acts: Vec<Act> = (0..len).map(|n| ALL[number / kinds.pow(n) % kinds]).collect();
        // Twice the same of these is once.
        if acts.windows(2).any(|w| w[0] == w[1] && matches!(w[0], Act::Flush | Act::Reopen)) {
            continue;
        }
        run(layout, &acts, judge).map_err(|e| format!("{e}\n  layout: {}, workload: {acts:?}", layout.name))?;
        runs += 1;
    }
    Ok(runs)
}

/// One workload. Only its last act is looked at: the others are the last of shorter ones.
fn run(layout: &Layout, acts: &[Act], judge: &mut Judge) -> Result<(), String> {
    let blind = Care { sample: 0, every: 1, journal: false };
    let mut world = World::new(layout, 1, 1, blind, judge);
    world.host.set_order(CompletionOrder::Pushed);
    let (last, before) = acts.split_last().expect("a workload has acts");
    let result = (|| {
        before.iter().try_for_each(|act| carry_out(&mut world, *act))?;
        world.care = Care { sample: 256, ..blind };
        carry_out(&mut world, *last)
    })();
    result.map_err(|e: String| format!("{e}\n  {}", world.trace.join("\n  ")))
}

fn carry_out(world: &mut World<'_>, act: Act) -> Result<(), String> {
    match act {
        Act::WriteFirst => world.write(0, SectorRange::between(1, 3)),
        Act::WriteLater => world.write(0, SectorRange::between(2 * BLOCK + 4, 2 * BLOCK + 5)),
        Act::WriteAcross => world.write(0, SectorRange::between(BLOCK - 1, BLOCK + 1)),
        Act::Zero => world.zero(0, SectorRange::between(2, 4), true),
        Act::Discard => world.discard(0, SectorRange::between(0, BLOCK)),
        Act::Flush => world.flush(0),
        Act::FlushAmongWrites => {
            // One write that has begun before the flush, and one in each of its steps, here and in other blocks.
            world.write(0, SectorRange::between(1, 2));
            world.flush(0);
            for sector in [3 * BLOCK, 4, 3 * BLOCK + 1, 5] {
                world.step(0)?;
                world.write(0, SectorRange::between(sector, sector + 1));
                world.step(0)?;
            }
        }
        Act::Reopen => return world.reopen(),
        Act::Kill => return world.kill(),
        Act::FailSync => {
            world.fail_sync()?;
            return world.crash();
        }
    }
    world.finish()
}
