//! Places every block of a new image and allocates its space in the file system.

use std::ops::Range;

use super::bat::next_places;
use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::format::bat::{self, BlockPlace};
use crate::storage::File;
use crate::units::{FileSector, SECTOR, SECTOR_BYTES};

/// Maximum number of bytes per call of `allocate`.
const MAX_ALLOCATION: u64 = 1 << 30;

/// Places all blocks of a new image that has no name yet, and allocates their space. Durable on return. The disk's
/// contents do not change: a child's blocks have clear bitmaps, a root's blocks are zeros.
///
/// # Errors
/// - `Unsupported` if the file system cannot allocate space in advance, or the format cannot place all blocks.
/// - `NoSpace`, `Io`.
pub(super) fn preallocate(file: &File) -> Result<()> {
    let image = Image::open(file.clone())?;
    let (Some(block_size), Some(table)) = (image.block_size(), image.bat()) else {
        reserve(file, 0, image.size() + SECTOR)?;
        return file.sync();
    };
    let blocks = block_size.blocks_for(image.size() / SECTOR);
    let (old, first) = (image.data_end(), FileSector::at_or_after(image.used_end()));
    let all: Vec<_> = next_places(first, block_size, blocks).collect();
    let Some(last) = all.last().filter(|_| all.len() as u64 == blocks) else {
        let what = "the format cannot address all blocks of this disk; use larger blocks";
        return Err(Error::new(ErrorKind::Unsupported, what).at_path(file.path()));
    };
    let end = last.end.byte_offset();
    // The table's padding and the footer are discarded: the first block may begin there.
    let from = first.byte_offset();
    file.punch_hole(from, old + SECTOR - from)?;
    reserve(file, all[0].start.byte_offset(), end + SECTOR)?;
    file.write_at(&image.footer().encode(), end)?;
    if image.kind() == DiskType::Dynamic {
        let ones = vec![0xFF; block_size.bitmap_sectors() as usize * SECTOR_BYTES];
        all.iter().try_for_each(|place| file.write_at(&ones, place.start.byte_offset()))?;
    }
    let place = |sectors: &Range<FileSector>| BlockPlace::from_sector(sectors.start).expect("an entry names it");
    let entries = (0..table.len() as usize).map(|block| all.get(block).map_or(bat::UNUSED, |at| place(at).entry()));
    let bytes: Vec<u8> = entries.flat_map(u32::to_be_bytes).collect();
    file.write_at(&bytes, image.table_offset().expect("it has a table"))?;
    file.sync()
}

/// Allocates the space of a range of bytes, with calls of limited length.
fn reserve(file: &File, from: u64, to: u64) -> Result<()> {
    let mut at = from;
    while at < to {
        let len = (to - at).min(MAX_ALLOCATION);
        file.allocate(at, len)?;
        at += len;
    }
    Ok(())
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use std::path::Path;

    use super::super::testing::{PATH, child, file, kinds, open};
    use super::super::{ImageKind, ImageSpec, create, create_preallocated};
    use super::*;
    use crate::storage::sim::{FaultPlan, SimHost};
    use crate::units::{BlockIndex, BlockSize};

    fn spec(kind: ImageKind) -> ImageSpec {
        ImageSpec {
            kind,
            size: 10 * (64 << 10) + SECTOR,
            block_size: BlockSize::from_bytes(64 << 10).unwrap(),
            reserve: 0,
        }
    }

    #[test]
    fn all_blocks_are_allocated_and_show_what_they_did() {
        for kind in [child(), ImageKind::Dynamic] {
            let (host, root) = (SimHost::new(1), matches!(kind, ImageKind::Dynamic));
            create_preallocated(&host, Path::new(PATH), &spec(kind)).unwrap();
            assert_eq!(kinds(&host), Vec::<&str>::new());
            let image = open(&host).unwrap();
            assert_eq!(image.image().bat().unwrap().used().count(), 11);
            let before = file(&host).stat().unwrap();
            assert!(before.allocated >= before.len - (8 << 10), "{before:?}");
            let mut first = [1; 2 * SECTOR_BYTES];
            image
                .file()
                .read_at(
                    &mut first,
                    image.image().bat().unwrap().place(BlockIndex::new(0)).unwrap().sector().byte_offset(),
                )
                .unwrap();
            assert_eq!(first[..SECTOR_BYTES], [if root { 0xFF } else { 0 }; SECTOR_BYTES], "the bitmap of block 0");
            assert_eq!(first[SECTOR_BYTES..], [0; SECTOR_BYTES], "its first sector");
            // The file system is full, and a write to an allocated block needs no space.
            host.set_faults(FaultPlan { capacity: Some(before.allocated), ..FaultPlan::default() });
            let place = image.reserve(BlockIndex::new(10)).unwrap().sector();
            image.file().write_at(&[7; SECTOR_BYTES], (place + 1).byte_offset()).unwrap();
            let mut bitmap = [1; SECTOR_BYTES];
            image.file().read_at(&mut bitmap, place.byte_offset()).unwrap();
            assert_eq!(bitmap, [if root { 0xFF } else { 0 }; SECTOR_BYTES]);
            assert_eq!(file(&host).stat().unwrap().allocated, before.allocated);
        }
    }

    #[test]
    fn a_full_file_system_leaves_no_file() {
        let host = SimHost::new(1);
        create(&host, Path::new("/d/other.vhd"), &spec(ImageKind::Dynamic)).unwrap();
        host.set_faults(FaultPlan { capacity: Some(200 << 10), ..FaultPlan::default() });
        let failed = create_preallocated(&host, Path::new(PATH), &spec(ImageKind::Dynamic)).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::NoSpace);
        assert_eq!(host.names(), [Path::new("/d/other.vhd")]);
    }
}
