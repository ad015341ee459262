//! Changes of the version that lanes serve: which requests wait. No request is lost, fails, or reads other data.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use diffdisk::disk::{Disk, VersionChange};
use diffdisk::error::ErrorKind;
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

use crate::chain_model::{ChainModel, KIB};
use crate::rng::Rng;
use crate::testing::TestDisk;

/// Sectors of the part of the disk that one thread of the load test uses.
pub(crate) const SHARE: u64 = 4096;

/// Changes the version at most every millisecond until `stop`. Returns the pauses.
fn change_versions(disk: &Arc<Disk>, stop: &AtomicBool) -> Vec<Duration> {
    let mut pauses = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + Duration::from_millis(1);
        let change = VersionChange::move_top(disk).expect("no other change is in progress");
        pauses.push(change.run().expect("the queues respond"));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    pauses
}

/// Writes, reads, zeroes and flushes a part of the disk, and compares each read with the expected bytes. Returns the
/// number of requests, and the expected bytes at the end.
pub(crate) fn verify_under_load(
    disk: &Arc<Disk>,
    engine: EngineKind,
    share: u64,
    start: &Barrier,
    time: Duration,
) -> (u64, Vec<u8>) {
    let mut random = Rng::seeded(share + 100);
    let mut disk = TestDisk::new(disk.clone(), engine);
    let first = share * SHARE;
    let mut model = disk.read(SectorRange::between(first, first + SHARE));
    start.wait();
    let (deadline, mut requests) = (Instant::now() + time, 0);
    while Instant::now() < deadline {
        let from = random.below(SHARE);
        let count = 1 + random.below(64.min(SHARE - from));
        let range = SectorRange::between(first + from, first + from + count);
        let expected = &mut model[(from * 512) as usize..((from + count) * 512) as usize];
        match random.below(10) {
            0..=3 => {
                let byte = random.below(256) as u8;
                expected.fill(byte);
                disk.write(range, expected, &[512]);
            }
            4 => {
                expected.fill(0);
                disk.zero(&[range], random.below(2) == 0);
            }
            5 => disk.flush(),
            _ => assert!(disk.read(range) == *expected, "{range} reads other bytes"),
        }
        requests += 1;
    }
    (requests, model)
}

#[test]
fn versions_change_under_load() {
    for (engine, direct) in [(EngineKind::Auto, false), (EngineKind::Blocking, false), (EngineKind::Auto, true)] {
        let mut chain = ChainModel::new(90, engine, direct);
        for layer in 0..3 {
            chain.push(if layer == 0 { "dynamic" } else { "child" }, 64 * KIB, 3 * SHARE * 512);
            let mut disk = chain.open(false);
            chain.work(&mut disk, 40);
            disk.close();
        }
        let TestDisk { disk, lane, .. } = chain.open(false);
        drop(lane);
        let (stop, start) = (AtomicBool::new(false), Barrier::new(3));
        let time = Duration::from_secs(2);
        let (requests, expected, pauses) = std::thread::scope(|scope| {
            let changer = scope.spawn(|| change_versions(&disk, &stop));
            let load = |share| {
                let (disk, start) = (&disk, &start);
                move || verify_under_load(disk, engine, share, start, time)
            };
            let loads = [0, 1, 2].map(|share| scope.spawn(load(share)));
            let (requests, expected): (Vec<u64>, Vec<Vec<u8>>) =
                loads.into_iter().map(|load| load.join().expect("the load")).unzip();
            stop.store(true, Ordering::Relaxed);
            (requests.iter().sum::<u64>(), expected.concat(), changer.join().expect("the changes"))
        });
        let longest = pauses.iter().max().expect("at least one change");
        println!(
            "{engine:?}, direct {direct}: {} changes, {requests} requests, longest pause {longest:?}",
            pauses.len()
        );
        assert!(pauses.len() > 20 && requests > 100, "{} changes, {requests} requests", pauses.len());
        disk.close().expect("a clean close");
        drop(disk);
        let mut disk = chain.open(true);
        assert!(disk.read(SectorRange::between(0, 3 * SHARE)) == expected, "another disk after it is opened again");
    }
}

#[test]
fn changes_of_several_threads_are_serial() {
    let mut chain = ChainModel::new(93, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 1024 * KIB);
    let TestDisk { disk, lane, .. } = chain.open(false);
    drop(lane);
    // There are more changes than file slots: if a file slot is not freed, or is freed twice, later changes fail.
    let done: usize = std::thread::scope(|scope| {
        let change =
            || (0..2000).filter(|_| VersionChange::move_top(&disk).is_ok_and(|change| change.run().is_ok())).count();
        let threads = [(); 3].map(|()| scope.spawn(change));
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    assert!(done > 300, "{done} changes");
    let mut test = TestDisk::new(disk, EngineKind::Auto);
    test.write(SectorRange::between(1, 2), &[3; 512], &[]);
    test.flush();
    test.close();
    let refused = VersionChange::move_top(&chain.open(true).disk).err().expect("it is refused");
    assert_eq!(refused.kind(), ErrorKind::Refused);
}

#[test]
fn a_read_only_disk_has_no_top_to_move() {
    let mut chain = ChainModel::new(91, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 64 * KIB);
    let disk = chain.open(true);
    let refused = VersionChange::move_top(&disk.disk).err().expect("it is refused");
    assert_eq!(refused.kind(), ErrorKind::Refused);
}

#[test]
fn a_thread_that_does_not_respond_ends_the_change_and_not_the_disk() {
    let mut chain = ChainModel::new(92, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 1024 * KIB);
    // No thread polls the first lane while the change runs.
    let mut silent = chain.open(false);
    let mut other = TestDisk::new(silent.disk.clone(), EngineKind::Auto);
    let late = VersionChange::move_top(&silent.disk).expect("no other change").run().expect_err("a lane is silent");
    assert!(late.kind() == ErrorKind::Busy && late.line().contains("queue thread 0"), "{}", late.line());
    let range = SectorRange::between(3, 9);
    for disk in [&mut other, &mut silent] {
        disk.write(range, &[5; 6 * 512], &[]);
        disk.flush();
        assert_eq!(disk.read(range), [5; 6 * 512]);
    }
    // The file slots of changes that failed are free again.
    for _ in 0..3 {
        let change = VersionChange::move_top(&silent.disk).expect("no other change");
        assert_eq!(VersionChange::move_top(&silent.disk).err().map(|e| e.kind()), Some(ErrorKind::Busy));
        drop(change);
    }
    let TestDisk { disk, lane, .. } = silent;
    drop((lane, other));
    VersionChange::move_top(&disk).expect("no other change").run().expect("a disk without queues");
    disk.close().expect("a clean close");
}

/// The rules of the gate, with operations that complete only when the test lets them.
#[cfg(feature = "sim")]
mod simulated {
    use std::path::Path;

    use super::*;
    use diffdisk::disk::{ChangeStep, DiskOptions, Outcome, Work};
    use diffdisk::image::{self, ImageKind, ImageSpec};
    use diffdisk::storage::sim::SimHost;
    use diffdisk::units::BlockSize;

    use crate::testing::TestMemory;

    fn disk(host: &SimHost) -> TestDisk {
        let block_size = BlockSize::from_bytes(64 << 10).expect("a legal size");
        let spec = ImageSpec { kind: ImageKind::Dynamic, size: 1 << 20, block_size, reserve: 0 };
        let path = Path::new("/d/disk.vhd");
        image::create(host, path, &spec).expect("a new image");
        let disk = Disk::open(Arc::new(host.clone()), &DiskOptions::new(path)).expect("it opens");
        TestDisk::new(disk, EngineKind::Auto)
    }

    fn submit_write(disk: &mut TestDisk, start: u64, byte: u8) -> u64 {
        let from = TestMemory::new(&[byte; 512]).iovecs(&[]);
        disk.submit(Work::Write { range: SectorRange::between(start, start + 1), from })
    }

    /// Begins a change, and tries to take `steps` steps. The lane of the disk is polled after each.
    fn begin_change(disk: &mut TestDisk, steps: u64) -> VersionChange {
        let mut change = VersionChange::move_top(&disk.disk).expect("no other change");
        for _ in 0..steps {
            let _ = change.step().expect("a step");
            disk.poll();
        }
        change
    }

    /// Takes steps until the change is done, or until a step has waited for fifty polls of the lanes.
    fn advance(change: &mut VersionChange, disks: &mut [&mut TestDisk]) -> ChangeStep {
        let mut waits = 0;
        loop {
            match change.step().expect("the lanes register files") {
                ChangeStep::Done => return ChangeStep::Done,
                ChangeStep::Again => waits = 0,
                ChangeStep::Wait if waits == 50 => return ChangeStep::Wait,
                ChangeStep::Wait => {
                    waits += 1;
                    disks.iter_mut().for_each(|disk| disk.poll());
                }
            }
        }
    }

    #[test]
    fn the_gate_waits_for_writes_under_way_and_holds_later_ones() {
        let host = SimHost::new(3);
        let mut disk = disk(&host);
        disk.write(SectorRange::between(0, 1), &[1; 512], &[]);
        host.limit_completions(Some(0));
        let under_way = submit_write(&mut disk, 1, 2);
        disk.poll();
        let epoch_before = Arc::as_ptr(&disk.disk.version());
        let mut change = VersionChange::move_top(&disk.disk).expect("no other change");
        assert_eq!(advance(&mut change, &mut [&mut disk]), ChangeStep::Wait, "a write is under way");
        assert_eq!(Arc::as_ptr(&disk.disk.version()), epoch_before);
        // A later write, a zeroing, a discard and a flush wait. A read does not.
        let submitted = host.counts().submitted;
        let range = SectorRange::between(2, 3);
        let held = [
            submit_write(&mut disk, 2, 3),
            disk.submit(Work::WriteZeroes {
                ranges: vec![diffdisk::disk::ZeroRange { range: SectorRange::between(0, 1), unmap: false }],
            }),
            disk.submit(Work::Discard { ranges: vec![range] }),
            disk.submit(Work::Flush),
        ];
        disk.poll();
        assert_eq!(host.counts().submitted, submitted, "nothing of these was submitted");
        let memory = TestMemory::new(&[0xEE; 512]);
        let read = disk.submit(Work::Read { range: SectorRange::between(0, 1), into: memory.iovecs(&[]) });
        disk.poll();
        assert_eq!(host.counts().submitted, submitted + 1, "the read was submitted");
        host.limit_completions(None);
        while disk.answers().len() < 2 {
            disk.poll();
        }
        let mut answered: Vec<u64> = disk.answers().iter().map(|answer| answer.tag).collect();
        answered.sort_unstable();
        assert_eq!((answered, memory.bytes()), (vec![under_way, read], vec![1; 512]));
        assert_eq!(advance(&mut change, &mut [&mut disk]), ChangeStep::Done);
        let done = disk.finish();
        for tag in held {
            assert!(done.contains(&(tag, Outcome::Done)), "{tag} in {done:?}");
        }
        assert_eq!(disk.read(SectorRange::between(0, 2)), [[0; 512], [2; 512]].concat());
    }

    #[test]
    fn a_change_that_is_given_up_holds_nothing() {
        let host = SimHost::new(4);
        let mut disk = disk(&host);
        for steps in 0..10 {
            let change = begin_change(&mut disk, steps);
            let written = submit_write(&mut disk, steps, 9);
            let flushed = disk.submit(Work::Flush);
            disk.poll();
            drop(change);
            let done = disk.finish();
            assert!([written, flushed].iter().all(|tag| done.contains(&(*tag, Outcome::Done))), "{steps}: {done:?}");
        }
    }

    #[test]
    fn a_lane_that_starts_during_a_change_takes_part_in_it() {
        let host = SimHost::new(5);
        let mut first = disk(&host);
        for steps in 0..10 {
            let mut change = begin_change(&mut first, steps);
            let mut second = TestDisk::new(first.disk.clone(), EngineKind::Auto);
            let tag = submit_write(&mut second, 5, steps as u8 + 1);
            assert_eq!(advance(&mut change, &mut [&mut first, &mut second]), ChangeStep::Done, "after {steps} steps");
            assert_eq!(second.finish(), [(tag, Outcome::Done)]);
            assert_eq!(first.read(SectorRange::between(5, 6)), [steps as u8 + 1; 512]);
        }
    }
}
