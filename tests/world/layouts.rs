//! The disks under test, each on its own simulated machine: images with the layout of this library and with layouts of
//! other writers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::disk::{Disk, DiskOptions, WhenFull};
use diffdisk::image::{self, Durability, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::sim::SimHost;
use diffdisk::storage::{Access, Env};
use diffdisk::units::BlockSize;

use crate::model::{self, PARENT, Value};

/// Sectors in a block of the smallest size.
pub(crate) const BLOCK: u64 = 8;

/// A simulated machine with a closed disk. All files are durable.
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    host: SimHost,
    /// Value of each sector of the disk.
    pub(crate) values: Vec<Value>,
}

impl Layout {
    /// Returns a copy of the machine with the random seed `seed`.
    pub(crate) fn host(&self, seed: u64) -> SimHost {
        let host = self.host.crash_with(&|_| true);
        host.set_seed(seed);
        host
    }
}

/// Returns the path of the disk's youngest image.
pub(crate) fn top() -> PathBuf {
    PathBuf::from("/disk/top.vhd")
}

/// Returns the path of the image that the snapshot with a number keeps.
pub(crate) fn kept(number: u32) -> PathBuf {
    PathBuf::from(format!("/disk/kept{number}.vhd"))
}

/// Whether a path is that of an image that a snapshot has kept.
pub(crate) fn is_kept_name(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("kept"))
}

/// Whether a file may exist when no snapshot is in progress.
pub(crate) fn is_expected_name(path: &Path) -> bool {
    path == top() || path.ends_with("parent.vhd") || is_kept_name(path)
}

/// Returns the options that open the disk, with a live journal if `journal` is true.
pub(crate) fn options(host: &SimHost, journal: bool) -> DiskOptions {
    let runtime = || host.runtime_folder(Path::new("/run")).expect("every folder is in memory");
    let keep =
        if journal { Durability::Journal { folders: vec![runtime()], required: true } } else { Durability::FlushOnly };
    DiskOptions { keep, when_full: WhenFull::Fail, allow_writable_parent: true, ..DiskOptions::new(top()) }
}

/// Makes the five layouts on a disk of `blocks` blocks: a child and a dynamic image, each aligned and packed, and a
/// child with all blocks allocated and no free tail. The exhaustive test (crash-safety 11, R1) uses the first four.
pub(crate) fn all_layouts(blocks: u64) -> Vec<Layout> {
    vec![
        layout("child, aligned", blocks, true, Placement::Native),
        layout("child, packed", blocks, true, Placement::Packed),
        layout("dynamic, aligned", blocks, false, Placement::Native),
        layout("dynamic, packed", blocks, false, Placement::Packed),
        layout("child, full", blocks, true, Placement::Full),
    ]
}

/// Makes two layouts with blocks of 32 KiB. Sparse allocation reserves only the bitmaps of such blocks. (It reserves
/// blocks of 4 KiB as a whole.)
pub(crate) fn large_blocks() -> Vec<Layout> {
    let size = BlockSize::from_bytes(32 << 10).expect("a power of two");
    let blocks = 20 * u64::from(size.sectors()) / BLOCK;
    let of = |name, child| layout_with(name, blocks, child, Placement::Native, size);
    vec![of("child, blocks of 32 KiB", true), of("dynamic, blocks of 32 KiB", false)]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// An empty image, as this library creates it.
    Native,
    /// Only the first block is allocated. In a child the footer directly follows this block, so that the next bitmap
    /// overwrites the footer. In a dynamic image there is a gap before the footer, so that the data of the second new
    /// block overwrites the footer.
    Packed,
    /// Every block is allocated without gaps, and the footer follows the last block.
    Full,
}

fn layout(name: &'static str, blocks: u64, child: bool, form: Placement) -> Layout {
    layout_with(name, blocks, child, form, BlockSize::from_bytes(4096).expect("the smallest"))
}

fn layout_with(name: &'static str, blocks: u64, child: bool, form: Placement, block_size: BlockSize) -> Layout {
    let host = SimHost::new(1);
    let mut values = vec![0; (blocks * BLOCK) as usize];
    let kind = if child { ImageKind::Differencing(parent(&host, blocks, &mut values)) } else { ImageKind::Dynamic };
    let spec = ImageSpec { kind, size: blocks * BLOCK * 512, block_size, reserve: 0 };
    image::create(&host, &top(), &spec).expect("a new image");
    if form != Placement::Native {
        rebuild(&host, blocks, child, form);
    }
    let host = host.crash_with(&|_| true);
    Layout { name, host, values }
}

/// Makes a parent smaller than its child, with data in some sectors of some blocks.
fn parent(host: &SimHost, blocks: u64, values: &mut [Value]) -> ParentLink {
    let path = Path::new("/disk/parent.vhd");
    let sectors = (blocks - 1) * BLOCK;
    let block_size = BlockSize::from_bytes(4096).expect("the smallest");
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: sectors * 512, block_size, reserve: 0 };
    let uuid = image::create(host, path, &spec).expect("a new image");
    let options = DiskOptions { path: path.into(), ..options(host, false) };
    let disk = Disk::open(Arc::new(host.clone()), &options).expect("it opens");
    let version = disk.version();
    let top = version.top().expect("it is writable");
    let grow = || {
        if let Some(mut growth) = image::Growth::begin(&top.image, top.slot) {
            image::run_to_completion(host, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
                .expect("it grows");
        }
    };
    grow();
    for block in (0..blocks - 1).filter(|b| b % 3 != 2) {
        let index = diffdisk::units::BlockIndex::new(u32::try_from(block).expect("small"));
        let place = top.image.reserve(index).expect("there is room");
        for sector in block * BLOCK..(block + 1) * BLOCK {
            if sector % BLOCK < 6 {
                let at = place.sector() + 1 + sector % BLOCK;
                top.image.file().write_at(&model::bytes(sector, PARENT), at.byte_offset()).expect("it takes data");
                let _ = top.image.mark(diffdisk::units::SectorRange::between(sector, sector + 1));
                values[sector as usize] = PARENT;
            }
        }
        disk.commit().expect("it commits");
        grow();
    }
    disk.close().expect("a clean end");
    let name = PathBuf::from("parent.vhd");
    ParentLink { uuid, modified: host.now(), relative: Some(name.clone()), absolute: None, name }
}

/// Adds blocks to an empty image at unaligned offsets, as other writers do, and moves the trailing footer after them.
fn rebuild(host: &SimHost, blocks: u64, child: bool, form: Placement) {
    let file = host.open(&top(), Access::Write).expect("it is there");
    let mut footer = [0; 512];
    file.read_at(&mut footer, 0).expect("a footer");
    let mut table = [0; 8];
    file.read_at(&mut table, 512 + 16).expect("a header");
    let table = u64::from_be_bytes(table);
    let end = file.stat().expect("it is there").len / 512 - 1;
    file.punch_hole(end * 512, 512).expect("it can be cut");
    let present = if form == Placement::Full { blocks } else { 1 };
    // A packed block takes nine sectors. The first packed block ends one sector before a page boundary.
    let first = end + 6;
    for block in 0..present {
        let place = first + block * 9;
        file.write_at(&u32::try_from(place).expect("small").to_be_bytes(), table + block * 4).expect("an entry");
        let bits = if child { 0 } else { 0xFF };
        file.write_at(&[bits], place * 512).expect("a bitmap");
        file.set_len((place + 9) * 512).expect("room for the data");
    }
    let used = first + present * 9;
    let at = if form == Placement::Packed && !child { used + 21 } else { used };
    file.write_at(&footer, at * 512).expect("the footer");
    file.sync().expect("it is durable");
}
