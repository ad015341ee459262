//! The table of bitmap sectors: one word each, which says whether the sector is in memory, and in which frame.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::image::sparse_array::SparseArray;

/// What the table says of a granule, in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BitmapEntry {
    /// Only the file knows it. It was in memory so many times before (30 bits).
    Absent(u32),
    /// All its sectors are here, and the file says so: nothing can change any more.
    Full,
    /// In the frame of this number.
    InFrame(u32),
}

const FULL: u32 = 1 << 30;
const IN_FRAME: u32 = 1 << 31;

impl BitmapEntry {
    #[inline]
    pub(super) fn decode(word: u32) -> BitmapEntry {
        match word {
            _ if word & IN_FRAME != 0 => BitmapEntry::InFrame(word & !IN_FRAME),
            FULL => BitmapEntry::Full,
            times => BitmapEntry::Absent(times),
        }
    }

    pub(super) fn encode(self) -> u32 {
        match self {
            BitmapEntry::Absent(times) => times & (FULL - 1),
            BitmapEntry::Full => FULL,
            BitmapEntry::InFrame(number) => IN_FRAME | number,
        }
    }
}

/// A [`BitmapEntry`] for each bitmap sector of an image.
#[derive(Debug)]
pub(super) struct EntryTable {
    words: SparseArray<AtomicU32>,
}

impl EntryTable {
    /// A table of `len` absent sectors.
    pub(super) fn new(len: usize) -> EntryTable {
        EntryTable { words: SparseArray::new(len, || AtomicU32::new(BitmapEntry::Absent(0).encode())) }
    }

    #[inline]
    pub(super) fn get(&self, granule: usize) -> BitmapEntry {
        self.words.get(granule).map_or(BitmapEntry::Absent(0), |word| BitmapEntry::decode(word.load(Ordering::Acquire)))
    }

    /// Changes what the table says of a granule whose frame is locked.
    pub(super) fn set(&self, granule: usize, entry: BitmapEntry) {
        self.words.get_or_init(granule).store(entry.encode(), Ordering::Release);
    }

    /// Replaces the entry if it is `before`; returns whether it was.
    pub(super) fn compare_exchange(&self, granule: usize, before: BitmapEntry, after: BitmapEntry) -> bool {
        let word = self.words.get_or_init(granule);
        word.compare_exchange(before.encode(), after.encode(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_limits() {
        for entry in [
            BitmapEntry::Absent(0),
            BitmapEntry::Absent(FULL - 1),
            BitmapEntry::Full,
            BitmapEntry::InFrame(0),
            BitmapEntry::InFrame(IN_FRAME - 1),
        ] {
            assert_eq!(BitmapEntry::decode(entry.encode()), entry);
        }
        assert_eq!(BitmapEntry::Absent(FULL).encode(), 0, "the count begins anew");
    }
}
