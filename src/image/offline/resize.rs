//! Another size: each step durable before the next, the disk of the old size or the new one at every moment.
//!
//! ```text
//!   fixed, larger    | data | footer |              at first
//!                    | data | footer | zero | old size |    a second footer at the new end, of the old size
//!                    | data | zero ........ | old size |    the first one wiped: it becomes a part of the disk
//!                    | data ............... | new size |    one sector: the switch
//!   fixed, smaller   the size first (one sector), then a footer at the new end, then the file is cut
//!
//!   with a table     1  what the disk will show of the last block and behind it is made zero
//!                    2  the table gets entries: where it is, or else a new one behind the blocks; then the header, whose
//!                       first sector holds both the table's place and its length
//!                    3  the footers: the one at the end (the switch) and the copy at the start
//!   smaller          3, then the entries behind the end go, and then their room
//! ```
//!
//! A fixed image has one footer, and the file cannot become longer before it has one at its new end: there a power cut
//! is harmless because a new length survives only with the bytes that made it (crash-safety 3.2, A4: so on ext4, XFS and
//! btrfs). All else asks for nothing of that kind.
//!
//! More entries than blocks are legal, and so are entries for blocks behind the end: whoever is ended between two steps
//! leaves a sound image, and begins again.

use super::offline_image::Offline;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::metadata::MAX_TABLE_BYTES;
use crate::format::{Defect, DiskType, Footer, bitmap, layout};
use crate::image::check::check_blocks::bits_beyond_disk;
use crate::units::OnProgress;
use crate::units::{BlockSize, SECTOR, SectorRange};

/// Blocks by which the file grows at least while blocks that hide the parent are made.
const MASK_GROWTH_BLOCKS: u64 = 16;

/// Says which sectors of a range of the disk the chain beneath would show if the image did not hide them.
pub type ExposedSectors<'a> = dyn FnMut(SectorRange) -> Result<Vec<SectorRange>> + 'a;

impl Offline {
    /// Makes the disk larger: `size` is a multiple of 512 and larger than it is. What is added reads as zeros: where a
    /// larger parent would shine through, by `shining`, sectors are made that hide it.
    ///
    /// # Errors
    /// `Invalid` for a size that the format does not have; `NoSpace`, `Io`: the disk has its old size or the new one, and
    /// resizing it again is safe.
    pub fn grow(mut self, size: u64, shining: &mut ExposedSectors<'_>) -> Result<()> {
        assert!(size > self.size() && size.is_multiple_of(SECTOR), "a disk grows by whole sectors");
        let invalid = |defect: Defect| Error::from(defect).without_offset().at_path(self.file().path());
        if !Footer::size_fits(size) {
            return Err(invalid(Defect::DiskSize { at: 0, size }));
        }
        let Some(block_size) = self.block_size() else { return self.grow_fixed(size) };
        let (blocks, limit) = (block_size.blocks_for(size / SECTOR), MAX_TABLE_BYTES / 4);
        let too_large = Defect::TableTooLarge { at: 0, entries: blocks, limit };
        let blocks = u32::try_from(blocks).ok().filter(|b| u64::from(*b) <= limit).ok_or(invalid(too_large))?;
        self = self.drop_blocks_beyond_disk()?;
        self.zero_end_of_last_block(block_size)?;
        failpoint::reached("resize.last-block-blank");
        let hiding = if self.kind() == DiskType::Differencing {
            self.mask_parent(block_size, size, shining)?
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

    /// Makes the disk smaller: `size` is a multiple of 512, not 0, and not larger than it is. What is cut off is given up,
    /// and its room in the file; also what an interrupted call has left of that.
    ///
    /// # Errors
    /// As [`Offline::grow`]; what `watch` fails with.
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

    /// Makes the file end behind its last block: what an interrupted [`Offline::grow`] has left to do.
    ///
    /// # Errors
    /// `Io`.
    pub fn truncate_after_blocks(mut self) -> Result<()> {
        self.align_footer()?;
        self.truncate_unused()
    }

    /// Gives up entries of blocks behind the end, which would come to life, and what lies behind all blocks then.
    fn drop_blocks_beyond_disk(mut self) -> Result<Offline> {
        let beyond = self.blocks_beyond_disk();
        if beyond.is_empty() {
            return Ok(self);
        }
        self.drop_blocks(&beyond)?;
        self.reopened()
    }

    /// Clears the bits of the last block that speak for no sector of the disk any more. Durable.
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

    fn write_bitmap(&self, block: u32, words: Vec<u64>) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        bitmap::encode(words.into_iter(), &mut bytes);
        self.file().write_at(&bytes, self.block(block).expect("it has a place").0)
    }

    /// Makes the part of the last block behind the end of the disk zero, whatever its bits say. Durable.
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

    /// Makes sectors behind the end of the disk, up to `size`, present and zero where the chain beneath would shine
    /// through. Of no meaning before the size changes, and durable with the table; the blocks made for them have no entries
    /// yet and are returned.
    fn mask_parent(&mut self, block_size: BlockSize, size: u64, shining: &mut ExposedSectors<'_>) -> Result<Vec<u32>> {
        let (old, new) = (self.size() / SECTOR, size / SECTOR);
        let (mut made, mut next) = (Vec::new(), self.used_end() / SECTOR);
        let blocks = block_size.blocks_for(new);
        for (block, part) in block_size.split_at_blocks(SectorRange::between(old, new)) {
            let hidden = shining(part)?;
            if hidden.is_empty() {
                continue;
            }
            let present = self.block(block);
            if present.is_none() {
                let unplaced = blocks.saturating_sub(self.sparse().places.len() as u64);
                let place = layout::next_place(next, block_size, unplaced);
                let place = place.map_err(|defect| self.no_space(&defect.to_string()))?;
                next = u64::from(place) + u64::from(block_size.stride_sectors());
                if next * SECTOR > self.footer_offset() {
                    let more = (blocks - u64::from(block)).min(MASK_GROWTH_BLOCKS) * layout::aligned_stride(block_size);
                    match self.extend((next + more) * SECTOR) {
                        Err(e) if e.kind() == ErrorKind::NoSpace => self.extend(next * SECTOR)?,
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

    /// Gives the table at least `blocks` entries, and those of the blocks in `made` their places.
    fn ensure_entries(&mut self, blocks: u32, made: &[u32]) -> Result<()> {
        let (at, old) = (self.sparse().header.table_offset, self.sparse().header.entries);
        let entries = old.max(blocks);
        // What a batmap's sum covers follows the size; one that says nothing fits all sizes that it has room for.
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

    /// Writes the table anew behind all blocks, with so many entries, and an empty batmap if the image has one.
    pub(super) fn move_table(&mut self, entries: u32) -> Result<()> {
        let at = self.used_end().next_multiple_of(layout::PAGE);
        self.write_table(at, entries)?;
        failpoint::reached("resize.new-table-written");
        self.use_table(at, entries)?;
        failpoint::reached("resize.table-moved");
        Ok(())
    }

    /// Both footers say another size. The one at the end counts; where the power goes between the two, both are true, and
    /// nothing is written before [`open_reconciled`](crate::image::open_reconciled) has renewed the other.
    fn write_size(&mut self, size: u64) -> Result<()> {
        self.write_footers(self.footer().with_size(size))?;
        failpoint::reached("resize.size-switched");
        Ok(())
    }

    fn grow_fixed(mut self, size: u64) -> Result<()> {
        let old = self.size();
        self.align_footer()?;
        // A footer at the new end that says the old size. Between the disk and it lies nothing that counts.
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
