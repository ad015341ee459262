//! Granules that leave memory and come back while threads mark, look and commit: held against what was marked.
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
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

// What a sector may be: nobody wrote to it, somebody has begun to, its mark has returned, it outlives the process.
const BEGUN: u8 = 1;
const MARKED: u8 = 2;
const KEPT: u8 = 3;

/// An image, and what its sectors are.
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
    /// A clean end, after a commit.
    fn end(&self) {
        self.image.end_session();
        self.image.trim().unwrap();
        self.image.remove_journal().unwrap();
    }

    fn new(seed: u64, block_size: u32, granules: u64) -> SharedImage {
        let (folder, runtime) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let block_size = BlockSize::from_bytes(block_size).unwrap();
        let sectors = granules * u64::from(block_size.sectors().min(4096));
        let spec = ImageSpec { kind: child(), size: sectors * SECTOR, block_size, reserve: 0 };
        create(&Host, &folder.path().join("a.vhd"), &spec).unwrap();
        let image = open(&folder, &runtime);
        let sectors = (0..sectors).map(|_| AtomicU8::new(0)).collect();
        SharedImage { folder, runtime, image, sectors, over: AtomicBool::new(false), commits: AtomicU64::new(0), seed }
    }

    /// Reads a granule of a block that has a place, as a lane does: asked for, then read, then taken in.
    fn load(&self, granule: usize, held: &mut Pins, slow: bool) {
        let times = self.image.bitmaps().unwrap().eviction_count(granule);
        let mut bytes = [0; SECTOR_BYTES];
        self.image.file().read_at(&mut bytes, self.image.bitmap_sector_offset(granule)).unwrap();
        if slow {
            // Commits come and go meanwhile.
            let until = self.commits.load(Ordering::SeqCst) + 2;
            let is_over = || self.commits.load(Ordering::SeqCst) >= until || self.over.load(Ordering::SeqCst);
            // Not for ever: the one who commits may have failed.
            for _ in 0..10_000 {
                if is_over() {
                    break;
                }
                std::thread::yield_now();
            }
        }
        held.insert(&self.image, granule, times.map(|times| (times, &bytes[..])));
    }

    /// Marks ranges, whatever memory has lost meanwhile.
    fn mark(&self, number: u64) {
        let mut random = Random::new(self.seed ^ number << 32);
        let block_size = self.image.image().block_size().unwrap();
        for _ in 0..150 {
            // Mostly a few sectors: what is full has nothing more to lose.
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
            let (mut held, slow) = (Pins::default(), random.chance(1, 16));
            let kept = loop {
                match self.image.mark(range) {
                    Ok(kept) => break kept,
                    Err(absent) => absent.into_iter().for_each(|granule| self.load(granule, &mut held, slow)),
                }
            };
            raise(states, if kept { KEPT } else { MARKED });
        }
    }

    /// Whether a sector is here.
    fn has(&self, sector: u64, slow: bool) -> bool {
        let (bitmaps, mut held) = (self.image.bitmaps().unwrap(), Pins::default());
        let (granule, bit) = (bitmaps.bitmap_sector_of(sector), bitmaps.bit_of(sector));
        if self.image.image().bat().unwrap().place(bitmaps.block_of(granule).0).is_none() {
            return false;
        }
        loop {
            let mut here = false;
            if bitmaps.each_run(granule, bit, bit + 1, |set, _| here = set) {
                return here;
            }
            self.load(granule, &mut held, slow);
        }
    }

    fn look(&self, number: u64) {
        let mut random = Random::new(self.seed ^ number << 32);
        while !self.over.load(Ordering::SeqCst) {
            self.look_at(random.below(self.sectors.len() as u64), random.chance(1, 16));
        }
    }

    fn look_at(&self, sector: u64, slow: bool) {
        let state = &self.sectors[sector as usize];
        let before = state.load(Ordering::SeqCst);
        let has = self.has(sector, slow);
        assert!(has || before < MARKED, "seed {}: sector {sector} was marked and is lost", self.seed);
        let after = state.load(Ordering::SeqCst);
        assert!(!has || after >= BEGUN, "seed {}: sector {sector} was never marked", self.seed);
    }

    /// The same world after the process ended and another took over.
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

/// A step of growth, where nobody else is at it.
fn grow(image: &Arc<Writable>) {
    match Growth::begin(image, SLOT) {
        Some(mut growth) => {
            run_to_completion(&Host, image.file(), SLOT, |failed, ops| growth.next(failed, ops)).unwrap()
        }
        None => std::thread::yield_now(),
    }
}

/// Threads that mark, look and commit at once; then the process ends, after a commit or killed.
fn run(seed: u64) {
    let mut random = Random::new(seed);
    let (block_size, granules) = [(4 << 10, 300), (64 << 10, 100), (2 << 20, 40), (8 << 20, 40)][random.index(4)];
    let world = SharedImage::new(seed, block_size, granules);
    let most = [0, 1, 5, 20][random.index(4)];
    world.image.bitmaps().unwrap().set_max_frames(most);
    std::thread::scope(|threads| {
        let world = &world;
        let others = [1, 2].map(|number| threads.spawn(move || world.look(number)));
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
    (0..world.sectors.len() as u64).for_each(|sector| world.look_at(sector, false));
    let killed = random.chance(1, 2);
    if !killed {
        world.commit();
        let bitmaps = world.image.bitmaps().unwrap();
        // All is clean: what comes now finds a frame, and no further one is made.
        let frames = bitmaps.frames();
        (0..world.sectors.len() as u64).for_each(|sector| world.look_at(sector, false));
        assert!(bitmaps.frames() <= frames.max(most + 1), "seed {seed}: {} frames", bitmaps.frames());
        world.end();
    }
    let world = world.reopened();
    for (sector, state) in (0..).zip(&world.sectors) {
        let owed = if killed { KEPT } else { MARKED };
        assert!(
            world.has(sector, false) || state.load(Ordering::SeqCst) < owed,
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

/// Whether a sector that was marked is forgotten where memory holds one granule, and others come just when `tempting` would
/// have it leave.
#[cfg(feature = "mutants")]
fn is_forgotten(tempting: Mutant) -> bool {
    const MARKED_EARLY: u64 = 5;
    const MARKED_LATE: u64 = 9;
    let mark = |world: &SharedImage, sector| {
        let mut held = Pins::default();
        while let Err(absent) = world.image.mark(SectorRange::between(sector, sector + 1)) {
            absent.into_iter().for_each(|granule| world.load(granule, &mut held, false));
        }
    };
    let world = SharedImage::new(0, 2 << 20, 4);
    for block in 0..4 {
        while world.image.reserve(block).is_err() {
            grow(&world.image);
        }
        mark(&world, u64::from(block) * 4096 + MARKED_EARLY);
    }
    world.commit();
    world.end();
    let world = world.reopened();
    let (image, bitmaps) = (&world.image, world.image.bitmaps().unwrap());
    bitmaps.set_max_frames(0);
    let others_come = || (1..4).for_each(|granule| world.load(granule, &mut Pins::default(), false));
    let mut stale = [0; SECTOR_BYTES];
    image.file().read_at(&mut stale, image.bitmap_sector_offset(0)).unwrap();
    let times = bitmaps.eviction_count(0);
    mark(&world, MARKED_LATE);
    match tempting {
        Mutant::EvictDirty => others_come(),
        Mutant::EvictInCommit => {
            Commit::new(image.clone(), SLOT).next(None, &mut Vec::new()).unwrap();
            others_come();
        }
        _ => {
            world.commit();
            others_come();
            assert!(bitmaps.eviction_count(0).is_some(), "what the file says may leave");
            Pins::default().insert(image, 0, times.map(|times| (times, &stale[..])));
        }
    }
    !world.has(MARKED_LATE, false)
}

/// The rules that keep granules in memory, each broken in a scene of one thread: what is broken is seen, and only then.
#[cfg(feature = "mutants")]
#[test]
fn what_is_forgotten_too_early_is_found() {
    for mutant in [Mutant::EvictDirty, Mutant::EvictInCommit, Mutant::StaleBits] {
        assert!(!is_forgotten(mutant), "{mutant:?}: forgotten although nobody made the mistake");
        crate::mutant::enable(Some(mutant));
        let found = is_forgotten(mutant);
        crate::mutant::enable(None);
        assert!(found, "{mutant:?} is not found");
    }
}

/// A child of 1 TiB all of whose blocks have a place, none of them full; each is looked at once.
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
    for granule in 0..blocks as usize {
        let times = bitmaps.eviction_count(granule).expect("nothing was read yet");
        let mut bytes = [0; SECTOR_BYTES];
        image.file().read_at(&mut bytes, image.bitmap_sector_offset(granule)).unwrap();
        Pins::default().insert(&image, granule, Some((times, &bytes[..])));
        assert!(bitmaps.each_run(granule, 0, 4096, |set, count| assert_eq!((set, count), (false, 4096))));
    }
    println!("before: {before}, after: {}, {} granules kept", resident(), bitmaps.frames());
    let kept = (0..blocks as usize).filter(|granule| bitmaps.eviction_count(*granule).is_none()).count();
    // A few more frames than granules: the clock does not look for long.
    let (frames, most) = (bitmaps.frames(), kept + kept / 100);
    assert!((50_000..120_000).contains(&kept), "64 MiB hold {kept} granules of 600 bytes");
    assert!((kept..most).contains(&frames), "{frames} frames for {kept} granules");
}
