//! Readahead: a guest reads a chain that is not in the page cache from start to end, and gets the same bytes with and
//! without readahead.

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

/// Makes a chain of four layers. The disk consists of pieces of 64 KiB; of five consecutive pieces, each of the first
/// four has data in another layer, and the last has no data.
fn chain(direct: bool) -> ChainModel {
    let mut chain = ChainModel::new(7, EngineKind::Uring, direct);
    for layer in 0..4 {
        chain.push(if layer == 0 { "dynamic" } else { "child" }, 2 << 20, SIZE);
        let mut disk = chain.open(false);
        for piece in (0..SIZE / (64 * KIB)).filter(|piece| piece % 5 == layer) {
            let start = piece * 64 * KIB / SECTOR;
            let range = SectorRange::between(start, start + 64 * KIB / SECTOR);
            let bytes = chain.pattern(range);
            disk.write(range, &bytes, &[]);
            chain.model_bytes(range).copy_from_slice(&bytes);
        }
        disk.close();
    }
    chain
}

fn drop_page_cache(files: &[PathBuf]) {
    for path in files {
        let file = File::open(path).expect("an image");
        file.sync_all().expect("an image can be synced");
        fadvise(&file, 0, None, Advice::DontNeed).expect("posix_fadvise works");
    }
}

/// Reads the whole disk with several requests in flight. Returns the bytes that were read ahead.
fn read_all(chain: &ChainModel, disk: &mut TestDisk) -> u64 {
    let count = 32 * KIB / SECTOR;
    let all: Vec<u64> = (0..SIZE / SECTOR).step_by(count as usize).collect();
    for some in all.chunks(4) {
        let begun = some.iter().map(|start| {
            let range = SectorRange::between(*start, *start + count);
            let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
            disk.submit(Work::Read { range, into: memory.iovecs(&[]) });
            (range, memory)
        });
        let begun: Vec<_> = begun.collect();
        let over = disk.finish();
        assert_eq!(over.len(), begun.len(), "each request completes once");
        assert!(over.iter().all(|(_, outcome)| *outcome == Outcome::Done));
        begun.iter().for_each(|(range, memory)| chain.compare(*range, &memory.bytes()));
    }
    disk.disk.counters().readahead_bytes.load(Ordering::Relaxed)
}

#[test]
fn readahead_covers_cold_reads_once() {
    let chain = chain(false);
    drop_page_cache(&chain.layers);
    let mut disk = chain.open(true);
    let bytes = read_all(&chain, &mut disk);
    assert!(bytes > SIZE / 4, "of {SIZE} bytes that were not in the page cache, only {bytes} were read ahead");
    assert!(bytes <= SIZE * 4 / 5 + (64 << 10), "more than all data was read ahead: {bytes}");
    disk.abandon();

    // Now the data is in the page cache, unless the kernel has reclaimed some: one read that waits for the medium
    // starts readahead.
    let bytes = |_| {
        let mut disk = chain.open(true);
        read_all(&chain, &mut disk)
    };
    let all: Vec<u64> = (0..5).map(bytes).collect();
    assert!(all.iter().any(|bytes| *bytes < SIZE / 4), "{all:?} bytes were read ahead that were in the page cache");
}

#[test]
fn writes_after_a_readahead_are_read() {
    let mut chain = chain(false);
    drop_page_cache(&chain.layers);
    let mut disk = chain.open(false);
    for n in 0..SIZE / (256 * KIB) {
        let start = n * 256 * KIB / SECTOR;
        let (whole, ahead) = (start + 256 * KIB / SECTOR, (start + 4096).min(SIZE / SECTOR - 8));
        let range = SectorRange::between(ahead, ahead + 8);
        let bytes = chain.pattern(range);
        disk.write(range, &bytes, &[]);
        chain.model_bytes(range).copy_from_slice(&bytes);
        for at in (start..whole).step_by(64) {
            let got = disk.read(SectorRange::between(at, at + 64));
            chain.compare(SectorRange::between(at, at + 64), &got);
        }
    }
    assert!(disk.disk.counters().readahead_bytes.load(Ordering::Relaxed) > 0);
    disk.close();
}

#[test]
fn direct_files_are_not_read_ahead() {
    let chain = chain(true);
    let mut disk = chain.open(true);
    assert_eq!(read_all(&chain, &mut disk), 0);
}
