//! Reduces the space that a file takes: moves blocks from its end into gaps, and punches holes into the remaining gaps.
//!
//! A move is a copy into a gap, a sync, a write of the block's table entry, a sync. The disk's contents are the same at
//! every moment, and the copy of an interrupted move is unreferenced. A batch of blocks moves between two syncs. Freed
//! space is not reused before the new entries are durable.

use std::ops::Range;

use super::offline_image::Offline;
use crate::error::Result;
use crate::failpoint;
use crate::format::bat::{self, BlockPlace};
use crate::format::layout;
use crate::storage::{Buffer, File};
use crate::storage::{is_seek_unsupported, next_data};
use crate::units::OnProgress;
use crate::units::{BlockIndex, BlockSize, FileSector, SECTOR};

/// Approximate number of bytes that move between two syncs.
const BATCH: u64 = 64 << 20;
/// Bytes per read and write of a copy.
const CHUNK: usize = 1 << 20;
/// Of this many page-aligned blocks that fit into a gap, one may be left out so that the others get a larger alignment.
const MISALIGNED_SHARE: u64 = 32;

/// The move of a block to a lower place.
struct BlockMove {
    block: BlockIndex,
    from: BlockPlace,
    to: BlockPlace,
}

impl Offline {
    /// Frees the places of `blocks`, whose contents the disk does not need, and of all blocks after the end of the
    /// disk.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the disk's contents are unchanged.
    pub fn free_blocks(&mut self, blocks: &[BlockIndex]) -> Result<()> {
        let mut blocks = blocks.to_vec();
        blocks.extend(self.blocks_beyond_disk());
        if blocks.is_empty() {
            return Ok(());
        }
        // A stale claim of the batmap would declare a block complete that gets a place later.
        if self.batmap_has_claims()? {
            let entries = self.sparse().header.entries;
            let at = self.used_end().next_multiple_of(layout::PAGE);
            self.write_table(at, entries)?;
            failpoint::reached("compact.empty-batmap-written");
            self.use_table(at, entries)?;
            failpoint::reached("compact.batmap-emptied");
        }
        self.drop_blocks(&blocks)?;
        failpoint::reached("compact.entries-dropped");
        // The gaps are punched now, because a move allocates space before it frees any.
        self.punch_unused(0..self.footer_offset())?;
        failpoint::reached("compact.gaps-punched");
        Ok(())
    }

    /// Moves blocks, and the table, from the end of the file into gaps.
    ///
    /// # Errors
    /// - `NoSpace`, `Io`: the disk's contents are unchanged.
    /// - the error that `watch` returns.
    pub fn close_gaps(&mut self, watch: &mut OnProgress<'_>) -> Result<()> {
        loop {
            let moved = self.move_blocks(watch)?;
            let lowered = self.move_table_down()?;
            watch(0)?;
            if !moved && !lowered {
                return Ok(());
            }
        }
    }

    /// Cuts the file after its last block or metadata, and frees space that is allocated in it but unwritten.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the disk's contents are unchanged.
    pub fn finish_compact(&mut self) -> Result<()> {
        self.punch_unused(0..self.footer_offset())?;
        self.truncate_unused()?;
        failpoint::reached("compact.file-cut");
        punch_unwritten(self.file(), 0)?;
        self.sync()
    }

    fn move_blocks(&mut self, watch: &mut OnProgress<'_>) -> Result<bool> {
        let block_size = self.sparse().header.block_size;
        let stride = u64::from(block_size.stride_sectors());
        let mut sources: Vec<(BlockPlace, BlockIndex)> =
            self.sparse().places.iter().map(|(block, place)| (*place, *block)).collect();
        sources.sort_unstable();
        // No block moves only to become aligned. If all blocks are page-aligned, they stay so. If some blocks are
        // packed, all blocks may move anywhere.
        let is_aligned = |place: BlockPlace| place.data(block_size).byte_offset().is_multiple_of(layout::PAGE);
        let packed = sources.iter().any(|(place, _)| !is_aligned(*place));
        let (mut batch, mut any) = (Vec::new(), false);
        'gaps: for gap in self.gaps(self.used_end()) {
            let mut free = FileSector::containing(gap.start)..FileSector::containing(gap.end);
            let above = sources.len() - sources.partition_point(|(place, _)| place.sector() < free.start);
            let mut coming = gap_capacity(&free, block_size).min(above as u64);
            while let Some(to) = place_in(&free, block_size, coming, packed) {
                match sources.pop_if(|(from, _)| *from > to) {
                    None => break 'gaps,
                    Some((from, block)) => batch.push(BlockMove { block, from, to }),
                }
                free.start = to.end(block_size);
                coming = coming.saturating_sub(1);
                any = true;
                if batch.len() as u64 * stride * SECTOR >= BATCH {
                    self.move_batch(&mut batch, watch)?;
                }
            }
        }
        self.move_batch(&mut batch, watch)?;
        Ok(any)
    }

    /// Copies the blocks and syncs, writes their entries and syncs, then frees their old places.
    fn move_batch(&mut self, batch: &mut Vec<BlockMove>, watch: &mut OnProgress<'_>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let len = u64::from(self.sparse().header.block_size.stride_sectors()) * SECTOR;
        let mut buffer = Buffer::zeroed(CHUNK);
        for moving in &*batch {
            let (from, to) = (moving.from.sector().byte_offset(), moving.to.sector().byte_offset());
            copy(self.file(), from, to, len, &mut buffer)?;
            watch(len)?;
        }
        self.sync()?;
        failpoint::reached("compact.blocks-copied");
        for moving in &*batch {
            self.sparse_mut().places.insert(moving.block, moving.to);
        }
        self.write_entries(batch.iter().map(|moving| moving.block))?;
        self.sync()?;
        failpoint::reached("compact.blocks-moved");
        for moving in batch.drain(..) {
            self.file().punch_hole(moving.from.sector().byte_offset(), len)?;
        }
        watch(0)
    }

    /// Moves the table into the first gap before it that is large enough.
    fn move_table_down(&mut self) -> Result<bool> {
        let (at, entries) = (self.sparse().header.table_offset, self.sparse().header.entries);
        let room = self.table_space(entries);
        let fits = |gap: Range<u64>| {
            let start = gap.start.next_multiple_of(layout::PAGE);
            (start + room <= gap.end && start < at).then_some(start)
        };
        let Some(to) = self.gaps(self.used_end()).into_iter().find_map(fits) else { return Ok(false) };
        self.write_table(to, entries)?;
        failpoint::reached("compact.table-copied");
        self.use_table(to, entries)?;
        failpoint::reached("compact.table-moved");
        Ok(true)
    }
}

/// Returns the number of blocks that a gap should take: as many as fit page-aligned, less a small share in a large gap,
/// so that the blocks there can have a larger alignment.
fn gap_capacity(gap: &Range<FileSector>, block_size: BlockSize) -> u64 {
    let (stride, paged) = (u64::from(block_size.stride_sectors()), layout::page_stride(block_size));
    let Some(first) = layout::place_from(gap.start, block_size, layout::PAGE) else { return 0 };
    let most = (gap.end + paged - stride).get().saturating_sub(first.get()) / paged;
    most - most / MISALIGNED_SHARE
}

/// Returns the place in a gap for the first of `coming` blocks: aligned, if that leaves space for the others, or
/// page-aligned, or, if neither fits and `packed` is set, the start of the gap.
fn place_in(gap: &Range<FileSector>, block_size: BlockSize, coming: u64, packed: bool) -> Option<BlockPlace> {
    let last = gap.end.get().checked_sub(block_size.stride_sectors().into())?.min(bat::MAX_ENTRY.into());
    let last = FileSector::new(last);
    let place = layout::best_place(gap.start, block_size, coming, last);
    let place = place.or_else(|| layout::best_place(gap.start, block_size, 1, last));
    let place = place.or_else(|| (packed && gap.start <= last).then_some(gap.start))?;
    BlockPlace::from_sector(place)
}

/// Copies `len` bytes and preserves holes. The two ranges do not overlap.
fn copy(file: &File, from: u64, to: u64, len: u64, buffer: &mut Buffer) -> Result<()> {
    file.punch_hole(to, len)?;
    let (mut at, end) = (from, from + len);
    while let Some(found) = next_data(file, at..end)? {
        at = found.start;
        while at < found.end {
            let piece = usize::try_from((found.end - at).min(CHUNK as u64)).expect("a chunk");
            file.read_at(&mut buffer[..piece], at)?;
            file.write_at(&buffer[..piece], to + (at - from))?;
            at += piece as u64;
        }
    }
    Ok(())
}

/// Frees the space of a file at or after byte `from` that is allocated but unwritten. That space reads as zeros before
/// and after, so no sync is needed.
///
/// # Errors
/// `Io`.
pub fn punch_unwritten(file: &File, from: u64) -> Result<()> {
    let (mut at, len) = (from, file.stat()?.len);
    while at < len {
        let (start, count) = match file.next_data(at) {
            // The file system cannot distinguish unwritten space from data.
            Err(e) if is_seek_unsupported(&e) => return Ok(()),
            found => found?.unwrap_or((len, 0)),
        };
        if start > at {
            file.punch_hole(at, start - at)?;
        }
        at = start + count.max(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sectors(gap: Range<u64>) -> Range<FileSector> {
        FileSector::new(gap.start)..FileSector::new(gap.end)
    }

    #[test]
    fn blocks_are_page_aligned_or_packed() {
        let block = BlockSize::from_bytes(4096).unwrap(); // nine sectors with its bitmap
        let place = |gap, packed| place_in(&sectors(gap), block, 1, packed).map(BlockPlace::entry);
        assert_eq!(place(16..100, true), Some(23), "its data at a page");
        assert_eq!(place(23..32, true), Some(23));
        assert_eq!(place(16..31, true), Some(16), "packed if an aligned block does not fit");
        assert_eq!(place(16..31, false), None, "never packed if blocks are page-aligned");
        assert_eq!((place(16..25, true), place(16..24, true)), (Some(16), None));
        assert_eq!(place(u64::from(u32::MAX)..u64::MAX / 2, true), None, "no entry can contain that sector");
        let default = BlockSize::DEFAULT;
        let place = |gap, coming| place_in(&sectors(gap), default, coming, false).map(BlockPlace::entry);
        assert_eq!(place(16..4224, 1), Some(127), "aligned");
        assert_eq!((place(16..4223, 1), place(16..4120, 1), place(16..4119, 1)), (Some(23), Some(23), None));
        assert_eq!((place(16..8328, 2), place(16..8327, 2)), (Some(127), Some(23)), "with room for another at a page");
        assert_eq!(place(16..4224, 9), Some(127), "they do not all fit anyway");
    }

    /// Counts the blocks that a gap takes, and the aligned ones among them.
    fn filled(gap: Range<u64>, block: BlockSize, above: u64) -> (u64, u64) {
        let mut gap = sectors(gap);
        let (mut coming, mut blocks, mut aligned) = (gap_capacity(&gap, block).min(above), 0, 0);
        while let Some(place) = place_in(&gap, block, coming, false).filter(|_| blocks < above) {
            let data = place.data(block).byte_offset();
            assert!(place.sector() >= gap.start && data.is_multiple_of(layout::PAGE));
            gap.start = place.end(block);
            assert!(gap.start <= gap.end);
            coming = coming.saturating_sub(1);
            (blocks, aligned) = (blocks + 1, aligned + u64::from(data.is_multiple_of(layout::alignment(block))));
        }
        (blocks, aligned)
    }

    #[test]
    fn gaps_of_whole_blocks_are_filled() {
        for bytes in [4 << 10, 256 << 10, 512 << 10, 2 << 20, 8 << 20, 256 << 20] {
            let block = BlockSize::from_bytes(bytes).unwrap();
            let stride = u64::from(block.stride_sectors());
            let first = |unit| layout::place_from(FileSector::new(1 << 20), block, unit).unwrap().get();
            let (page, unit) = (first(layout::PAGE), first(layout::alignment(block)));
            for n in 1..300 {
                // A gap of exactly `n` blocks between two page-aligned blocks.
                let gap = page - layout::page_stride(block) + stride..page + n * layout::page_stride(block);
                let (blocks, aligned) = filled(gap.clone(), block, u64::MAX);
                assert!(blocks <= n && blocks >= n - n / 32, "{blocks} of {n} at pages, of {bytes}");
                assert!(blocks == n || 2 * aligned > blocks, "left out for few aligned ones: {n} of {bytes}");
                assert_eq!(filled(gap, block, n / 2).0, n / 2, "{n} of {bytes}");
                let gap = unit - layout::aligned_stride(block) + stride..unit + n * layout::aligned_stride(block);
                assert_eq!(filled(gap, block, u64::MAX), (n, n), "{bytes}");
            }
        }
    }
}
