//! Random requests on chains of every shape, compared with a flat array of bytes.
//!
//! The chains differ in the type of the root, in depth (0 to 8, and 63), and in the block sizes and disk sizes of their
//! layers. The runs differ in the engine, in O_DIRECT, and in whether a disk is closed or abandoned as by a kill. Each
//! random test prints its seed.
#![allow(unreachable_pub)]
#![allow(clippy::cast_possible_truncation, reason = "disks of a few megabytes")]

mod cached_reads;
mod chain_model;
#[cfg(feature = "sim")]
mod disk_full;
mod early_writeback;
#[cfg(feature = "sim")]
mod events;
#[cfg(feature = "sim")]
mod gated_host;
mod live_resize;
#[cfg(feature = "sim")]
mod live_resize_faults;
#[path = "../common/memory.rs"]
mod memory;
mod readahead;
#[path = "../common/rng.rs"]
#[allow(dead_code)]
mod rng;
mod snapshot;
#[path = "../common/temp.rs"]
#[allow(dead_code)]
mod temp;
mod testing;
mod version_change;

use chain_model::{ChainModel, KIB};
use diffdisk::chain::{Chain, FrozenCacheHandle, OpenMode, PlanBuffer, Policy, Source};
use diffdisk::disk::Work;
use diffdisk::image::Durability;
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;
use testing::{TestDisk, TestMemory};

/// Builds a chain of `depth` children over a root, with random requests on each layer before the next one is added.
fn run(seed: u64, root: &str, blocks: &[u64], sizes: &[u64], depth: usize, engine: EngineKind, direct: bool) {
    let mut chain = ChainModel::new(seed, engine, direct);
    for layer in 0..=depth {
        chain.push(if layer == 0 { root } else { "child" }, blocks[layer % blocks.len()], sizes[layer % sizes.len()]);
        // Every second layer has too little memory for its bitmaps.
        chain.cached_bitmap_sectors = (layer % 2 == 1).then_some(layer / 2 % 4);
        let mut disk = chain.open(false);
        chain.work(&mut disk, 60);
        if chain.random.below(2) == 0 {
            if chain.random.below(2) == 0 {
                disk.flush();
            }
            disk.abandon();
            chain.check(false);
            let mut disk = chain.open(false);
            chain.work(&mut disk, 30);
            disk.close();
        } else {
            disk.close();
        }
        chain.check(true);
        let mut disk = chain.open(true);
        chain.compare_all(&mut disk);
        disk.abandon();
    }
    let chain = Chain::open(&*chain.env, chain.top(), &Policy::default(), OpenMode::Inspect);
    assert_eq!(chain.expect("it opens").images().len(), depth + 1);
}

#[test]
fn two_mebibyte_blocks() {
    for depth in 0..=8 {
        run(depth as u64, "dynamic", &[2048 * KIB], &[9 * 1024 * KIB + 512], depth, EngineKind::Auto, false);
    }
}

#[test]
fn small_blocks() {
    for (seed, block) in [(10, 4 * KIB), (11, 16 * KIB), (12, 512 * KIB)] {
        for depth in [0, 1, 3, 8] {
            run(seed, "dynamic", &[block], &[3 * 1024 * KIB + 1536], depth, EngineKind::Auto, false);
        }
    }
}

#[test]
fn large_blocks() {
    run(20, "dynamic", &[16 * 1024 * KIB], &[40 * 1024 * KIB], 2, EngineKind::Auto, false);
    run(21, "fixed", &[64 * 1024 * KIB], &[70 * 1024 * KIB], 1, EngineKind::Auto, false);
}

#[test]
fn fixed_roots_and_the_blocking_engine() {
    for depth in [0, 1, 4] {
        run(30, "fixed", &[2048 * KIB], &[5 * 1024 * KIB + 512], depth, EngineKind::Blocking, false);
    }
}

#[test]
fn parents_of_other_block_sizes_and_other_disk_sizes() {
    let blocks = [2048 * KIB, 4 * KIB, 512 * KIB, 8192 * KIB, 64 * KIB];
    let sizes = [4 * 1024 * KIB, 9 * 1024 * KIB + 512, 9 * 1024 * KIB + 512, 13 * 1024 * KIB];
    for (seed, root) in [(40, "dynamic"), (41, "fixed")] {
        run(seed, root, &blocks, &sizes, 8, EngineKind::Auto, false);
    }
    // A child smaller than its parent, and a grandchild larger again: the part that the child cut off reads as zeros.
    run(42, "dynamic", &blocks, &[9 * 1024 * KIB, 5 * 1024 * KIB + 512], 5, EngineKind::Auto, false);
}

#[test]
fn a_journal_that_is_too_small_and_none_at_all() {
    // More bitmap sectors than the journal has slots are written without a flush, so commits begin by themselves.
    let mut chain = ChainModel::new(70, EngineKind::Auto, false);
    chain.push("dynamic", 4 * KIB, 20 * 1024 * KIB);
    let mut disk = chain.open(false);
    for block in 0..5000 {
        let range = SectorRange::between(block * 8 + 3, block * 8 + 4);
        let bytes = chain.pattern(range);
        disk.write(range, &bytes, &[]);
        chain.model_bytes(range).copy_from_slice(&bytes);
    }
    disk.abandon();
    let mut disk = chain.open(false);
    chain.compare_all(&mut disk);
    disk.close();
    // Without a journal every acknowledged write is durable.
    let mut chain = ChainModel::new(71, EngineKind::Auto, false);
    chain.durability = Durability::Commit;
    chain.push("dynamic", 64 * KIB, 1024 * KIB);
    chain.push("child", 64 * KIB, 1024 * KIB);
    let mut disk = chain.open(false);
    chain.work(&mut disk, 40);
    disk.abandon();
    let mut disk = chain.open(false);
    chain.compare_all(&mut disk);
}

#[test]
fn direct_io() {
    run(50, "dynamic", &[2048 * KIB], &[9 * 1024 * KIB + 512], 2, EngineKind::Auto, true);
    run(51, "fixed", &[512 * KIB, 4 * KIB], &[3 * 1024 * KIB], 2, EngineKind::Blocking, true);
}

#[test]
fn a_chain_of_sixty_four() {
    let mut chain = ChainModel::new(60, EngineKind::Auto, false);
    for layer in 0..64 {
        chain.push(if layer == 0 { "dynamic" } else { "child" }, 64 * KIB, 1024 * KIB);
        let mut disk = chain.open(false);
        chain.work(&mut disk, 6);
        disk.close();
    }
    let mut disk = chain.open(true);
    chain.compare_all(&mut disk);
}

#[test]
fn a_write_is_seen_when_it_has_moved_and_not_before() {
    for engine in [EngineKind::Blocking, EngineKind::Auto] {
        let mut chain = ChainModel::new(70, engine, false);
        chain.push("dynamic", 64 * KIB, 1024 * KIB);
        chain.push("child", 64 * KIB, 1024 * KIB);
        let mut disk = chain.open(false);
        let range = SectorRange::between(10, 20);
        let memory = TestMemory::new(&[7; 10 * 512]);
        let sources = |disk: &TestDisk| {
            let mut plan = PlanBuffer::default();
            disk.disk.version().plan_read(range, &mut FrozenCacheHandle::default(), &mut plan);
            plan.extents.iter().map(|e| e.source).collect::<Vec<_>>()
        };
        // The write is in flight and its block is reserved, but reads still see the old contents.
        disk.submit(Work::Write { range, from: memory.iovecs(&[]) });
        assert_eq!(sources(&disk), [Source::Zero]);
        disk.finish();
        assert!(matches!(sources(&disk)[..], [Source::File { .. }]));
        assert_eq!(disk.read(range), [7; 10 * 512]);
        disk.close();
    }
}
