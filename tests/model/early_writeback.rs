//! Writing before anybody asks: a guest that flushes after every few writes has the host told to write before, and nothing
//! else is different; what no guest flushes is committed in the background.

use std::sync::atomic::Ordering;

use diffdisk::disk::{Outcome, Work};
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

use crate::chain_model::ChainModel;
use crate::testing::{TestDisk, TestMemory};

const SIZE: u64 = 24 << 20;

/// Rounds of so many writes, each with a flush behind it; how often the host was told.
fn early_writebacks(engine: EngineKind, direct: bool, writes: u64, through: bool) -> u64 {
    let mut world = ChainModel::new(11, engine, direct);
    world.push("dynamic", 2 << 20, SIZE);
    let mut rig = world.open(false);
    rig.disk.set_write_through(through);
    for round in 0..4 {
        for n in 0..writes {
            let start = (round * 7919 + n * 1571) * 8 % (SIZE / 512 - 8);
            let range = SectorRange::between(start, start + 8);
            let bytes = world.pattern(range);
            let memory = TestMemory::new(&bytes);
            // Each is in the host's memory before the next: two to one place have an order.
            assert_eq!(rig.run(Work::Write { range, from: memory.iovecs(&[]) }), Outcome::Done);
            world.model_bytes(range).copy_from_slice(&bytes);
        }
        rig.flush();
    }
    let all = SectorRange::between(0, SIZE / 512);
    world.compare(all, &rig.read(all));
    let told = rig.disk.counters().early_writebacks.load(Ordering::Relaxed);
    rig.close();
    told
}

#[test]
fn the_host_writes_early_where_flushes_come_after_some_writes() {
    assert_eq!(
        early_writebacks(EngineKind::Uring, false, 32, false),
        3 * 4,
        "after the first flush, every eight writes"
    );
    assert_eq!(early_writebacks(EngineKind::Uring, false, 8, false), 0, "there is nothing to win");
    assert_eq!(early_writebacks(EngineKind::Uring, false, 32, true), 0, "each write is a flush");
    assert_eq!(early_writebacks(EngineKind::Blocking, false, 32, false), 0, "the queue would wait for it");
    assert_eq!(early_writebacks(EngineKind::Uring, true, 32, false), 0, "nothing is in the host's memory");
}

/// What nobody flushes becomes durable by itself, whatever the engine, without a request after it.
#[test]
fn what_is_not_flushed_is_committed_in_the_background() {
    for engine in [EngineKind::Uring, EngineKind::Blocking] {
        let mut world = ChainModel::new(12, engine, false);
        world.push("dynamic", 2 << 20, SIZE);
        let mut rig = world.open(false);
        let range = SectorRange::between(8, 16);
        let bytes = world.pattern(range);
        rig.write(range, &bytes, &[]);
        world.model_bytes(range).copy_from_slice(&bytes);
        let commits = |rig: &TestDisk| rig.disk.counters().commits.load(Ordering::Relaxed);
        let before = commits(&rig);
        (0..5).for_each(|_| rig.lane.tick());
        let started = std::time::Instant::now();
        while commits(&rig) == before && started.elapsed().as_secs() < 20 {
            let mut answers = Vec::new();
            rig.lane.poll(&mut answers).expect("the engine works");
            assert!(answers.is_empty(), "nobody asked");
        }
        assert_eq!(commits(&rig), before + 1, "{engine:?}");
        rig.close();
    }
}
