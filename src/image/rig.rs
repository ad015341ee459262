//! Images on the simulated host for the tests of this floor.

use std::path::Path;
use std::sync::Arc;

use super::{Commit, Growth, Image, Keep, Kind, ParentLink, Spec, Writable, create, drive};
use crate::error::Result;
use crate::storage::sim::SimHost;
use crate::storage::{Access, Env, File, Slot};
use crate::units::{BlockSize, SECTOR};

pub(super) const PATH: &str = "/d/a.vhd";
pub(super) const SLOT: Slot = Slot(0);

pub(super) fn child() -> Kind {
    let uuid = uuid::Uuid::from_u128(7);
    Kind::Differencing(ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() })
}

/// A host with an image of 64 KiB blocks.
pub(super) fn host_with(kind: Kind, sectors: u64) -> SimHost {
    let host = SimHost::new(1);
    let block_size = BlockSize::from_bytes(64 << 10).unwrap();
    create(&host, Path::new(PATH), &Spec { kind, size: sectors * SECTOR, block_size, reserve: 0 }).unwrap();
    host
}

pub(super) fn file(host: &SimHost) -> File {
    host.open(Path::new(PATH), Access::Write).unwrap()
}

pub(super) fn open(host: &SimHost) -> Result<Arc<Writable>> {
    Ok(Arc::new(Writable::new(host, Image::open(file(host))?, &Keep::Nothing)?))
}

pub(super) fn grow(host: &SimHost, image: &Arc<Writable>) -> Result<()> {
    let mut growth = Growth::begin(image, SLOT).expect("room is short");
    drive(host, image.file(), SLOT, |failed, ops| growth.next(failed, ops))
}

pub(super) fn commit(host: &SimHost, image: &Arc<Writable>) {
    let mut commit = Commit::new(image.clone(), SLOT);
    drive(host, image.file(), SLOT, |failed, ops| commit.next(failed, ops)).unwrap();
}
