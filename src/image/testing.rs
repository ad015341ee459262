//! Images on the simulated file system, for the tests of this floor.

use std::path::Path;
use std::sync::Arc;

use super::{
    Commit, Durability, Growth, Image, ImageKind, ImageSpec, ParentLink, Writable, check, create, run_to_completion,
};
use crate::error::Result;
use crate::format::Defect;
use crate::storage::sim::SimHost;
use crate::storage::{Access, Env, File, FileSlot};
use crate::units::{BlockIndex, BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

pub(super) const PATH: &str = "/d/a.vhd";
pub(super) const SLOT: FileSlot = FileSlot(0);

pub(super) fn child() -> ImageKind {
    let uuid = uuid::Uuid::from_u128(7);
    ImageKind::Differencing(ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() })
}

/// Creates a simulated host with an image of 64 KiB blocks.
pub(super) fn host_with(kind: ImageKind, sectors: u64) -> SimHost {
    let host = SimHost::new(1);
    let block_size = BlockSize::from_bytes(64 << 10).unwrap();
    create(&host, Path::new(PATH), &ImageSpec { kind, size: sectors * SECTOR, block_size, reserve: 0 }).unwrap();
    host
}

pub(super) fn file(host: &SimHost) -> File {
    host.open(Path::new(PATH), Access::Write).unwrap()
}

pub(super) fn open(host: &SimHost) -> Result<Arc<Writable>> {
    Ok(Arc::new(Writable::new(host, Image::open(file(host))?, &Durability::FlushOnly)?))
}

pub(super) fn grow(host: &SimHost, image: &Arc<Writable>) -> Result<()> {
    let mut growth = Growth::begin(image, SLOT).expect("room is short");
    run_to_completion(host, image.file(), SLOT, |failed, ops| growth.next(failed, ops))
}

pub(super) fn commit(host: &SimHost, image: &Arc<Writable>) {
    let mut commit = Commit::new(image.clone(), SLOT);
    run_to_completion(host, image.file(), SLOT, |failed, ops| commit.next(failed, ops)).unwrap();
}

/// Creates a simulated host with an image of 64 KiB blocks that has sevens in `ranges` of sectors, each within one
/// block. The image is closed cleanly.
pub(super) fn written(kind: ImageKind, sectors: u64, ranges: &[(u64, u64)]) -> SimHost {
    let host = host_with(kind, sectors);
    let image = open(&host).unwrap();
    for &(from, to) in ranges {
        let block = BlockIndex::new(u32::try_from(from / 128).unwrap());
        while image.reserve(block).is_err() {
            grow(&host, &image).unwrap();
        }
        let data = image.reserve(block).unwrap().sector() + 1;
        for sector in from..to {
            image.file().write_at(&[7; SECTOR_BYTES], (data + sector % 128).byte_offset()).unwrap();
        }
        assert_eq!(image.mark(SectorRange::between(from, to)), Ok(true));
    }
    commit(&host, &image);
    image.trim().unwrap();
    host
}

/// Checks the image, and returns the kinds of the defects found.
pub(super) fn kinds(host: &SimHost) -> Vec<&'static str> {
    check(file(host)).unwrap().0.defects.iter().map(Defect::kind).collect()
}

pub(super) fn poke(host: &SimHost, at: u64, bytes: &[u8]) {
    file(host).write_at(bytes, at).unwrap();
}
