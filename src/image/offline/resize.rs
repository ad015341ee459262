//! Changes the size of the disk. Each step is durable before the next; at every moment the disk has its old or new
//! size.
//!
//! ```text
//!   fixed, larger    | data | footer |                      initial state
//!                    | data | footer | zero | old size |    add a footer of the old size at the new end
//!                    | data | zero ........ | old size |    wipe the first footer, which becomes part of the disk
//!                    | data ............... | new size |    write one sector: the switch
//!   fixed, smaller   write the new size (one sector), then a footer at the new end, then cut the file
//!
//!   with a table     1  zero the part of the last block after the end of the disk, and mask the parent there
//!                    2  add entries to the table in place, or write a longer table after the blocks; then the header,
//!                       whose first sector contains both the table's offset and its length
//!                    3  write the footers: the trailing one (the switch) and the copy at the start
//!   smaller          3, then drop the entries after the end of the disk, then free their space
//! ```
//!
//! A fixed image has only one footer, which must end the file. So the write of the second footer also makes the file
//! longer. A power cut during that write is harmless, because a new length survives only with the bytes that caused it
//! (crash-safety 2, A4: true for ext4, XFS and btrfs). No other step relies on that.
//!
//! The format allows more entries than blocks, and entries for blocks after the end of the disk. So an operation that
//! is interrupted between two steps leaves a valid image, and can be repeated.

use super::offline_image::Offline;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::metadata::MAX_TABLE_BYTES;
use crate::format::{Defect, DiskType, Footer, bitmap, layout};
use crate::image::check::check_blocks::bits_beyond_disk;
use crate::image::mtime::SavedMtime;
use crate::image::open::Image;
use crate::storage::File;
use crate::units::OnProgress;
use crate::units::{BlockIndex, BlockSize, FileSector, SECTOR, SectorRange};

/// Minimum growth of the file, in blocks, while blocks that mask the parent are added.
const MASK_GROWTH_BLOCKS: u64 = 16;

/// Returns the sectors of a range of the disk at which data of the parent chain is exposed unless the image masks it.
pub type ExposedSectors<'a> = dyn FnMut(SectorRange) -> Result<Vec<SectorRange>> + 'a;

/// Checks that the format allows the disk of `image` to have `size` bytes.
///
/// # Errors
/// - `Invalid` if the format does not allow the size.
/// - `Refused` if the block table would be too large.
pub fn check_size(image: &Image, size: u64) -> Result<()> {
    checked_blocks(image.file(), image.block_size(), size).map(drop)
}

/// Grows the disk of `image` to `size` bytes, as [`Offline::grow`] does. The file of the image is locked exclusively
/// and keeps its modification time. The image must be opened again afterwards, also after an error.
///
/// # Errors
/// Those of [`Offline::new`] and [`Offline::grow`].
pub fn grow_image(image: &Image, size: u64, exposed: &mut ExposedSectors<'_>) -> Result<()> {
    SavedMtime::preserve(image.file(), || Offline::new(image)?.grow(size, exposed))
}

/// Returns the number of blocks of a disk of `size` bytes; 0 for a fixed image.
fn checked_blocks(file: &File, block_size: Option<BlockSize>, size: u64) -> Result<u32> {
    let invalid = |defect: Defect| Error::from(defect).without_offset().at_path(file.path());
    if !Footer::size_fits(size) {
        return Err(invalid(Defect::DiskSize { at: 0, size }));
    }
    let Some(block_size) = block_size else { return Ok(0) };
    let (blocks, limit) = (block_size.blocks_for(size / SECTOR), MAX_TABLE_BYTES / 4);
    let too_large = Defect::TableTooLarge { at: 0, entries: blocks, limit };
    u32::try_from(blocks).ok().filter(|b| u64::from(*b) <= limit).ok_or(invalid(too_large))
}

impl Offline {
    /// Grows the disk to `size`, a multiple of 512 larger than the present size. The added sectors read as zeros: if
    /// `exposed` returns sectors at which a larger parent is exposed, zero sectors that mask it are added.
    ///
    /// # Errors
    /// - `Invalid` if the format does not allow the size.
    /// - `Refused` if the block table would be too large.
    /// - `NoSpace`, `Io`: the disk has its old or new size, and repeating the call is safe.
    /// - the error that `exposed` returns: the disk has its old size.
    pub fn grow(mut self, size: u64, exposed: &mut ExposedSectors<'_>) -> Result<()> {
        assert!(size > self.size() && size.is_multiple_of(SECTOR), "a disk grows by whole sectors");
        let blocks = checked_blocks(self.file(), self.block_size(), size)?;
        let Some(block_size) = self.block_size() else { return self.grow_fixed(size) };
        self = self.drop_blocks_beyond_disk()?;
        self.zero_end_of_last_block(block_size)?;
        failpoint::reached("resize.last-block-blank");
        let hiding = if self.kind() == DiskType::Differencing {
            self.mask_parent(block_size, size, exposed)?
        } else {
            Vec::new()
        };
        failpoint::reached("resize.parent-hidden");
        self.ensure_entries(blocks, &hiding)?;
        self.write_size(size)?;
        self.truncate_unused()?;
        failpoint::reached("resize.file-cut");
        Ok(())
    }

    /// Shrinks the disk to `size`, a multiple of 512 that is neither 0 nor larger than the present size. Discards the
    /// data after the new end and frees its space in the file, including leftovers of an interrupted call.
    ///
    /// # Errors
    /// - `NoSpace`, `Io`: the disk has its old or new size, and repeating the call is safe.
    /// - the error that `watch` returns.
    pub fn shrink(mut self, size: u64, watch: &mut OnProgress<'_>) -> Result<()> {
        assert!(size <= self.size() && size > 0 && size.is_multiple_of(SECTOR), "a disk shrinks by whole sectors");
        let Some(block_size) = self.block_size() else { return self.shrink_fixed(size) };
        if size < self.size() {
            if self.batmap_has_claims()? {
                let entries = self.sparse().header.entries;
                self.move_table(entries)?;
                failpoint::reached("resize.batmap-empty");
            }
            self.write_size(size)?;
        }
        self = self.drop_blocks_beyond_disk()?;
        failpoint::reached("resize.entries-dropped");
        self.clear_bits_beyond(block_size)?;
        failpoint::reached("resize.bits-cleared");
        let blocks = u32::try_from(block_size.blocks_for(size / SECTOR)).expect("no more than before");
        let (at, entries) = (self.sparse().header.table_offset, self.sparse().header.entries);
        if entries > blocks && !self.has_batmap() {
            self.use_table(at, blocks)?;
            failpoint::reached("resize.table-shortened");
        }
        self.close_gaps(watch)?;
        self.truncate_unused()?;
        failpoint::reached("resize.room-given-back");
        Ok(())
    }

    /// Cuts the file after its last block or metadata: completes an interrupted [`Offline::grow`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the contents of the disk are unchanged.
    pub fn truncate_after_blocks(mut self) -> Result<()> {
        self.align_footer()?;
        self.truncate_unused()
    }

    /// Drops the entries of blocks after the end of the disk, which growth would expose, and recovers the image again.
    fn drop_blocks_beyond_disk(mut self) -> Result<Offline> {
        let beyond = self.blocks_beyond_disk();
        if beyond.is_empty() {
            return Ok(self);
        }
        self.drop_blocks(&beyond)?;
        self.reopened()
    }

    /// Clears, durably, the wrongly set bits of the last block after the end of the disk.
    fn clear_bits_beyond(&mut self, block_size: BlockSize) -> Result<()> {
        let sectors = self.size() / SECTOR;
        let (block, within) = (block_size.block_at(sectors), block_size.sector_in_block(sectors));
        if within == 0 || self.block(block).is_none() {
            return Ok(());
        }
        let words = self.bitmap(block)?;
        let stray: Vec<_> = bits_beyond_disk(&words, within, block_size.sectors()).collect();
        if stray.is_empty() {
            return Ok(());
        }
        let mut right = words;
        stray.into_iter().for_each(|(from, end)| bitmap::clear(&mut right, from, end - from));
        self.write_bitmap(block, right)?;
        self.sync()
    }

    fn write_bitmap(&self, block: BlockIndex, words: Vec<u64>) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        bitmap::encode(words.into_iter(), &mut bytes);
        self.file().write_at(&bytes, self.block(block).expect("it has a place").0)
    }

    /// Zeroes, durably, the part of the last block after the end of the disk, independent of its bits.
    fn zero_end_of_last_block(&mut self, block_size: BlockSize) -> Result<()> {
        let sectors = self.size() / SECTOR;
        let within = block_size.sector_in_block(sectors);
        if within == 0 {
            return Ok(());
        }
        let Some((_, data)) = self.block(block_size.block_at(sectors)) else { return Ok(()) };
        let from = data + u64::from(within) * SECTOR;
        self.file().punch_hole(from, data + u64::from(block_size.bytes()) - from)?;
        self.sync()
    }

    /// Marks zero sectors as present between the end of the disk and `size` wherever the parent chain is exposed.
    /// Returns the blocks added for them, which have no entries yet. The sectors have no effect before the size
    /// changes, and become durable with the table.
    fn mask_parent(
        &mut self,
        block_size: BlockSize,
        size: u64,
        exposed: &mut ExposedSectors<'_>,
    ) -> Result<Vec<BlockIndex>> {
        let (old, new) = (self.size() / SECTOR, size / SECTOR);
        let (mut made, mut next) = (Vec::new(), FileSector::containing(self.used_end()));
        let blocks = block_size.blocks_for(new);
        for (block, part) in block_size.split_at_blocks(SectorRange::between(old, new)) {
            let hidden = exposed(part)?;
            if hidden.is_empty() {
                continue;
            }
            let present = self.block(block);
            if present.is_none() {
                let unplaced = blocks.saturating_sub(self.sparse().places.len() as u64);
                let place = layout::next_place(next, block_size, unplaced);
                let place = place.map_err(|defect| self.no_space(&defect.to_string()))?;
                next = place.end(block_size);
                if next.byte_offset() > self.footer_offset() {
                    let more =
                        (blocks - u64::from(block.get())).min(MASK_GROWTH_BLOCKS) * layout::aligned_stride(block_size);
                    match self.extend((next + more).byte_offset()) {
                        // After a failed sync, the bitmaps written above may be lost.
                        Err(e) if e.kind() == ErrorKind::NoSpace && !e.is_from_sync() => {
                            self.extend(next.byte_offset())?;
                        }
                        extended => extended?,
                    }
                }
                self.sparse_mut().places.insert(block, place);
                made.push(block);
            }
            let mut words = self.bitmap(block)?;
            for range in hidden {
                let count = u32::try_from(range.count()).expect("a part of a block");
                bitmap::set(&mut words, block_size.sector_in_block(range.start()), count);
            }
            self.write_bitmap(block, words)?;
        }
        Ok(made)
    }

    /// Extends the table to at least `blocks` entries, and writes the entries of the blocks in `made`.
    fn ensure_entries(&mut self, blocks: u32, made: &[BlockIndex]) -> Result<()> {
        let (at, old) = (self.sparse().header.table_offset, self.sparse().header.entries);
        let entries = old.max(blocks);
        // The range that a batmap's checksum covers depends on the disk's size. An empty batmap is valid for every size
        // that it has space for.
        if self.has_batmap() && (self.batmap_has_claims()? || entries > old) {
            return self.move_table(entries);
        }
        if !self.has_room_for(entries) {
            return self.move_table(entries);
        }
        self.write_more_entries(entries, made)?;
        failpoint::reached("resize.entries-written");
        if entries > old {
            self.use_table(at, entries)?;
            failpoint::reached("resize.table-longer");
        }
        Ok(())
    }

    /// Moves the table after all blocks, with `entries` entries, and with an empty batmap if the image has one.
    pub(super) fn move_table(&mut self, entries: u32) -> Result<()> {
        let at = self.used_end().next_multiple_of(layout::PAGE);
        self.write_table(at, entries)?;
        failpoint::reached("resize.new-table-written");
        self.use_table(at, entries)?;
        failpoint::reached("resize.table-moved");
        Ok(())
    }

    /// Writes the new size to both footers. The trailing footer is authoritative. If a power cut leaves the footers
    /// with different sizes, both are valid, and the image is not written before
    /// [`open_reconciled`](crate::image::open_reconciled) has updated the copy at the start.
    fn write_size(&mut self, size: u64) -> Result<()> {
        self.write_footers(self.footer().with_size(size))?;
        failpoint::reached("resize.size-switched");
        Ok(())
    }

    fn grow_fixed(mut self, size: u64) -> Result<()> {
        let old = self.size();
        self.align_footer()?;
        // The footer at the new end contains the old size, so the space between the disk and that footer is unused.
        self.write_second_footer(size)?;
        failpoint::reached("resize.fixed-footer-moved");
        self.file().punch_hole(old, size - old)?;
        self.sync()?;
        failpoint::reached("resize.fixed-room-blank");
        self.truncate_to_footer(size)?;
        failpoint::reached("resize.fixed-end-there");
        self.write_footers(self.footer().with_size(size))?;
        failpoint::reached("resize.fixed-size-switched");
        Ok(())
    }

    fn shrink_fixed(mut self, size: u64) -> Result<()> {
        self.align_footer()?;
        if size < self.size() {
            self.write_footers(self.footer().with_size(size))?;
            failpoint::reached("resize.fixed-size-smaller");
        }
        self.truncate_unused()?;
        failpoint::reached("resize.fixed-file-cut");
        Ok(())
    }
}
