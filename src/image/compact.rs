//! Room that a file has too much: gaps between the blocks are closed from its end, and what is left of them becomes
//! holes.
//!
//! A block moves by a copy into a gap, a sync, its entry in the table, a sync: the disk is the same at every moment, and
//! what a killed move has left lies where nothing refers to it. Many move together between two syncs; room that became
//! free is not used before its entry is durable.

use std::ops::Range;

use super::holes::{cannot_tell, next_data};
use super::offline::Offline;
use crate::error::Result;
use crate::format::{bat, layout};
use crate::point;
use crate::storage::{Buffer, File};
use crate::units::{BlockSize, SECTOR};

/// Bytes of blocks that move between two syncs, about.
const BATCH: u64 = 64 << 20;
/// Bytes copied at once.
const CHUNK: usize = 1 << 20;

/// Is told how many more bytes are done, and ends the work where it fails.
pub type Watch<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// A block on its way down.
struct Move {
    block: u32,
    from: u64,
    to: u32,
}

impl Offline {
    /// Gives up the places of blocks that hold nothing the disk would miss, and what other programs left behind its end.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the disk shows the same.
    pub fn give_up(&mut self, blocks: &[u32]) -> Result<()> {
        let mut blocks = blocks.to_vec();
        blocks.extend(self.beyond());
        if blocks.is_empty() {
            return Ok(());
        }
        // A place that is given later would be called whole.
        if self.batmap_speaks()? {
            let entries = self.shape().header.entries;
            let at = self.used_end().next_multiple_of(layout::PAGE);
            self.write_table(at, entries)?;
            point::reached("compact.empty-batmap-written");
            self.use_table(at, entries)?;
            point::reached("compact.batmap-emptied");
        }
        self.drop_blocks(&blocks)?;
        point::reached("compact.entries-dropped");
        // At once: moving takes room before it gives any.
        self.punch_unused(0..self.tail())?;
        point::reached("compact.gaps-punched");
        Ok(())
    }

    /// Moves blocks, and the table, from the end of the file into gaps.
    ///
    /// # Errors
    /// As [`Offline::give_up`]; what `watch` fails with.
    pub fn close_gaps(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        loop {
            let moved = self.move_blocks(watch)?;
            let lowered = self.lower_table()?;
            watch(0)?;
            if !moved && !lowered {
                return Ok(());
            }
        }
    }

    /// Makes the file end behind its last block, and gives back room that was reserved in it and not written.
    ///
    /// # Errors
    /// As [`Offline::give_up`].
    pub fn settle(&mut self) -> Result<()> {
        self.punch_unused(0..self.tail())?;
        self.cut()?;
        point::reached("compact.file-cut");
        give_back(self.file(), 0)?;
        self.sync()
    }

    fn move_blocks(&mut self, watch: &mut Watch<'_>) -> Result<bool> {
        let block_size = self.shape().header.block_size;
        let stride = u64::from(block_size.stride_sectors());
        let mut sources: Vec<(u32, u32)> = self.shape().places.iter().map(|(block, place)| (*place, *block)).collect();
        sources.sort_unstable();
        // Blocks at pages stay at pages; where another writer packed them, they may lie anywhere.
        let data = u64::from(block_size.bitmap_sectors());
        let packed = sources.iter().any(|(place, _)| !(u64::from(*place) + data).is_multiple_of(layout::PAGE / SECTOR));
        let (mut batch, mut any) = (Vec::new(), false);
        'gaps: for gap in self.gaps(self.used_end()) {
            let mut free = gap.start / SECTOR..gap.end / SECTOR;
            while let Some(to) = place_in(&free, block_size, packed) {
                match sources.pop_if(|(from, _)| *from > to) {
                    None => break 'gaps,
                    Some((from, block)) => batch.push(Move { block, from: u64::from(from), to }),
                }
                free.start = u64::from(to) + stride;
                any = true;
                if batch.len() as u64 * stride * SECTOR >= BATCH {
                    self.carry_out(&mut batch, watch)?;
                }
            }
        }
        self.carry_out(&mut batch, watch)?;
        Ok(any)
    }

    /// Copies, makes the copies durable, then the entries, then gives the old places back.
    fn carry_out(&mut self, batch: &mut Vec<Move>, watch: &mut Watch<'_>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let len = u64::from(self.shape().header.block_size.stride_sectors()) * SECTOR;
        let mut buffer = Buffer::zeroed(CHUNK);
        for moving in &*batch {
            copy(self.file(), moving.from * SECTOR, u64::from(moving.to) * SECTOR, len, &mut buffer)?;
            watch(len)?;
        }
        self.sync()?;
        point::reached("compact.blocks-copied");
        for moving in &*batch {
            self.shape_mut().places.insert(moving.block, moving.to);
        }
        self.write_entries(batch.iter().map(|moving| moving.block))?;
        self.sync()?;
        point::reached("compact.blocks-moved");
        for moving in batch.drain(..) {
            self.file().punch(moving.from * SECTOR, len)?;
        }
        watch(0)
    }

    /// Moves the table into the first gap before it that is large enough.
    fn lower_table(&mut self) -> Result<bool> {
        let (at, entries) = (self.shape().header.table_offset, self.shape().header.entries);
        let room = self.table_room(entries);
        let fits = |gap: Range<u64>| {
            let start = gap.start.next_multiple_of(layout::PAGE);
            (start + room <= gap.end && start < at).then_some(start)
        };
        let Some(to) = self.gaps(self.used_end()).into_iter().find_map(fits) else { return Ok(false) };
        self.write_table(to, entries)?;
        point::reached("compact.table-copied");
        self.use_table(to, entries)?;
        point::reached("compact.table-moved");
        Ok(true)
    }
}

/// Where in a gap, in sectors, a block may go: its data at a page, or (`packed`) anywhere where that is too much.
fn place_in(gap: &Range<u64>, block_size: BlockSize, packed: bool) -> Option<u32> {
    let stride = u64::from(block_size.stride_sectors());
    let fits = |place: &u32| *place <= bat::MAX_ENTRY && u64::from(*place) + stride <= gap.end;
    let aligned = layout::next_place(gap.start, block_size, 1).ok().filter(fits);
    aligned.or_else(|| u32::try_from(gap.start).ok().filter(|place| packed && fits(place)))
}

/// Copies `len` bytes; holes stay holes. The two ranges do not overlap.
fn copy(file: &File, from: u64, to: u64, len: u64, buffer: &mut Buffer) -> Result<()> {
    file.punch(to, len)?;
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

/// Gives back the room that was reserved in a file from byte `from` on and not written: all of it reads as zeros, and
/// holes stay holes. What is durable does not change, so nothing waits for it.
///
/// # Errors
/// `Io`.
pub fn give_back(file: &File, from: u64) -> Result<()> {
    let (mut at, len) = (from, file.stat()?.len);
    while at < len {
        let (start, count) = match file.next_data(at) {
            // It reserved nothing that could be told apart.
            Err(e) if cannot_tell(&e) => return Ok(()),
            found => found?.unwrap_or((len, 0)),
        };
        if start > at {
            file.punch(at, start - at)?;
        }
        at = start + count.max(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_go_to_pages_or_where_they_fit() {
        let block = BlockSize::from_bytes(4096).unwrap(); // nine sectors with its bitmap
        assert_eq!(place_in(&(16..100), block, true), Some(23), "its data at a page");
        assert_eq!(place_in(&(23..32), block, true), Some(23));
        assert_eq!(place_in(&(16..31), block, true), Some(16), "packed where that is too much");
        assert_eq!(place_in(&(16..31), block, false), None, "never where blocks lie at pages");
        assert_eq!((place_in(&(16..25), block, true), place_in(&(16..24), block, true)), (Some(16), None));
        assert_eq!(place_in(&(u64::from(u32::MAX)..u64::MAX / 2), block, true), None, "no entry names that");
    }
}
