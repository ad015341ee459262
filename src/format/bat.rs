//! The block allocation table (BAT): for each block the sector of the file at which its bitmap begins.
//!
//! The table takes whole sectors. The bytes after the last entry in the last sector have no meaning: some programs fill
//! them with ones, some with zeros.

use std::fmt;
use std::ops::Range;

use crate::units::{BlockIndex, BlockSize, FileSector, SECTOR};

/// The entry of a block without a place.
pub const UNUSED: u32 = 0xFFFF_FFFF;
/// The largest entry of a block with a place (O14).
pub const MAX_ENTRY: u32 = UNUSED - 1;
/// Entries in a sector.
pub const ENTRIES_PER_SECTOR: u32 = 128;

/// The place of a block: the file sector at which its bitmap begins, as the BAT entry of the block contains it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct BlockPlace(u32);

impl BlockPlace {
    /// Returns the place in a BAT entry; `None` if the entry is unused.
    #[inline]
    pub fn from_entry(entry: u32) -> Option<BlockPlace> {
        (entry != UNUSED).then_some(BlockPlace(entry))
    }

    /// Returns the place at a file sector; `None` if no entry can contain the sector.
    pub fn from_sector(sector: FileSector) -> Option<BlockPlace> {
        u32::try_from(sector.get()).ok().and_then(BlockPlace::from_entry)
    }

    /// Returns the BAT entry.
    #[inline]
    pub fn entry(self) -> u32 {
        self.0
    }

    /// Returns the file sector at which the bitmap begins.
    #[inline]
    pub fn sector(self) -> FileSector {
        FileSector::new(u64::from(self.0))
    }

    /// Returns the file sector at which the data begins.
    #[inline]
    pub fn data(self, block_size: BlockSize) -> FileSector {
        self.sector() + u64::from(block_size.bitmap_sectors())
    }

    /// Returns the first file sector after the block.
    #[inline]
    pub fn end(self, block_size: BlockSize) -> FileSector {
        self.sector() + u64::from(block_size.stride_sectors())
    }

    /// Returns the byte range of bitmap and data.
    pub fn byte_range(self, block_size: BlockSize) -> Range<u64> {
        self.sector().byte_offset()..self.end(block_size).byte_offset()
    }
}

impl fmt::Display for BlockPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns the number of bytes of a table of `entries`, in whole sectors.
pub fn bytes(entries: u32) -> u64 {
    u64::from(entries.div_ceil(ENTRIES_PER_SECTOR)) * SECTOR
}

/// Returns the sector of the table that holds the entry of `block`, counted from the table's start.
pub fn sector_of(block: BlockIndex) -> u32 {
    block.get() / ENTRIES_PER_SECTOR
}

/// Returns the index of the entry of `block` in its sector of the table.
pub fn entry_in_sector(block: BlockIndex) -> usize {
    (block.get() % ENTRIES_PER_SECTOR) as usize
}

/// Returns the blocks of the entries in a sector of the table, including entries after the end of the table.
pub fn blocks_of(sector: u32) -> impl Iterator<Item = BlockIndex> {
    let first = sector * ENTRIES_PER_SECTOR;
    (0..ENTRIES_PER_SECTOR).map(move |n| BlockIndex::new(first + n))
}

/// Decodes the entries in `bytes`, which begins at an entry. Fewer than four bytes at the end are ignored.
pub fn decode(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|&entry| u32::from_be_bytes(entry))
}

/// Encodes a sector of entries. The entries after the end of the table are unused.
///
/// # Panics
/// If there are more entries than a sector holds.
pub fn encode_sector(entries: &[u32]) -> [u8; 512] {
    assert!(entries.len() <= ENTRIES_PER_SECTOR as usize, "a sector of the table has 128 entries");
    let mut sector = [0xFF; 512];
    for (to, entry) in sector.as_chunks_mut::<4>().0.iter_mut().zip(entries) {
        *to = entry.to_be_bytes();
    }
    sector
}

/// Returns whether all entries of a sector of the table are unused, and so are the bytes after the last entry.
pub fn is_unused(sector: &[u8]) -> bool {
    // A fold over all bytes, without an early return, compiles to vector instructions.
    sector.iter().fold(u8::MAX, |all, byte| all & byte) == u8::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_of_entries() {
        assert_eq!((bytes(0), bytes(1), bytes(128), bytes(129)), (0, 512, 512, 1024));
        assert_eq!(bytes(u32::MAX), 1 << 34);
        let block = BlockIndex::new;
        assert_eq!((sector_of(block(127)), sector_of(block(128))), (0, 1));
        assert_eq!((entry_in_sector(block(127)), entry_in_sector(block(130))), (127, 2));
        let blocks: Vec<_> = blocks_of(1).collect();
        assert_eq!((blocks.len(), blocks[0], blocks[127]), (128, block(128), block(255)));
        let sector = encode_sector(&[1, 0x0102_0304, UNUSED]);
        assert_eq!(sector[..12], [0, 0, 0, 1, 1, 2, 3, 4, 255, 255, 255, 255]);
        assert!(sector[12..].iter().all(|&b| b == 0xFF));
        let back: Vec<u32> = decode(&sector).collect();
        assert_eq!((back.len(), back[1], back[127]), (128, 0x0102_0304, UNUSED));
        assert_eq!(decode(&sector[..7]).len(), 1);
    }

    #[test]
    fn places_are_entries_that_are_used() {
        assert_eq!((BlockPlace::from_entry(UNUSED), BlockPlace::from_entry(7)), (None, Some(BlockPlace(7))));
        let at = |sector| BlockPlace::from_sector(FileSector::new(sector)).map(BlockPlace::entry);
        assert_eq!((at(u64::from(MAX_ENTRY)), at(u64::from(UNUSED)), at(1 << 32)), (Some(MAX_ENTRY), None, None));
        let (place, block_size) = (BlockPlace(MAX_ENTRY), BlockSize::from_bytes(4096).unwrap());
        let sectors = [place.sector(), place.data(block_size), place.end(block_size)].map(FileSector::get);
        assert_eq!(sectors, [0, 1, 9].map(|after| u64::from(MAX_ENTRY) + after));
        assert_eq!(BlockPlace(2).byte_range(block_size), 1024..11 * 512);
    }

    #[test]
    fn one_used_entry_is_seen() {
        let mut sector = vec![0xFF; 512];
        assert!(is_unused(&sector) && is_unused(&sector[..508]));
        for at in 0..512 {
            sector[at] = 0xFE;
            assert!(!is_unused(&sector), "{at}");
            sector[at] = 0xFF;
        }
        assert!(!is_unused(&[0xFF, 0xFF, 0xFF, 0]));
    }
}
