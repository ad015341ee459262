//! A chain under test, and a flat array with the expected contents of its disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::disk::{Disk, DiskOptions, Outcome, Work};
use diffdisk::format::Severity;
use diffdisk::image::{self, Durability, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::host::Host;
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SECTOR, SectorRange};

use crate::rng::Rng;
use crate::temp;
use crate::testing::{TestDisk, TestMemory};

pub(crate) const KIB: u64 = 1 << 10;

/// A chain under test, and the expected contents of its disk.
pub(crate) struct ChainModel {
    folder: tempfile::TempDir,
    /// The runtime folder for live journals, in memory.
    _runtime: tempfile::TempDir,
    pub(crate) durability: Durability,
    pub(crate) env: Arc<dyn Env>,
    pub(crate) random: Rng,
    pub(crate) engine: EngineKind,
    pub(crate) direct: bool,
    pub(crate) layers: Vec<PathBuf>,
    /// The expected contents of the disk, in bytes.
    pub(crate) model: Vec<u8>,
    /// Bitmap sectors that the disk may cache; `None` for its default.
    pub(crate) cached_bitmap_sectors: Option<usize>,
}

impl ChainModel {
    pub(crate) fn new(seed: u64, engine: EngineKind, direct: bool) -> ChainModel {
        let folder = temp::scratch("model");
        let runtime = temp::in_memory();
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

    pub(crate) fn push(&mut self, kind: &str, block: u64, size: u64) {
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

    pub(crate) fn top(&self) -> &Path {
        self.layers.last().expect("a chain has a root")
    }

    pub(crate) fn open(&self, read_only: bool) -> TestDisk {
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

    pub(crate) fn range(&mut self, longest: u64) -> SectorRange {
        let sectors = self.model.len() as u64 / SECTOR;
        let start = self.random.below(sectors);
        let count = 1 + self.random.below(longest.min(sectors - start));
        SectorRange::between(start, start + count)
    }

    pub(crate) fn model_bytes(&mut self, range: SectorRange) -> &mut [u8] {
        &mut self.model[(range.start() * SECTOR) as usize..(range.end() * SECTOR) as usize]
    }

    /// Runs `acts` random requests on the top, then reads the whole disk.
    pub(crate) fn work(&mut self, disk: &mut TestDisk, acts: usize) {
        for _ in 0..acts {
            match self.random.below(20) {
                0..=8 => {
                    let longest = self.random.pick(&[1, 8, 64, 700, 5000]);
                    let range = self.range(longest);
                    let bytes = self.pattern(range);
                    let cuts = [self.random.below(range.bytes()) as usize, 512 * range.count() as usize / 2];
                    disk.write(range, &bytes, &cuts);
                    self.model_bytes(range).copy_from_slice(&bytes);
                }
                9..=10 => {
                    let (ranges, unmap) = (self.ranges(), self.random.below(2) == 0);
                    disk.zero(&ranges, unmap);
                    ranges.into_iter().for_each(|range| self.model_bytes(range).fill(0));
                }
                11 => {
                    let ranges = self.ranges();
                    disk.discard(ranges.clone());
                    ranges.into_iter().for_each(|range| self.accept_discarded(disk, range));
                }
                12 => disk.flush(),
                13..=14 => self.burst(disk),
                _ => {
                    let range = self.range(3000);
                    let got = disk.read(range);
                    self.compare(range, &got);
                }
            }
        }
        self.compare_all(disk);
    }

    /// Returns up to three random ranges for one request; they may overlap.
    pub(crate) fn ranges(&mut self) -> Vec<SectorRange> {
        (0..1 + self.random.below(3)).map(|_| self.range(5000)).collect()
    }

    /// Reads a discarded range. Each sector must have its old contents or zeros, and must keep its present contents
    /// from then on.
    pub(crate) fn accept_discarded(&mut self, disk: &mut TestDisk, range: SectorRange) {
        let now = disk.read(range);
        let seed = self.random.next();
        for (n, (was, is)) in self.model_bytes(range).chunks(512).zip(now.chunks(512)).enumerate() {
            assert!(was == is || is == [0; 512], "{range} sector {n} after discard (near {seed})");
        }
        self.model_bytes(range).copy_from_slice(&now);
    }

    /// Runs 16 requests at once, each on a separate part of the disk.
    pub(crate) fn burst(&mut self, disk: &mut TestDisk) {
        let sectors = self.model.len() as u64 / SECTOR;
        let share = sectors / 16;
        let mut reads = Vec::new();
        for n in 0..16 {
            let start = n * share + self.random.below(share);
            let range = SectorRange::between(start, (start + 1 + self.random.below(40)).min((n + 1) * share));
            if self.random.below(2) == 0 {
                let bytes = self.pattern(range);
                let memory = TestMemory::new(&bytes);
                disk.submit(Work::Write { range, from: memory.iovecs(&[]) });
                self.model_bytes(range).copy_from_slice(&bytes);
            } else {
                let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
                disk.submit(Work::Read { range, into: memory.iovecs(&[]) });
                reads.push((range, memory));
            }
        }
        for (tag, outcome) in disk.finish() {
            assert_eq!(outcome, Outcome::Done, "request {tag}");
        }
        for (range, memory) in reads {
            self.compare(range, &memory.bytes());
        }
    }

    pub(crate) fn pattern(&mut self, range: SectorRange) -> Vec<u8> {
        let mark = self.random.next();
        let sector = |n: u64| {
            let mut bytes = [0; 512];
            let text = format!("<layer {} mark {mark:016x} sector {n}>", self.layers.len() - 1);
            bytes.iter_mut().zip(text.as_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
            bytes
        };
        (range.start()..range.end()).flat_map(sector).collect()
    }

    pub(crate) fn compare(&self, range: SectorRange, got: &[u8]) {
        let want = &self.model[(range.start() * SECTOR) as usize..(range.end() * SECTOR) as usize];
        if let Some(n) = want.chunks(512).zip(got.chunks(512)).position(|(a, b)| a != b) {
            let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[n * 512..n * 512 + 64]).into_owned();
            let (sector, depth) = (range.start() + n as u64, self.layers.len());
            panic!("sector {sector} at depth {depth}: expected {:?}, got {:?}", show(want), show(got));
        }
    }

    pub(crate) fn compare_all(&self, disk: &mut TestDisk) {
        let sectors = self.model.len() as u64 / SECTOR;
        let mut at = 0;
        while at < sectors {
            let range = SectorRange::between(at, (at + 3001).min(sectors));
            let got = disk.read(range);
            self.compare(range, &got);
            at = range.end();
        }
    }

    pub(crate) fn check(&self, clean: bool) {
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
