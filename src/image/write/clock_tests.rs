//! Bitmap sectors that are evicted and read again while threads mark, read and commit: no mark is lost.
//!
//! `DIFFDISK_SEED=<seed> cargo test --features sim --lib clock_tests` runs one seed alone.
#![allow(clippy::cast_possible_truncation, reason = "disks of a few megabytes")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use tempfile::TempDir;

use crate::image::testing::{SLOT, child};
use crate::image::{Commit, Durability, Growth, Image, ImageSpec, Pins, Writable, create, run_to_completion};
#[cfg(feature = "mutants")]
use crate::mutant::Mutant;
use crate::storage::host::Host;
use crate::storage::sim::Random;
use crate::storage::{Access, Env};
use crate::units::{BitmapSectorIndex, BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

// States of a sector, in order: not written (0), write begun, mark returned, bit in the journal or committed.
const BEGUN: u8 = 1;
const MARKED: u8 = 2;
const KEPT: u8 = 3;

/// An image that several threads use, and the states of its sectors.
struct SharedImage {
    folder: TempDir,
    runtime: TempDir,
    image: Arc<Writable>,
    sectors: Vec<AtomicU8>,
    over: AtomicBool,
    commits: AtomicU64,
    seed: u64,
}

impl SharedImage {
    /// Closes the image cleanly. The caller has committed it.
    fn end(&self) {
        self.image.end_session();
        self.image.trim().unwrap();
        self.image.remove_journal().unwrap();
    }

    fn new(seed: u64, block_size: u32, bitmap_sectors: u64) -> SharedImage {
        let (folder, runtime) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let block_size = BlockSize::from_bytes(block_size).unwrap();
        let sectors = bitmap_sectors * u64::from(block_size.sectors().min(4096));
        let spec = ImageSpec { kind: child(), size: sectors * SECTOR, block_size, reserve: 0 };
        create(&Host, &folder.path().join("a.vhd"), &spec).unwrap();
        let image = open(&folder, &runtime);
        let sectors = (0..sectors).map(|_| AtomicU8::new(0)).collect();
        SharedImage { folder, runtime, image, sectors, over: AtomicBool::new(false), commits: AtomicU64::new(0), seed }
    }

    /// Reads and inserts a bitmap sector of a block that has a place, as a lane does.
    fn load(&self, index: BitmapSectorIndex, pins: &mut Pins, slow: bool) {
        let evictions = self.image.bitmaps().unwrap().eviction_count(index);
        let mut bytes = [0; SECTOR_BYTES];
        self.image.file().read_at(&mut bytes, self.image.bitmap_sector_offset(index)).unwrap();
        if slow {
            // Two commits end before the insertion.
            let until = self.commits.load(Ordering::SeqCst) + 2;
            let is_over = || self.commits.load(Ordering::SeqCst) >= until || self.over.load(Ordering::SeqCst);
            // The wait is bounded, as the thread that commits may have failed.
            for _ in 0..10_000 {
                if is_over() {
                    break;
                }
                std::thread::yield_now();
            }
        }
        pins.insert(&self.image, index, evictions.map(|evictions| (evictions, &bytes[..])));
    }

    /// Marks random ranges, and loads the bitmap sectors that were evicted.
    fn mark(&self, number: u64) {
        let mut random = Random::new(self.seed ^ number << 32);
        let block_size = self.image.image().block_size().unwrap();
        for _ in 0..150 {
            // Most ranges are short, so that few bitmap sectors become full: a full one has no frame to evict.
            let longest = if random.chance(1, 40) { 3000 } else { [1, 3][random.index(2)] };
            let start = random.below(self.sectors.len() as u64);
            let range = SectorRange::between(start, (start + 1 + random.below(longest)).min(self.sectors.len() as u64));
            let states = &self.sectors[range.start() as usize..range.end() as usize];
            raise(states, BEGUN);
            for (block, _) in block_size.split_at_blocks(range) {
                while self.image.reserve(block).is_err() {
                    grow(&self.image);
                }
            }
            let (mut pins, slow) = (Pins::default(), random.chance(1, 16));
            let is_kept = loop {
                match self.image.mark(range) {
                    Ok(is_kept) => break is_kept,
                    Err(absent) => absent.into_iter().for_each(|index| self.load(index, &mut pins, slow)),
                }
            };
            raise(states, if is_kept { KEPT } else { MARKED });
        }
    }

    /// Whether a sector is present.
    fn has(&self, sector: u64, slow: bool) -> bool {
        let (bitmaps, mut pins) = (self.image.bitmaps().unwrap(), Pins::default());
        let (index, bit) = (bitmaps.bitmap_sector_of(sector), bitmaps.bit_of(sector));
        if self.image.image().bat().unwrap().place(bitmaps.block_of(index).0).is_none() {
            return false;
        }
        loop {
            let mut is_set = false;
            if bitmaps.each_run(index, bit, bit + 1, |set, _| is_set = set) {
                return is_set;
            }
            self.load(index, &mut pins, slow);
        }
    }

    /// Checks random sectors until the work is over.
    fn check(&self, number: u64) {
        let mut random = Random::new(self.seed ^ number << 32);
        while !self.over.load(Ordering::SeqCst) {
            self.check_sector(random.below(self.sectors.len() as u64), random.chance(1, 16));
        }
    }

    /// Checks that a sector is present if it was marked, and absent if it was never written.
    fn check_sector(&self, sector: u64, slow: bool) {
        let state = &self.sectors[sector as usize];
        let before = state.load(Ordering::SeqCst);
        let has = self.has(sector, slow);
        assert!(has || before < MARKED, "seed {}: sector {sector} was marked and is lost", self.seed);
        let after = state.load(Ordering::SeqCst);
        assert!(!has || after >= BEGUN, "seed {}: sector {sector} was never marked", self.seed);
    }

    /// The same image, opened by the next process.
    fn reopened(self) -> SharedImage {
        let SharedImage { folder, runtime, image, sectors, seed, .. } = self;
        drop(image);
        let image = open(&folder, &runtime);
        SharedImage { folder, runtime, image, sectors, over: AtomicBool::new(false), commits: AtomicU64::new(0), seed }
    }

    fn commit(&self) {
        let mut commit = Commit::new(self.image.clone(), SLOT);
        run_to_completion(&Host, self.image.file(), SLOT, |failed, ops| commit.next(failed, ops)).unwrap();
        self.commits.fetch_add(1, Ordering::SeqCst);
    }
}

fn raise(states: &[AtomicU8], to: u8) {
    for state in states {
        state.fetch_max(to, Ordering::SeqCst);
    }
}

fn open(folder: &TempDir, runtime: &TempDir) -> Arc<Writable> {
    let path: PathBuf = folder.path().join("a.vhd");
    let keep = Durability::Journal { folders: vec![Host.runtime_folder(runtime.path()).unwrap()], required: true };
    let image = Image::open(Host.open(&path, Access::Write).unwrap()).unwrap();
    Arc::new(Writable::new(&Host, image, &keep).unwrap())
}

/// Runs a step of growth, unless another thread does.
fn grow(image: &Arc<Writable>) {
    match Growth::begin(image, SLOT) {
        Some(mut growth) => {
            run_to_completion(&Host, image.file(), SLOT, |failed, ops| growth.next(failed, ops)).unwrap()
        }
        None => std::thread::yield_now(),
    }
}

/// Marks, reads and commits in several threads. Then the process ends cleanly, or is killed.
fn run(seed: u64) {
    let mut random = Random::new(seed);
    let (block_size, bitmap_sectors) = [(4 << 10, 300), (64 << 10, 100), (2 << 20, 40), (8 << 20, 40)][random.index(4)];
    let world = SharedImage::new(seed, block_size, bitmap_sectors);
    let most = [0, 1, 5, 20][random.index(4)];
    world.image.bitmaps().unwrap().set_max_frames(most);
    std::thread::scope(|threads| {
        let world = &world;
        let others = [1, 2].map(|number| threads.spawn(move || world.check(number)));
        let committer = threads.spawn(|| {
            while !world.over.load(Ordering::SeqCst) {
                world.commit();
                std::thread::yield_now();
            }
        });
        let marks = [3, 4, 5].map(|number| threads.spawn(move || world.mark(number)));
        let marked = marks.map(|thread| thread.join());
        world.over.store(true, Ordering::SeqCst);
        marked.into_iter().chain(others.map(|thread| thread.join())).chain([committer.join()]).for_each(|end| {
            end.unwrap_or_else(|why| std::panic::resume_unwind(why));
        });
    });
    (0..world.sectors.len() as u64).for_each(|sector| world.check_sector(sector, false));
    let killed = random.chance(1, 2);
    if !killed {
        world.commit();
        let bitmaps = world.image.bitmaps().unwrap();
        // All bitmap sectors are clean, so each of them can be evicted, and no new frame is made.
        let frames = bitmaps.frames();
        (0..world.sectors.len() as u64).for_each(|sector| world.check_sector(sector, false));
        assert!(bitmaps.frames() <= frames.max(most + 1), "seed {seed}: {} frames", bitmaps.frames());
        world.end();
    }
    let world = world.reopened();
    for (sector, state) in (0..).zip(&world.sectors) {
        let survives_from = if killed { KEPT } else { MARKED };
        assert!(
            world.has(sector, false) || state.load(Ordering::SeqCst) < survives_from,
            "seed {seed}: sector {sector} is lost"
        );
    }
}

#[test]
fn no_bit_is_lost_between_threads() {
    let only = std::env::var("DIFFDISK_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seeds = only.map_or(0..12, |seed: u64| seed..seed + 1);
    seeds.for_each(run);
}

/// Whether a mark is lost if the cache has one frame, and other bitmap sectors are inserted at the moment at which
/// `mutant` evicts wrongly.
#[cfg(feature = "mutants")]
fn is_mark_lost(mutant: Mutant) -> bool {
    const MARKED_EARLY: u64 = 5;
    const MARKED_LATE: u64 = 9;
    let mark = |world: &SharedImage, sector| {
        let mut pins = Pins::default();
        while let Err(absent) = world.image.mark(SectorRange::between(sector, sector + 1)) {
            absent.into_iter().for_each(|index| world.load(index, &mut pins, false));
        }
    };
    let world = SharedImage::new(0, 2 << 20, 4);
    for block in 0..4 {
        while world.image.reserve(crate::units::BlockIndex::new(block)).is_err() {
            grow(&world.image);
        }
        mark(&world, u64::from(block) * 4096 + MARKED_EARLY);
    }
    world.commit();
    world.end();
    let world = world.reopened();
    let (image, bitmaps, first) = (&world.image, world.image.bitmaps().unwrap(), BitmapSectorIndex::new(0));
    bitmaps.set_max_frames(0);
    let insert_others =
        || (1..4).for_each(|index| world.load(BitmapSectorIndex::new(index), &mut Pins::default(), false));
    let mut stale = [0; SECTOR_BYTES];
    image.file().read_at(&mut stale, image.bitmap_sector_offset(first)).unwrap();
    let evictions = bitmaps.eviction_count(first);
    mark(&world, MARKED_LATE);
    match mutant {
        Mutant::EvictDirty => insert_others(),
        Mutant::EvictInCommit => {
            Commit::new(image.clone(), SLOT).next(None, &mut Vec::new()).unwrap();
            insert_others();
        }
        _ => {
            world.commit();
            insert_others();
            assert!(bitmaps.eviction_count(first).is_some(), "a clean bitmap sector is evicted");
            Pins::default().insert(image, first, evictions.map(|evictions| (evictions, &stale[..])));
        }
    }
    !world.has(MARKED_LATE, false)
}

/// Each rule against wrong evictions is broken by a mutant: a mark is lost with the mutant, and only then.
#[cfg(feature = "mutants")]
#[test]
fn wrong_evictions_are_detected() {
    for mutant in [Mutant::EvictDirty, Mutant::EvictInCommit, Mutant::StaleBits] {
        assert!(!is_mark_lost(mutant), "{mutant:?}: a mark is lost without the mutant");
        crate::mutant::enable(Some(mutant));
        let found = is_mark_lost(mutant);
        crate::mutant::enable(None);
        assert!(found, "{mutant:?} is not found");
    }
}

/// A child of 1 TiB in which every block has a place, and no bitmap is full; each bitmap is read once.
#[test]
fn a_tebibyte_that_is_partly_full_everywhere_takes_a_bounded_share_of_memory() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default().to_owned()
    };
    let (folder, blocks) = (tempfile::tempdir().unwrap(), 1_u32 << 19);
    let path = folder.path().join("a.vhd");
    let spec = ImageSpec { kind: child(), size: 1 << 40, block_size: BlockSize::DEFAULT, reserve: 0 };
    create(&Host, &path, &spec).unwrap();
    let image = Image::open(Host.open(&path, Access::Write).unwrap()).unwrap();
    let (table, first) = (image.table_offset().unwrap(), u32::try_from(image.data_end() / SECTOR + 8).unwrap());
    let stride = BlockSize::DEFAULT.stride_sectors();
    let places = (0..blocks).map(|block| first + block * stride);
    let entries: Vec<u8> = places.clone().flat_map(u32::to_be_bytes).collect();
    let (footer, end) = (image.footer().encode(), u64::from(first) + u64::from(blocks) * u64::from(stride));
    image.file().punch_hole(image.data_end(), SECTOR).unwrap();
    image.file().write_at(&entries, table).unwrap();
    image.file().write_at(&footer, end * SECTOR).unwrap();
    drop(image);
    let image = Image::open(Host.open(&path, Access::Write).unwrap()).unwrap();
    let image = Arc::new(Writable::new(&Host, image, &Durability::FlushOnly).unwrap());
    let (bitmaps, before) = (image.bitmaps().unwrap(), resident());
    for index in (0..blocks as usize).map(BitmapSectorIndex::new) {
        let evictions = bitmaps.eviction_count(index).expect("nothing was read yet");
        let mut bytes = [0; SECTOR_BYTES];
        image.file().read_at(&mut bytes, image.bitmap_sector_offset(index)).unwrap();
        Pins::default().insert(&image, index, Some((evictions, &bytes[..])));
        assert!(bitmaps.each_run(index, 0, 4096, |set, count| assert_eq!((set, count), (false, 4096))));
    }
    println!("before: {before}, after: {}, {} frames", resident(), bitmaps.frames());
    let all = (0..blocks as usize).map(BitmapSectorIndex::new);
    let kept = all.filter(|index| bitmaps.eviction_count(*index).is_none()).count();
    // There may be a few more frames than bitmap sectors, as the clock ends its search early.
    let (frames, most) = (bitmaps.frames(), kept + kept / 100);
    assert!((50_000..120_000).contains(&kept), "64 MiB hold {kept} bitmap sectors of 600 bytes");
    assert!((kept..most).contains(&frames), "{frames} frames for {kept} bitmap sectors");
}
