//! A guest that reads a chain from its start to its end, cold: the same bytes, whether the host was told of them before or not.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use diffdisk::disk::{Outcome, Work};
use diffdisk::storage::EngineKind;
use diffdisk::units::{SECTOR, SectorRange};
use rustix::fs::{Advice, fadvise};

use crate::chain_model::{ChainModel, KIB};
use crate::testing::{TestDisk, TestMemory};

const SIZE: u64 = 24 << 20;

/// Four layers, with pieces of 64 KiB in turns.
fn chain(direct: bool) -> ChainModel {
    let mut world = ChainModel::new(7, EngineKind::Uring, direct);
    for layer in 0..4 {
        world.push(if layer == 0 { "dynamic" } else { "child" }, 2 << 20, SIZE);
        let mut rig = world.open(false);
        for piece in (0..SIZE / (64 * KIB)).filter(|piece| piece % 5 == layer) {
            let start = piece * 64 * KIB / SECTOR;
            let range = SectorRange::between(start, start + 64 * KIB / SECTOR);
            let bytes = world.pattern(range);
            rig.write(range, &bytes, &[]);
            world.model_bytes(range).copy_from_slice(&bytes);
        }
        rig.close();
    }
    world
}

fn drop_page_cache(files: &[PathBuf]) {
    for path in files {
        let file = File::open(path).expect("an image");
        file.sync_all().expect("an image can be synced");
        fadvise(&file, 0, None, Advice::DontNeed).expect("the host takes advice");
    }
}

/// Reads all of the disk, with several requests in flight; bytes that the host was told of.
fn read_all(world: &ChainModel, rig: &mut TestDisk) -> u64 {
    let count = 32 * KIB / SECTOR;
    let all: Vec<u64> = (0..SIZE / SECTOR).step_by(count as usize).collect();
    for some in all.chunks(4) {
        let begun = some.iter().map(|start| {
            let range = SectorRange::between(*start, *start + count);
            let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
            rig.submit(Work::Read { range, into: memory.iovecs(&[]) });
            (range, memory)
        });
        let begun: Vec<_> = begun.collect();
        let over = rig.finish();
        assert_eq!(over.len(), begun.len(), "requests are answered, and nothing else is");
        assert!(over.iter().all(|(_, outcome)| *outcome == Outcome::Done));
        begun.iter().for_each(|(range, memory)| world.compare(*range, &memory.bytes()));
    }
    rig.disk.counters().readahead_bytes.load(Ordering::Relaxed)
}

#[test]
fn what_is_read_ahead_is_what_would_have_been_read() {
    let world = chain(false);
    drop_page_cache(&world.layers);
    let mut rig = world.open(true);
    let told = read_all(&world, &mut rig);
    assert!(told > SIZE / 4, "of {SIZE} bytes that were in no memory, only {told} were read ahead");
    assert!(told <= SIZE * 4 / 5 + (64 << 10), "no byte twice: {told}");
    rig.abandon();

    // Now the host has it all, unless it gave some of it up meanwhile: a single read that waits is enough to begin with.
    let told = |_| {
        let mut rig = world.open(true);
        read_all(&world, &mut rig)
    };
    let all: Vec<u64> = (0..5).map(told).collect();
    assert!(all.iter().any(|told| *told < SIZE / 4), "{all:?} bytes that were in memory");
}

#[test]
fn what_is_written_behind_a_hint_is_read() {
    let mut world = chain(false);
    drop_page_cache(&world.layers);
    let mut rig = world.open(false);
    for n in 0..SIZE / (256 * KIB) {
        let start = n * 256 * KIB / SECTOR;
        let (whole, ahead) = (start + 256 * KIB / SECTOR, (start + 4096).min(SIZE / SECTOR - 8));
        let range = SectorRange::between(ahead, ahead + 8);
        let bytes = world.pattern(range);
        rig.write(range, &bytes, &[]);
        world.model_bytes(range).copy_from_slice(&bytes);
        for at in (start..whole).step_by(64) {
            let got = rig.read(SectorRange::between(at, at + 64));
            world.compare(SectorRange::between(at, at + 64), &got);
        }
    }
    assert!(rig.disk.counters().readahead_bytes.load(Ordering::Relaxed) > 0);
    rig.close();
}

#[test]
fn direct_files_are_not_read_ahead() {
    let world = chain(true);
    let mut rig = world.open(true);
    assert_eq!(read_all(&world, &mut rig), 0);
}
