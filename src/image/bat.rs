//! The block allocation table in memory: which file sector a block begins at.
//!
//! Look-ups take no lock. An entry goes from unused to used once and never changes again while the image is open, so a
//! reader that sees a place (acquire) also sees the bitmap that was prepared for it before (release).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::sparse_array::SparseArray;
use crate::format::bat::UNUSED;
use crate::format::layout;
use crate::units::BlockSize;

/// The table. Entries are file sectors of the blocks' bitmaps.
#[derive(Debug)]
pub struct Bat {
    entries: SparseArray<AtomicU32>,
}

impl Bat {
    /// A table of `len` unused entries.
    pub fn new(len: u32) -> Bat {
        Bat { entries: SparseArray::new(len as usize, || AtomicU32::new(UNUSED)) }
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).expect("made from a u32")
    }

    /// Whether it has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The file sector at which a block's bitmap begins; `None` where the block has no place.
    #[inline]
    pub fn place(&self, block: u32) -> Option<u32> {
        let entry = self.entries.get(block as usize)?.load(Ordering::Acquire);
        (entry != UNUSED).then_some(entry)
    }

    /// Gives a block its place, for good.
    pub fn set(&self, block: u32, place: u32) {
        assert_ne!(place, UNUSED, "a place is a file sector");
        self.entries.get_or_init(block as usize).store(place, Ordering::Release);
    }

    /// All blocks that have a place, ascending.
    pub fn used(&self) -> impl Iterator<Item = (u32, u32)> {
        self.entries.initialized().filter_map(|(block, entry)| {
            let place = entry.load(Ordering::Acquire);
            (place != UNUSED).then(|| (u32::try_from(block).expect("at most 2^32 blocks"), place))
        })
    }

    /// The first block at or after `block` that has a place.
    pub fn next_used(&self, block: u32) -> Option<u32> {
        let mut entries = self.entries.initialized_from(block as usize);
        let used = |entry: &AtomicU32| entry.load(Ordering::Acquire) != UNUSED;
        let (found, _) = entries.find(|(_, entry)| used(entry))?;
        Some(u32::try_from(found).expect("at most 2^32 blocks"))
    }
}

/// The places of the next blocks, in sectors from the bitmap to the end of the data, if the next goes behind sector `next`.
pub(super) fn next_places(next: u64, block_size: BlockSize, unplaced: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut next, mut unplaced) = (next, unplaced);
    std::iter::from_fn(move || {
        let place = layout::next_place(next, block_size, unplaced).ok().filter(|_| unplaced > 0)?;
        next = u64::from(place) + u64::from(block_size.stride_sectors());
        unplaced -= 1;
        Some(u64::from(place)..next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_once() {
        let bat = Bat::new(3000);
        assert_eq!((bat.place(2999), bat.len()), (None, 3000));
        bat.set(2999, 15);
        bat.set(4, 0xFFFF_FFFE);
        assert_eq!(bat.used().collect::<Vec<_>>(), [(4, 0xFFFF_FFFE), (2999, 15)]);
        let next = |from| bat.next_used(from);
        assert_eq!((next(0), next(4), next(5), next(2999)), (Some(4), Some(4), Some(2999), Some(2999)));
        assert_eq!(Bat::new(10).next_used(0), None);
    }
}
