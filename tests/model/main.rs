//! Random work on chains of every shape, held against a flat array of bytes.
//!
//! kinds x depths (0..8) x block sizes, parents of other block sizes and other disk sizes, both engines, with clean and
//! unclean ends in between. Every disagreement names the seed.
#![allow(unreachable_pub)]
#![allow(clippy::cast_possible_truncation, reason = "disks of a few megabytes")]

mod cached_reads;
mod chain_model;
#[cfg(feature = "sim")]
mod disk_full;
mod early_writeback;
#[path = "../common/memory.rs"]
mod memory;
mod readahead;
#[path = "../common/rng.rs"]
#[allow(dead_code)]
mod rng;
#[path = "../common/temp.rs"]
#[allow(dead_code)]
mod temp;
mod testing;

use chain_model::{ChainModel, KIB};
use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy, Source};
use diffdisk::disk::Work;
use diffdisk::image::Durability;
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;
use testing::{TestDisk, TestMemory};

/// Builds a chain of `depth` children over a root, working on each layer before the next covers it.
fn run(seed: u64, root: &str, blocks: &[u64], sizes: &[u64], depth: usize, engine: EngineKind, direct: bool) {
    let mut world = ChainModel::new(seed, engine, direct);
    for layer in 0..=depth {
        world.push(if layer == 0 { root } else { "child" }, blocks[layer % blocks.len()], sizes[layer % sizes.len()]);
        // Every second layer with too little memory for its bitmaps.
        world.cached_bitmap_sectors = (layer % 2 == 1).then_some(layer / 2 % 4);
        let mut rig = world.open(false);
        world.work(&mut rig, 60);
        if world.random.below(2) == 0 {
            if world.random.below(2) == 0 {
                rig.flush();
            }
            rig.abandon();
            world.check(false);
            let mut rig = world.open(false);
            world.work(&mut rig, 30);
            rig.close();
        } else {
            rig.close();
        }
        world.check(true);
        let mut rig = world.open(true);
        world.compare_all(&mut rig);
        rig.abandon();
    }
    let chain = Chain::open(&*world.env, world.top(), &Policy::default(), OpenMode::Inspect);
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
    // A child may be smaller than its parent, too, and a grandchild larger again: what was cut off stays zero.
    run(42, "dynamic", &blocks, &[9 * 1024 * KIB, 5 * 1024 * KIB + 512], 5, EngineKind::Auto, false);
}

#[test]
fn a_journal_that_is_too_small_and_none_at_all() {
    // More granules than the journal has slots, written without a flush: commits begin by themselves.
    let mut world = ChainModel::new(70, EngineKind::Auto, false);
    world.push("dynamic", 4 * KIB, 20 * 1024 * KIB);
    let mut rig = world.open(false);
    for block in 0..5000 {
        let range = SectorRange::between(block * 8 + 3, block * 8 + 4);
        let bytes = world.pattern(range);
        rig.write(range, &bytes, &[]);
        world.model_bytes(range).copy_from_slice(&bytes);
    }
    rig.abandon();
    let mut rig = world.open(false);
    world.compare_all(&mut rig);
    rig.close();
    // Without a journal every answer is durable.
    let mut world = ChainModel::new(71, EngineKind::Auto, false);
    world.durability = Durability::Commit;
    world.push("dynamic", 64 * KIB, 1024 * KIB);
    world.push("child", 64 * KIB, 1024 * KIB);
    let mut rig = world.open(false);
    world.work(&mut rig, 40);
    rig.abandon();
    let mut rig = world.open(false);
    world.compare_all(&mut rig);
}

#[test]
fn direct_io() {
    run(50, "dynamic", &[2048 * KIB], &[9 * 1024 * KIB + 512], 2, EngineKind::Auto, true);
    run(51, "fixed", &[512 * KIB, 4 * KIB], &[3 * 1024 * KIB], 2, EngineKind::Blocking, true);
}

#[test]
fn a_chain_of_sixty_four() {
    let mut world = ChainModel::new(60, EngineKind::Auto, false);
    for layer in 0..64 {
        world.push(if layer == 0 { "dynamic" } else { "child" }, 64 * KIB, 1024 * KIB);
        let mut rig = world.open(false);
        world.work(&mut rig, 6);
        rig.close();
    }
    let mut rig = world.open(true);
    world.compare_all(&mut rig);
}

#[test]
fn a_write_is_seen_when_it_has_moved_and_not_before() {
    for engine in [EngineKind::Blocking, EngineKind::Auto] {
        let mut world = ChainModel::new(70, engine, false);
        world.push("dynamic", 64 * KIB, 1024 * KIB);
        world.push("child", 64 * KIB, 1024 * KIB);
        let mut rig = world.open(false);
        let range = SectorRange::between(10, 20);
        let memory = TestMemory::new(&[7; 10 * 512]);
        let sources = |rig: &TestDisk| {
            let mut plan = PlanBuffer::default();
            rig.disk.version().plan_read(range, &mut plan);
            plan.extents.iter().map(|e| e.source).collect::<Vec<_>>()
        };
        // Taken, its block has a place, and its bytes are still where they were.
        rig.submit(Work::Write { range, from: memory.iovecs(&[]) });
        assert_eq!(sources(&rig), [Source::Zero]);
        rig.finish();
        assert!(matches!(sources(&rig)[..], [Source::File { .. }]));
        assert_eq!(rig.read(range), [7; 10 * 512]);
        rig.close();
    }
}
