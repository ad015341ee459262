//! The block allocation table in memory: the file sector at which each block begins.
//!
//! Look-ups take no lock. An entry changes once, from unused to used, while the image is open. A reader that loads a
//! place (acquire) also sees the bitmap that was prepared before the place was stored (release).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::sparse_array::SparseArray;
use crate::format::bat::{BlockPlace, UNUSED};
use crate::format::layout;
use crate::units::{BlockIndex, BlockSize, FileSector};

/// The block allocation table of an open image. Entries are the file sectors of the blocks' bitmaps.
#[derive(Debug)]
pub struct Bat {
    entries: SparseArray<AtomicU32>,
}

impl Bat {
    /// Creates a table of `len` unused entries.
    pub fn new(len: u32) -> Bat {
        Bat { entries: SparseArray::new(len as usize, || AtomicU32::new(UNUSED)) }
    }

    /// Returns the number of entries.
    pub fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).expect("made from a u32")
    }

    /// Returns whether the table has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the place of a block; `None` if the block has no place.
    #[inline]
    pub fn place(&self, block: BlockIndex) -> Option<BlockPlace> {
        BlockPlace::from_entry(self.entries.get(block.as_usize())?.load(Ordering::Acquire))
    }

    /// Sets the place of a block, which does not change afterwards.
    pub fn set(&self, block: BlockIndex, place: BlockPlace) {
        self.entries.get_or_init(block.as_usize()).store(place.entry(), Ordering::Release);
    }

    /// Returns all blocks that have a place, ascending, with their places.
    pub fn used(&self) -> impl Iterator<Item = (BlockIndex, BlockPlace)> {
        self.entries.initialized().filter_map(|(block, entry)| {
            let place = BlockPlace::from_entry(entry.load(Ordering::Acquire))?;
            Some((BlockIndex::from_usize(block), place))
        })
    }

    /// Returns the first block at or after `block` that has a place.
    pub fn next_used(&self, block: BlockIndex) -> Option<BlockIndex> {
        let mut entries = self.entries.initialized_from(block.as_usize());
        let used = |entry: &AtomicU32| entry.load(Ordering::Acquire) != UNUSED;
        let (found, _) = entries.find(|(_, entry)| used(entry))?;
        Some(BlockIndex::from_usize(found))
    }
}

/// Returns the file sectors (bitmap and data) of each of the next `unplaced` blocks, placed at or after sector `next`.
/// Ends early if the BAT cannot address a place.
pub(super) fn next_places(
    next: FileSector,
    block_size: BlockSize,
    unplaced: u64,
) -> impl Iterator<Item = Range<FileSector>> {
    let (mut next, mut unplaced) = (next, unplaced);
    std::iter::from_fn(move || {
        let place = layout::next_place(next, block_size, unplaced).ok().filter(|_| unplaced > 0)?;
        next = place.end(block_size);
        unplaced -= 1;
        Some(place.sector()..next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_entries_are_found_in_order() {
        let (bat, block, place) = (Bat::new(3000), BlockIndex::new, |entry| BlockPlace::from_entry(entry).unwrap());
        assert_eq!((bat.place(block(2999)), bat.len()), (None, 3000));
        bat.set(block(2999), place(15));
        bat.set(block(4), place(0xFFFF_FFFE));
        assert_eq!(bat.used().collect::<Vec<_>>(), [(block(4), place(0xFFFF_FFFE)), (block(2999), place(15))]);
        let next = |from| bat.next_used(block(from)).map(BlockIndex::get);
        assert_eq!((next(0), next(4), next(5), next(2999)), (Some(4), Some(4), Some(2999), Some(2999)));
        assert_eq!(Bat::new(10).next_used(block(0)), None);
    }
}
