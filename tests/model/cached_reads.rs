//! Reads by copies from the page cache, and reads by operations, on the simulated host, compared with a flat array:
//! reads of one and of many extents, copies that fail half-way, and operations that complete in any order.
#![cfg(feature = "sim")]

use std::path::Path;
use std::sync::Arc;

use diffdisk::disk::{Disk, DiskOptions, Outcome, Work};
use diffdisk::image::{self, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::sim::{Fault, FaultPlan, SimHost};
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SECTOR, SectorRange};

use crate::rng::Rng;
use crate::testing::{TestDisk, TestMemory};

const SECTORS: u64 = 2048;
const TOP: &str = "/d/child";

fn host(seed: u64) -> SimHost {
    let host = SimHost::new(seed);
    let block_size = BlockSize::from_bytes(16 << 10).expect("a legal size");
    let spec = |kind| ImageSpec { kind, size: SECTORS * SECTOR, block_size, reserve: 0 };
    image::create(&host, Path::new("/d/root"), &spec(ImageKind::Dynamic)).expect("a new image");
    let root = image::Image::open(host.open(Path::new("/d/root"), Access::Read).expect("it is there")).expect("sound");
    let link = ParentLink {
        uuid: root.uuid(),
        modified: 0,
        relative: Some("root".into()),
        absolute: None,
        name: "root".into(),
    };
    image::create(&host, Path::new(TOP), &spec(ImageKind::Differencing(link))).expect("a new image");
    host.set_cached_reads(true);
    host
}

fn run(seed: u64) -> u64 {
    let host = host(seed);
    let mut model = vec![0u8; (SECTORS * SECTOR) as usize];
    let mut random = Rng::seeded(seed);
    let mut made = 0;
    for path in ["/d/root", TOP] {
        let options = DiskOptions { allow_writable_parent: true, ..DiskOptions::new(path) };
        let disk = Disk::open(Arc::new(host.clone()), &options).expect("the chain opens");
        let mut disk = TestDisk::new(disk, EngineKind::Auto);
        let bytes_of = |range: SectorRange| (range.start() * SECTOR) as usize..(range.end() * SECTOR) as usize;
        for _ in 0..60 {
            let mut range = || {
                let start = random.below(SECTORS);
                SectorRange::between(start, (start + 1 + random.below(100)).min(SECTORS))
            };
            let (written, read) = (range(), [range(), range(), range(), range()]);
            if random.below(4) == 0 {
                disk.discard(vec![written]);
                // A discarded sector may keep its contents or read as zeros, so the model takes over what the disk
                // reads.
                model[bytes_of(written)].copy_from_slice(&disk.read(written));
            } else {
                let data: Vec<u8> = (0..written.bytes()).map(|_| random.below(256) as u8).collect();
                disk.write(written, &data, &[512, 1536]);
                model[bytes_of(written)].copy_from_slice(&data);
            }
            // All reads are in flight at once.
            let memories = read.map(|range| TestMemory::new(&vec![0xEE; range.bytes() as usize]));
            for (range, memory) in read.iter().zip(&memories) {
                disk.submit(Work::Read { range: *range, into: memory.iovecs(&[512, 4096]) });
            }
            assert!(disk.finish().iter().all(|(_, outcome)| *outcome == Outcome::Done), "seed {seed}");
            for (range, memory) in read.iter().zip(memories) {
                assert!(memory.bytes() == model[bytes_of(*range)], "seed {seed}: {range}");
            }
        }
        made += disk.lane.copied_reads();
        disk.flush();
        disk.close();
    }
    made
}

#[test]
fn copies_and_operations_read_the_same() {
    for seed in 0..20 {
        assert!(run(seed) > 100, "seed {seed}: too few reads were copies");
    }
}

/// A read fails if both its copy and the operation that replaces the copy fail.
#[test]
fn a_read_fails_if_copy_and_operation_fail() {
    let host = host(1);
    let disk = Disk::open(Arc::new(host.clone()), &DiskOptions::new(TOP)).expect("the chain opens");
    let mut disk = TestDisk::new(disk, EngineKind::Auto);
    let range = SectorRange::between(0, 8);
    disk.write(range, &[7; 4096], &[512]);
    let steps = host.counts().steps;
    host.set_faults(FaultPlan { fail: (1..1000).map(|n| (steps + n, Fault::Io)).collect(), ..FaultPlan::default() });
    let (mut failed, copies) = (0, disk.lane.copied_reads());
    for _ in 0..40 {
        let memory = TestMemory::new(&[0; 4096]);
        match disk.run(Work::Read { range, into: memory.iovecs(&[512]) }) {
            Outcome::Done => assert!(memory.bytes() == [7; 4096]),
            _ => failed += 1,
        }
    }
    assert!(failed > 5 && disk.lane.copied_reads() > copies + 5, "{failed} of 40 failed");
}

/// A planned copy may fail and become an operation, so the capacity of a lane counts the copy as an operation.
#[test]
fn as_many_reads_as_there_is_room_for_are_answered_once_each() {
    let host = host(2);
    let disk = Disk::open(Arc::new(host), &DiskOptions::new(TOP)).expect("the chain opens");
    let lane = disk.lane(EngineKind::Auto, 4096).expect("a lane");
    let mut disk = TestDisk::new(disk, EngineKind::Auto);
    disk.lane = lane;
    let range = SectorRange::between(0, 8);
    disk.write(range, &[7; 4096], &[512]);
    let (room, copies) = (disk.lane.push_capacity(), disk.lane.copied_reads());
    let mut reads = Vec::new();
    while disk.lane.push_capacity() > 0 {
        let memory = TestMemory::new(&[0; 4096]);
        reads.push((disk.submit(Work::Read { range, into: memory.iovecs(&[512]) }), memory));
    }
    let mut answers = disk.finish();
    answers.sort_unstable_by_key(|(tag, _)| *tag);
    assert!(answers.iter().map(|(tag, _)| *tag).eq(reads.iter().map(|(tag, _)| *tag)), "each read completes once");
    assert!(answers.iter().all(|(_, outcome)| *outcome == Outcome::Done));
    assert!(reads.iter().all(|(_, memory)| memory.bytes() == [7; 4096]));
    let copied = usize::try_from(disk.lane.copied_reads() - copies).expect("a small number");
    assert!(copied > room / 2 && copied < room && reads.len() == room, "{copied} of {} were copied", reads.len());
    assert_eq!(disk.lane.push_capacity(), room);
}

/// If `page_cache_reads` is off, no read is a copy.
#[test]
fn no_read_is_a_copy_if_they_are_off() {
    let copies = |on| {
        let options = DiskOptions { page_cache_reads: on, ..DiskOptions::new(TOP) };
        let disk = Disk::open(Arc::new(host(3)), &options).expect("the chain opens");
        let mut disk = TestDisk::new(disk, EngineKind::Auto);
        let range = SectorRange::between(0, 8);
        disk.write(range, &[7; 4096], &[512]);
        (0..40).for_each(|_| assert!(disk.read(range) == [7; 4096]));
        disk.lane.copied_reads()
    };
    assert!(copies(true) > 5);
    assert_eq!(copies(false), 0);
}
