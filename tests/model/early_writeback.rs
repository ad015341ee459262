//! Early writeback: if a guest flushes regularly, with enough writes between two flushes, the daemon starts writeback
//! in the kernel before the next flush. This needs io_uring, writes through the page cache, and a disk that is not
//! write-through. The contents of the disk do not depend on early writeback. Unflushed writes are committed in the
//! background.

use std::sync::atomic::Ordering;

use diffdisk::disk::{Outcome, Work};
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

use crate::chain_model::ChainModel;
use crate::testing::{TestDisk, TestMemory};

const SIZE: u64 = 24 << 20;

/// Runs four rounds of `writes` writes and a flush. Returns how often writeback was started early.
fn early_writebacks(engine: EngineKind, direct: bool, writes: u64, through: bool) -> u64 {
    let mut chain = ChainModel::new(11, engine, direct);
    chain.push("dynamic", 2 << 20, SIZE);
    let mut disk = chain.open(false);
    disk.disk.set_write_through(through);
    for round in 0..4 {
        for n in 0..writes {
            let start = (round * 7919 + n * 1571) * 8 % (SIZE / 512 - 8);
            let range = SectorRange::between(start, start + 8);
            let bytes = chain.pattern(range);
            let memory = TestMemory::new(&bytes);
            // Writes are submitted one after the other, since the order of two writes in flight to one place is
            // undefined.
            assert_eq!(disk.run(Work::Write { range, from: memory.iovecs(&[]) }), Outcome::Done);
            chain.model_bytes(range).copy_from_slice(&bytes);
        }
        disk.flush();
    }
    let all = SectorRange::between(0, SIZE / 512);
    chain.compare(all, &disk.read(all));
    let count = disk.disk.counters().early_writebacks.load(Ordering::Relaxed);
    disk.close();
    count
}

#[test]
fn writeback_starts_early_if_flushes_come_after_several_writes() {
    assert_eq!(
        early_writebacks(EngineKind::Uring, false, 32, false),
        3 * 4,
        "after the first flush, every eight writes"
    );
    assert_eq!(early_writebacks(EngineKind::Uring, false, 8, false), 0, "too few writes before a flush");
    assert_eq!(early_writebacks(EngineKind::Uring, false, 32, true), 0, "each write is durable when it completes");
    assert_eq!(early_writebacks(EngineKind::Blocking, false, 32, false), 0, "the call would block the queue");
    assert_eq!(early_writebacks(EngineKind::Uring, true, 32, false), 0, "direct writes are not in the page cache");
}

/// Unflushed writes are committed by both engines, without a further request.
#[test]
fn what_is_not_flushed_is_committed_in_the_background() {
    for engine in [EngineKind::Uring, EngineKind::Blocking] {
        let mut chain = ChainModel::new(12, engine, false);
        chain.push("dynamic", 2 << 20, SIZE);
        let mut disk = chain.open(false);
        let range = SectorRange::between(8, 16);
        let bytes = chain.pattern(range);
        disk.write(range, &bytes, &[]);
        chain.model_bytes(range).copy_from_slice(&bytes);
        let commits = |disk: &TestDisk| disk.disk.counters().commits.load(Ordering::Relaxed);
        let before = commits(&disk);
        (0..5).for_each(|_| disk.lane.tick());
        let started = std::time::Instant::now();
        while commits(&disk) == before && started.elapsed().as_secs() < 20 {
            let mut answers = Vec::new();
            disk.lane.poll(&mut answers).expect("the engine works");
            assert!(answers.is_empty(), "no request is in flight");
        }
        assert_eq!(commits(&disk), before + 1, "{engine:?}");
        disk.close();
    }
}
