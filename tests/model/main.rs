//! Random work on chains of every shape, held against a flat array of bytes.
//!
//! kinds x depths (0..8) x block sizes, parents of other block sizes and other disk sizes, both engines, with clean and
//! unclean ends in between. Every disagreement names the seed.
#![allow(unreachable_pub)]
#![allow(clippy::cast_possible_truncation, reason = "disks of a few megabytes")]

mod cached_reads;
#[cfg(feature = "sim")]
mod disk_full;
mod early_writeback;
#[path = "../common/memory.rs"]
mod memory;
mod readahead;
#[path = "../common/rng.rs"]
#[allow(dead_code)]
mod rng;
mod testing;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::chain::{OpenMode, Policy};
use diffdisk::disk::{Disk, DiskOptions};
use diffdisk::format::Severity;
use diffdisk::image::{self, Durability, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::host::Host;
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SECTOR, SectorRange};
use rng::Rng;
use testing::{TestDisk, TestMemory};

const KIB: u64 = 1 << 10;

/// A chain under test, and what its disk must read as.
struct ChainModel {
    folder: tempfile::TempDir,
    /// In memory, for live journals.
    _runtime: tempfile::TempDir,
    durability: Durability,
    env: Arc<dyn Env>,
    random: Rng,
    engine: EngineKind,
    direct: bool,
    layers: Vec<PathBuf>,
    /// What the guest must read.
    model: Vec<u8>,
    /// Granules of bitmap that are kept in memory; `None` for as many as the disk likes.
    cached_bitmap_sectors: Option<usize>,
}

impl ChainModel {
    fn new(seed: u64, engine: EngineKind, direct: bool) -> ChainModel {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let runtime = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let journals = Host.runtime_folder(runtime.path()).expect("a folder of ours in memory");
        let keep = Durability::Journal { folders: vec![journals], required: true };
        let (env, random) = (Arc::new(Host), Rng::seeded(seed));
        let (layers, model, granules) = (Vec::new(), Vec::new(), None);
        ChainModel {
            folder,
            _runtime: runtime,
            durability: keep,
            env,
            random,
            engine,
            direct,
            layers,
            model,
            cached_bitmap_sectors: granules,
        }
    }

    fn push(&mut self, kind: &str, block: u64, size: u64) {
        let path = self.folder.path().join(format!("{}.vhd", self.layers.len()));
        let kind = match (kind, self.layers.last()) {
            ("fixed", None) => ImageKind::Fixed,
            ("dynamic", None) => ImageKind::Dynamic,
            (_, parent) => ImageKind::Differencing(link(&*self.env, parent.expect("a child has a parent"))),
        };
        let block_size = BlockSize::from_bytes(block as u32).expect("a legal size");
        image::create(&*self.env, &path, &ImageSpec { kind, size, block_size, reserve: 0 }).expect("a new image");
        self.layers.push(path);
        self.model.resize(size as usize, 0);
    }

    fn top(&self) -> &Path {
        self.layers.last().expect("a chain has a root")
    }

    fn open(&self, read_only: bool) -> TestDisk {
        let options = DiskOptions {
            read_only,
            direct: self.direct,
            keep: self.durability.clone(),
            ..DiskOptions::new(self.top())
        };
        let disk = Disk::open(self.env.clone(), &options).expect("the chain opens");
        if let (Some(granules), Some(top)) = (self.cached_bitmap_sectors, disk.version().top()) {
            top.image.bitmaps().into_iter().for_each(|bitmaps| bitmaps.set_max_frames(granules));
        }
        TestDisk::new(disk, self.engine)
    }

    fn range(&mut self, longest: u64) -> SectorRange {
        let sectors = self.model.len() as u64 / SECTOR;
        let start = self.random.below(sectors);
        let count = 1 + self.random.below(longest.min(sectors - start));
        SectorRange::between(start, start + count)
    }

    fn model_bytes(&mut self, range: SectorRange) -> &mut [u8] {
        &mut self.model[(range.start() * SECTOR) as usize..(range.end() * SECTOR) as usize]
    }

    /// A few hundred random acts on the top, then the whole disk is read.
    fn work(&mut self, rig: &mut TestDisk, acts: usize) {
        for _ in 0..acts {
            match self.random.below(20) {
                0..=8 => {
                    let longest = self.random.pick(&[1, 8, 64, 700, 5000]);
                    let range = self.range(longest);
                    let bytes = self.pattern(range);
                    let cuts = [self.random.below(range.bytes()) as usize, 512 * range.count() as usize / 2];
                    rig.write(range, &bytes, &cuts);
                    self.model_bytes(range).copy_from_slice(&bytes);
                }
                9..=10 => {
                    let (ranges, unmap) = (self.ranges(), self.random.below(2) == 0);
                    rig.zero(&ranges, unmap);
                    ranges.into_iter().for_each(|range| self.model_bytes(range).fill(0));
                }
                11 => {
                    let ranges = self.ranges();
                    rig.discard(ranges.clone());
                    ranges.into_iter().for_each(|range| self.accept_discarded(rig, range));
                }
                12 => rig.flush(),
                13..=14 => self.burst(rig),
                _ => {
                    let range = self.range(3000);
                    let got = rig.read(range);
                    self.compare(range, &got);
                }
            }
        }
        self.compare_all(rig);
    }

    /// Up to three ranges, as one request may name; they may overlap.
    fn ranges(&mut self) -> Vec<SectorRange> {
        (0..1 + self.random.below(3)).map(|_| self.range(5000)).collect()
    }

    /// Each sector is what it was, or zero; from now on it must stay what it is found to be.
    fn accept_discarded(&mut self, rig: &mut TestDisk, range: SectorRange) {
        let now = rig.read(range);
        let seed = self.random.next();
        for (n, (was, is)) in self.model_bytes(range).chunks(512).zip(now.chunks(512)).enumerate() {
            assert!(was == is || is == [0; 512], "{range} sector {n} after discard (near {seed})");
        }
        self.model_bytes(range).copy_from_slice(&now);
    }

    /// Many requests in flight, each on its own part of the disk.
    fn burst(&mut self, rig: &mut TestDisk) {
        let sectors = self.model.len() as u64 / SECTOR;
        let share = sectors / 16;
        let mut reads = Vec::new();
        for n in 0..16 {
            let start = n * share + self.random.below(share);
            let range = SectorRange::between(start, (start + 1 + self.random.below(40)).min((n + 1) * share));
            if self.random.below(2) == 0 {
                let bytes = self.pattern(range);
                let memory = TestMemory::new(&bytes);
                rig.submit(diffdisk::disk::Work::Write { range, from: memory.iovecs(&[]) });
                self.model_bytes(range).copy_from_slice(&bytes);
            } else {
                let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
                rig.submit(diffdisk::disk::Work::Read { range, into: memory.iovecs(&[]) });
                reads.push((range, memory));
            }
        }
        for (tag, outcome) in rig.finish() {
            assert_eq!(outcome, diffdisk::disk::Outcome::Done, "request {tag}");
        }
        for (range, memory) in reads {
            self.compare(range, &memory.bytes());
        }
    }

    fn pattern(&mut self, range: SectorRange) -> Vec<u8> {
        let mark = self.random.next();
        let sector = |n: u64| {
            let mut bytes = [0; 512];
            let text = format!("<layer {} mark {mark:016x} sector {n}>", self.layers.len() - 1);
            bytes.iter_mut().zip(text.as_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
            bytes
        };
        (range.start()..range.end()).flat_map(sector).collect()
    }

    fn compare(&self, range: SectorRange, got: &[u8]) {
        let want = &self.model[(range.start() * SECTOR) as usize..(range.end() * SECTOR) as usize];
        if let Some(n) = want.chunks(512).zip(got.chunks(512)).position(|(a, b)| a != b) {
            let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[n * 512..n * 512 + 64]).into_owned();
            let (sector, depth) = (range.start() + n as u64, self.layers.len());
            panic!("sector {sector} at depth {depth}: want {:?}, got {:?}", show(want), show(got));
        }
    }

    fn compare_all(&self, rig: &mut TestDisk) {
        let sectors = self.model.len() as u64 / SECTOR;
        let mut at = 0;
        while at < sectors {
            let range = SectorRange::between(at, (at + 3001).min(sectors));
            let got = rig.read(range);
            self.compare(range, &got);
            at = range.end();
        }
    }

    fn check(&self, clean: bool) {
        let file = self.env.open(self.top(), Access::Read).expect("it is there");
        let (report, _) = image::check(file).expect("it can be read");
        let bad = report.count(Severity::Corruption) + if clean { report.count(Severity::Leak) } else { 0 };
        assert_eq!(bad, 0, "{:?}", report.defects);
    }
}

fn link(env: &dyn Env, parent: &Path) -> ParentLink {
    let image = image::Image::open(env.open(parent, Access::Read).expect("it is there")).expect("it opens");
    let name = PathBuf::from(parent.file_name().expect("a name"));
    let modified = image.file().stat().expect("it is there").modified;
    ParentLink { uuid: image.uuid(), modified, relative: Some(name.clone()), absolute: Some(parent.to_owned()), name }
}

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
    let chain = diffdisk::chain::Chain::open(&*world.env, world.top(), &Policy::default(), OpenMode::Inspect);
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
            let mut plan = diffdisk::chain::PlanBuffer::default();
            rig.disk.version().plan_read(range, &mut plan);
            plan.extents.iter().map(|e| e.source).collect::<Vec<_>>()
        };
        // Taken, its block has a place, and its bytes are still where they were.
        rig.submit(diffdisk::disk::Work::Write { range, from: memory.iovecs(&[]) });
        assert_eq!(sources(&rig), [diffdisk::chain::Source::Zero]);
        rig.finish();
        assert!(matches!(sources(&rig)[..], [diffdisk::chain::Source::File { .. }]));
        assert_eq!(rig.read(range), [7; 10 * 512]);
        rig.close();
    }
}
