//! The table of bitmap sectors: one 32-bit word each, which records whether the sector is in memory, and in which
//! frame.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::image::sparse_array::SparseArray;
use crate::units::BitmapSectorIndex;

/// The location of a bitmap sector, encoded in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BitmapEntry {
    /// In the file only. Contains the number of evictions so far (30 bits; it wraps around).
    Absent(u32),
    /// All bits are set, also in the file: the sector cannot change any more, and takes no frame.
    Full,
    /// In the frame with this number.
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
    /// Creates a table of `len` absent sectors.
    pub(super) fn new(len: usize) -> EntryTable {
        EntryTable { words: SparseArray::new(len, || AtomicU32::new(BitmapEntry::Absent(0).encode())) }
    }

    /// Returns the entry of a bitmap sector.
    #[inline]
    pub(super) fn get(&self, index: BitmapSectorIndex) -> BitmapEntry {
        self.words
            .get(index.get())
            .map_or(BitmapEntry::Absent(0), |word| BitmapEntry::decode(word.load(Ordering::Acquire)))
    }

    /// Sets the entry of a bitmap sector. The caller holds the lock of its frame.
    pub(super) fn set(&self, index: BitmapSectorIndex, entry: BitmapEntry) {
        self.words.get_or_init(index.get()).store(entry.encode(), Ordering::Release);
    }

    /// Replaces the entry if it is `before`. Returns whether the entry was replaced.
    pub(super) fn compare_exchange(&self, index: BitmapSectorIndex, before: BitmapEntry, after: BitmapEntry) -> bool {
        let word = self.words.get_or_init(index.get());
        word.compare_exchange(before.encode(), after.encode(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_encoding() {
        for entry in [
            BitmapEntry::Absent(0),
            BitmapEntry::Absent(FULL - 1),
            BitmapEntry::Full,
            BitmapEntry::InFrame(0),
            BitmapEntry::InFrame(IN_FRAME - 1),
        ] {
            assert_eq!(BitmapEntry::decode(entry.encode()), entry);
        }
        assert_eq!(BitmapEntry::Absent(FULL).encode(), 0, "the count wraps around");
    }
}
