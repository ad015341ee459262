//! Test support of this floor: a temporary folder in which chains are created, written, closed and opened again.

use std::path::{Path, PathBuf};

use super::{Chain, OpenMode, PlanBuffer, Policy, Version};
use crate::image::{self, Commit, Durability, Growth, Image, ImageKind, ImageSpec, ParentLink};
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

pub(super) struct ChainFolder(tempfile::TempDir);

impl ChainFolder {
    pub(super) fn new() -> ChainFolder {
        ChainFolder(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn make(&self, name: &str, kind: ImageKind, block: u32, sectors: u64) {
        let block_size = BlockSize::from_bytes(block).unwrap();
        image::create(&Host, &self.path(name), &ImageSpec { kind, size: sectors * SECTOR, block_size, reserve: 0 })
            .unwrap();
    }

    pub(super) fn fixed(&self, name: &str, sectors: u64) {
        self.make(name, ImageKind::Fixed, 2 << 20, sectors);
    }

    pub(super) fn dynamic(&self, name: &str, block: u32, sectors: u64) {
        self.make(name, ImageKind::Dynamic, block, sectors);
    }

    /// Creates a child of `parent` that records `paths`, relative to the folder: one in its locators, one as the name.
    pub(super) fn child_by(&self, name: &str, parent: &str, paths: [&str; 2], block: u32, sectors: u64) {
        let uuid = Image::open(Host.open(&self.path(parent), Access::Read).unwrap()).unwrap().uuid();
        let relative = Some(paths[0].into());
        let link = ParentLink { uuid, modified: 0, relative, absolute: None, name: paths[1].into() };
        self.make(name, ImageKind::Differencing(link), block, sectors);
    }

    pub(super) fn child(&self, name: &str, parent: &str, block: u32, sectors: u64) {
        self.child_by(name, parent, [parent, parent], block, sectors);
    }

    pub(super) fn chain(&self, name: &str, mode: OpenMode) -> crate::error::Result<Chain> {
        Chain::open(&Host, &self.path(name), &Policy::default(), mode)
    }

    /// Opens the chain of `name` for reading.
    pub(super) fn read(&self, name: &str) -> Version {
        self.chain(name, OpenMode::Read).unwrap().into_frozen()
    }

    /// Opens the chain of `name` for writing, with free space for new blocks.
    pub(super) fn write(&self, name: &str) -> Version {
        let version = self.chain(name, OpenMode::Write).unwrap().into_writable(&Host, &Durability::FlushOnly).unwrap();
        make_room(&version);
        version
    }

    /// Opens `name`, fills each range with its byte, and closes the image.
    pub(super) fn fill(&self, name: &str, ranges: &[(u64, u64, u8)]) {
        let version = self.write(name);
        for &(from, to, byte) in ranges {
            write(&version, SectorRange::between(from, to), byte);
        }
        let top = version.top().unwrap();
        let mut commit = Commit::new(top.image.clone(), top.slot);
        image::run_to_completion(&Host, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops)).unwrap();
        top.image.trim().unwrap();
    }

    pub(super) fn folder(&self) -> &Path {
        self.0.path()
    }
}

fn make_room(version: &Version) {
    let top = version.top().unwrap();
    if top.image.is_growth_due() {
        let mut growth = Growth::begin(&top.image, top.slot).unwrap();
        image::run_to_completion(&Host, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops)).unwrap();
    }
}

/// Plans with `ask`, and loads missing bitmaps until none is missing.
pub(super) fn plan_loaded(version: &Version, mut ask: impl FnMut(&mut PlanBuffer)) -> PlanBuffer {
    let (mut plan, mut pins) = (PlanBuffer::default(), crate::image::Pins::default());
    ask(&mut plan);
    for _ in 0..2 {
        if !plan.missing.is_empty() {
            version.load_now(&plan.missing, &mut pins).unwrap();
            ask(&mut plan);
        }
    }
    assert!(plan.missing.is_empty(), "two loads are not enough: {:?}", plan.missing);
    plan
}

pub(super) fn write(version: &Version, range: SectorRange, byte: u8) {
    let plan = plan_loaded(version, |plan| {
        while version.plan_write(range, plan).is_err() {
            make_room(version);
        }
    });
    for extent in &plan.extents {
        let super::Source::File { slot, offset } = extent.source else { panic!("a write goes into a file") };
        let bytes = vec![byte; usize::try_from(extent.range.bytes()).unwrap()];
        version.file(slot).write_at(&bytes, offset).unwrap();
    }
    assert!(version.mark_now(range).unwrap());
}

/// Reads a range at once. Returns the byte with which each sector is filled.
pub(super) fn read_sector_bytes(version: &Version, from: u64, to: u64) -> Vec<u8> {
    let range = SectorRange::between(from, to);
    let mut bytes = vec![0xEE; usize::try_from(range.bytes()).unwrap()];
    version.read_now(range, &mut bytes, &mut PlanBuffer::default()).unwrap();
    let sectors = bytes.chunks(SECTOR_BYTES);
    sectors
        .map(|sector| {
            sector.iter().all(|b| *b == sector[0]).then_some(sector[0]).expect("a sector is filled with one byte")
        })
        .collect()
}
