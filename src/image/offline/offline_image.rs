//! An image that is locked exclusively, for changes of its structure: its size, its block table, the places of blocks.
//!
//! Every public method that changes the file leads from one valid image to another. `resize.rs` and `compact.rs`
//! combine the steps, with the failpoints at which tests kill the process.
//!
//! New and obsolete structures lie in unreferenced space: after the blocks, or in a gap between them. So a step
//! overwrites referenced bytes only in these cases: a footer (one sector); the header's first sector, which contains
//! every field that changes; sectors of the block table, for which any mixture of old and new entries shows the same
//! disk; data and bits of the last block after the end of the disk, which no reader uses.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::PoisonError;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::BlockPlace;
use crate::format::{BatmapHeader, DiskType, DynamicHeader, Footer, MetadataMap, bitmap};
use crate::image::open::Image;
use crate::image::write::recover::recover;
use crate::storage::File;
use crate::units::{BlockIndex, BlockSize, SECTOR, SECTOR_BYTES};

/// An image that is locked exclusively, after the recovery that an open for writing makes.
pub struct Offline {
    file: File,
    footer: Footer,
    /// Byte offset of the trailing footer.
    footer_offset: u64,
    sparse: Option<OfflineSparse>,
}

/// The part of an [`Offline`] image that only dynamic and differencing images have.
pub(super) struct OfflineSparse {
    pub(super) header: DynamicHeader,
    pub(super) metadata: MetadataMap,
    pub(super) batmap: Option<BatmapHeader>,
    /// The value that fills the table's last sector after the last entry.
    pub(super) padding: u32,
    /// The places of the blocks, including blocks after the end of the disk.
    pub(super) places: BTreeMap<BlockIndex, BlockPlace>,
}

impl Offline {
    /// Recovers an opened image, whose file is locked exclusively, from an unclean shutdown, and wraps it.
    ///
    /// # Errors
    /// - `Refused` if the image must not be written.
    /// - `NoSpace`, `Io`.
    pub fn new(image: &Image) -> Result<Offline> {
        image.check_writable()?;
        let (file, footer) = (image.file().clone(), image.footer().clone());
        let Some(sparse) = image.sparse() else {
            return Ok(Offline { file, footer, footer_offset: image.data_end(), sparse: None });
        };
        let room = recover(image, sparse.header.block_size, &[], false)?.free_tail.into_inner();
        let tail = room.unwrap_or_else(PoisonError::into_inner).footer.byte_offset();
        let shape = OfflineSparse {
            header: sparse.header.clone(),
            metadata: sparse.metadata.clone(),
            batmap: sparse.batmap.clone(),
            padding: image.table_padding(),
            places: sparse.table.used().collect(),
        };
        Ok(Offline { file, footer, footer_offset: tail, sparse: Some(shape) })
    }

    /// Opens and recovers the same image again.
    ///
    /// # Errors
    /// The errors of [`Image::open`] and [`Offline::new`].
    pub(super) fn reopened(&self) -> Result<Offline> {
        Offline::new(&Image::open(self.file.clone())?)
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the disk type: fixed, dynamic or differencing.
    pub fn kind(&self) -> DiskType {
        self.footer.disk_type
    }

    /// Returns the virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.footer.current_size
    }

    /// Returns the block size; `None` for a fixed image.
    pub fn block_size(&self) -> Option<BlockSize> {
        self.sparse.as_ref().map(|s| s.header.block_size)
    }

    /// Returns the blocks of the disk that have a place, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        let end = self.blocks_of_disk();
        self.sparse.iter().flat_map(|s| s.places.keys()).copied().take_while(move |block| block.is_within(end))
    }

    /// Returns the byte offsets of a block's bitmap and of its data; `None` if the block has no place.
    pub fn block(&self, block: BlockIndex) -> Option<(u64, u64)> {
        let shape = self.sparse.as_ref()?;
        let place = shape.places.get(&block)?;
        Some((place.sector().byte_offset(), place.data(shape.header.block_size).byte_offset()))
    }

    /// Reads the bitmap of a block that has a place; one bit per sector.
    ///
    /// # Errors
    /// `Io`.
    pub fn bitmap(&self, block: BlockIndex) -> Result<Vec<u64>> {
        let (at, data) = self.block(block).expect("only blocks with a place are asked for");
        let mut bytes = vec![0; usize::try_from(data - at).expect("a bitmap")];
        self.file.read_at(&mut bytes, at)?;
        let mut words = vec![0; bitmap::words(self.sparse().header.block_size)];
        bitmap::decode(&bytes, &mut words);
        Ok(words)
    }

    pub(super) fn sparse(&self) -> &OfflineSparse {
        self.sparse.as_ref().expect("it has a block table")
    }

    pub(super) fn sparse_mut(&mut self) -> &mut OfflineSparse {
        self.sparse.as_mut().expect("it has a block table")
    }

    pub(super) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Returns the byte offset of the trailing footer.
    pub(super) fn footer_offset(&self) -> u64 {
        self.footer_offset
    }

    /// Returns the number of blocks of the disk, with a place or without.
    pub(super) fn blocks_of_disk(&self) -> u64 {
        self.block_size().map_or(0, |size| size.blocks_for(self.footer.sectors()))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync()
    }

    /// Returns the end of all blocks and metadata, rounded up to whole sectors.
    pub(super) fn used_end(&self) -> u64 {
        let shape = self.sparse();
        // An entry after the end of the disk may point anywhere. Places outside the file are not blocks (O12).
        let ends = shape.places.values().map(|place| place.end(shape.header.block_size).byte_offset());
        let blocks = ends.filter(|end| *end <= self.footer_offset).max().unwrap_or(0);
        shape.metadata.end().next_multiple_of(SECTOR).max(blocks)
    }

    /// Returns the unreferenced byte ranges between metadata and blocks before `end`, ascending.
    pub(super) fn gaps(&self, end: u64) -> Vec<Range<u64>> {
        let shape = self.sparse();
        let blocks = shape.places.values().map(|place| place.byte_range(shape.header.block_size));
        let mut taken: Vec<_> = shape.metadata.extents().iter().map(|e| e.range.clone()).chain(blocks).collect();
        taken.sort_unstable_by_key(|range| range.start);
        let (mut gaps, mut at) = (Vec::new(), 0);
        for range in taken.into_iter().chain(std::iter::once(end..end)) {
            let gap = at..range.start.min(end) / SECTOR * SECTOR;
            if gap.start < gap.end {
                gaps.push(gap);
            }
            at = at.max(range.end.next_multiple_of(SECTOR));
        }
        gaps
    }

    // The file's end.

    /// Extends the file if `end` lies after the start of the trailing footer. The space up to `end` is zero, and is
    /// allocated if the file system can do that.
    ///
    /// The new footer is durable before the old one is wiped, so one of them is valid at every moment.
    ///
    /// # Errors
    /// - `NoSpace`: the file is unchanged.
    /// - `Io`.
    pub(super) fn extend(&mut self, end: u64) -> Result<()> {
        if end <= self.footer_offset {
            return Ok(());
        }
        let (old, end) = (self.footer_offset, end.max(self.footer_offset + SECTOR));
        lengthen(&self.file, old + SECTOR, end, &self.footer.encode())?;
        self.file.write_at(&[0; SECTOR_BYTES], old)?;
        self.sync()?;
        self.footer_offset = end;
        Ok(())
    }

    /// Writes a second footer at byte `at`, in unused space, unless the trailing footer is there. Durable on return. If
    /// `at` is after the trailing footer, the second footer becomes the trailing one.
    ///
    /// # Errors
    /// - `NoSpace`: the file is unchanged.
    /// - `Io`.
    pub(super) fn write_second_footer(&mut self, at: u64) -> Result<()> {
        if at == self.footer_offset {
            return Ok(());
        }
        let len = self.file.stat()?.len;
        self.file.write_at(&self.footer.encode(), at).inspect_err(|_| drop(self.file.set_len(len)))?;
        self.sync()?;
        self.footer_offset = self.footer_offset.max(at);
        Ok(())
    }

    /// Cuts the file after a footer that was written at byte `at` before.
    pub(super) fn truncate_to_footer(&mut self, at: u64) -> Result<()> {
        if at < self.footer_offset {
            self.file.set_len(at + SECTOR)?;
            self.sync()?;
            self.footer_offset = at;
        }
        Ok(())
    }

    /// Aligns the trailing footer to a sector. In a file whose length is not a multiple of 512 the footer spans two
    /// sectors and could be torn.
    pub(super) fn align_footer(&mut self) -> Result<()> {
        match self.footer_offset % SECTOR {
            0 => Ok(()),
            _ => self.write_second_footer(self.footer_offset.next_multiple_of(SECTOR) + SECTOR),
        }
    }

    /// Cuts the file directly after its last used byte. The new footer is durable before the file is cut.
    pub(super) fn truncate_unused(&mut self) -> Result<()> {
        let end = if self.sparse.is_some() { self.used_end() } else { self.size() };
        if self.footer_offset == end {
            return Ok(());
        }
        self.file.write_at(&self.footer.encode(), end)?;
        self.sync()?;
        self.file.set_len(end + SECTOR)?;
        self.sync()?;
        self.footer_offset = end;
        Ok(())
    }

    /// Replaces the trailing footer, which is authoritative, and then the copy at the start. Each is one sector.
    /// Durable on return.
    pub(super) fn write_footers(&mut self, footer: Footer) -> Result<()> {
        self.file.write_at(&footer.encode(), self.footer_offset)?;
        if self.sparse.is_some() {
            self.file.write_at(&footer.encode(), 0)?;
        }
        self.sync()?;
        self.footer = footer;
        Ok(())
    }

    /// Makes a `NoSpace` error with the reason `why`.
    pub(super) fn no_space(&self, why: &str) -> Error {
        Error::new(ErrorKind::NoSpace, why).at_path(self.file.path())
    }
}

/// Extends a file of `len` bytes, durably: allocates the space after `len`, if the file system can do that, and ends
/// the file with a footer at byte `footer_at`. If the allocation or the write fails, the file keeps its old length. If
/// the sync fails, the file has the new length.
pub(super) fn lengthen(file: &File, len: u64, footer_at: u64, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
    let longer = match file.allocate(len, footer_at + SECTOR - len) {
        Err(e) if e.kind() != ErrorKind::Unsupported => Err(e),
        _ => file.write_at(footer, footer_at),
    };
    // ext4 keeps the space that a failed fallocate got; cutting the file to its old length frees it.
    longer.inspect_err(|_| drop(file.set_len(len)))?;
    file.sync()
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::image::ImageKind;
    use crate::image::testing::{child, file, host_with};
    use crate::storage::sim::{FaultPlan, SimHost};
    use crate::units::FileSector;

    fn offline(host: &SimHost) -> Offline {
        Offline::new(&Image::open(file(host)).unwrap()).unwrap()
    }

    fn len(host: &SimHost) -> u64 {
        file(host).stat().unwrap().len
    }

    #[test]
    fn the_footer_moves_out_and_back() {
        let host = host_with(child(), 1000);
        let mut image = offline(&host);
        let (before, end) = (len(&host), image.footer_offset());
        image.extend(end + 100 * SECTOR).unwrap();
        assert_eq!((image.footer_offset(), len(&host)), (end + 100 * SECTOR, before + 100 * SECTOR));
        let mut room = [1; 8 * SECTOR_BYTES];
        image.file().read_at(&mut room, end).unwrap();
        assert_eq!(room, [0; 8 * SECTOR_BYTES], "where the footer was");
        image.truncate_unused().unwrap();
        assert_eq!((len(&host), image.footer_offset()), (image.used_end() + SECTOR, image.used_end()));
        let stat = file(&host).stat().unwrap();
        host.set_faults(FaultPlan { capacity: Some(stat.allocated + 8192), ..FaultPlan::default() });
        assert_eq!(image.extend(stat.len + (1 << 20)).unwrap_err().kind(), ErrorKind::NoSpace);
        let after = file(&host).stat().unwrap();
        assert_eq!((after.len, after.allocated), (stat.len, stat.allocated), "as it was");
    }

    #[test]
    fn a_footer_across_two_sectors_is_made_one() {
        for kind in [ImageKind::Fixed, ImageKind::Dynamic] {
            let host = host_with(kind, 1000);
            let (f, mut footer) = (file(&host), [0; SECTOR_BYTES]);
            let end = len(&host);
            f.read_at(&mut footer, end - SECTOR).unwrap();
            f.write_at(&[0; SECTOR_BYTES], end - SECTOR).unwrap();
            f.write_at(&footer, end + 100).unwrap();
            let mut image = offline(&host);
            image.align_footer().unwrap();
            assert!(image.footer_offset().is_multiple_of(SECTOR) && len(&host) == image.footer_offset() + SECTOR);
            image.truncate_unused().unwrap();
            let footer_now = Image::open(file(&host)).unwrap().footer().encode();
            assert_eq!(footer_now, footer);
        }
    }

    #[test]
    fn gaps_are_unreferenced_space() {
        let host = host_with(child(), 128 * 4);
        let mut image = offline(&host);
        let first = image.used_end() / SECTOR;
        let places = [(0, first + 10), (2, first + 10 + 129), (3, first + 400)];
        let places = places
            .map(|(block, place)| (BlockIndex::new(block), BlockPlace::from_sector(FileSector::new(place)).unwrap()));
        image.sparse_mut().places.extend(places);
        image.footer_offset = (first + 529) * SECTOR;
        let gaps = image.gaps(image.used_end());
        let behind: Vec<_> = gaps.iter().filter(|gap| gap.start >= first * SECTOR).cloned().collect();
        assert_eq!(behind, [first * SECTOR..(first + 10) * SECTOR, (first + 268) * SECTOR..(first + 400) * SECTOR]);
        assert_eq!(image.used_end(), (first + 529) * SECTOR);
        image.sparse_mut().places.insert(BlockIndex::new(9), BlockPlace::from_entry(u32::MAX - 1).unwrap());
        assert_eq!(image.used_end(), (first + 529) * SECTOR, "places outside the file are not blocks");
        let blocks: Vec<_> = image.blocks().map(BlockIndex::get).collect();
        assert_eq!((image.block(BlockIndex::new(1)), blocks), (None, vec![0, 2, 3]));
    }
}
