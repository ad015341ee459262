//! Blocks: their indices, the indices of their bitmap sectors, and their size.

use std::fmt;

use super::{SECTOR, SECTOR_BITS, SectorRange};

/// The index of a block of an image, which is also the index of its BAT entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct BlockIndex(u32);

impl BlockIndex {
    /// Creates an index. Every value is valid: an image has at most 2^32 blocks.
    #[inline]
    pub const fn new(index: u32) -> BlockIndex {
        BlockIndex(index)
    }

    /// Creates the index of the block of element `at` of an array with one element per block.
    ///
    /// # Panics
    /// If no image has so many blocks.
    #[inline]
    pub fn from_usize(at: usize) -> BlockIndex {
        BlockIndex(u32::try_from(at).expect("at most 2^32 blocks"))
    }

    /// Returns the number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Returns the index into an array with one element per block.
    #[inline]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// Returns whether a disk of `blocks` blocks has this block.
    #[inline]
    pub fn is_within(self, blocks: u64) -> bool {
        u64::from(self.0) < blocks
    }

    /// Returns the block after this one.
    #[inline]
    pub fn following(self) -> BlockIndex {
        BlockIndex(self.0 + 1)
    }

    /// Returns the block `count` blocks before this one, but at least block 0.
    #[inline]
    pub fn saturating_sub(self, count: u32) -> BlockIndex {
        BlockIndex(self.0.saturating_sub(count))
    }

    /// Returns the number of blocks from this one to `other`, in either direction.
    #[inline]
    pub fn distance_to(self, other: BlockIndex) -> u32 {
        self.0.abs_diff(other.0)
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The index of a bitmap sector of an image: the bitmap sectors of all blocks, in the order of the blocks, whether the
/// blocks have places or not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct BitmapSectorIndex(usize);

impl BitmapSectorIndex {
    /// Creates an index. [`BlockSize::bitmap_sector`] computes the index from a block.
    #[inline]
    pub const fn new(index: usize) -> BitmapSectorIndex {
        BitmapSectorIndex(index)
    }

    /// Returns the number, which is also the index into an array with one element per bitmap sector.
    #[inline]
    pub const fn get(self) -> usize {
        self.0
    }
}

/// Size of the allocation unit of a dynamic or differencing image: a power of two of sectors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BlockSize {
    /// log2 of the number of sectors in a block.
    shift: u32,
}

impl BlockSize {
    /// The default size of new images: 2 MiB.
    pub const DEFAULT: BlockSize = BlockSize { shift: 12 };
    /// The smallest accepted size in bytes (rule O8 of docs/format.md).
    pub const MIN_BYTES: u32 = 4 << 10;
    /// The largest accepted size in bytes (rule O8 of docs/format.md).
    pub const MAX_BYTES: u32 = 256 << 20;

    /// Creates a block size from bytes; `None` unless `bytes` is a power of two from 4 KiB to 256 MiB.
    pub fn from_bytes(bytes: u32) -> Option<BlockSize> {
        let fits = bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes);
        fits.then(|| BlockSize { shift: bytes.trailing_zeros() - SECTOR.trailing_zeros() })
    }

    /// Returns the number of data bytes in a block.
    pub fn bytes(self) -> u32 {
        1 << (self.shift + SECTOR.trailing_zeros())
    }

    /// Returns the number of data sectors in a block.
    pub fn sectors(self) -> u32 {
        1 << self.shift
    }

    /// Returns the number of sectors of the bitmap that precedes the data, at least one.
    pub fn bitmap_sectors(self) -> u32 {
        self.sectors().div_ceil(SECTOR_BITS)
    }

    /// Returns the number of sectors of a block: bitmap and data.
    pub fn stride_sectors(self) -> u32 {
        self.bitmap_sectors() + self.sectors()
    }

    /// Returns the index of the block that contains a virtual sector. A disk has at most 2^32 blocks (checked at open).
    pub fn block_at(self, sector: u64) -> BlockIndex {
        BlockIndex(u32::try_from(sector >> self.shift).expect("a sector beyond the last block of any image"))
    }

    /// Returns the index of a virtual sector within its block.
    pub fn sector_in_block(self, sector: u64) -> u32 {
        u32::try_from(sector & (u64::from(self.sectors()) - 1)).expect("masked to 19 bits")
    }

    /// Splits a range at block boundaries. Yields the index of each block and the part of the range in the block.
    #[inline]
    pub fn split_at_blocks(self, range: SectorRange) -> impl Iterator<Item = (BlockIndex, SectorRange)> {
        let mut rest = range;
        std::iter::from_fn(move || {
            (!rest.is_empty()).then(|| {
                let block = self.block_at(rest.start());
                let part = rest.clip(self.sectors_of(block));
                rest = rest.skip(part.count());
                (block, part)
            })
        })
    }

    /// Returns the virtual sectors of a block.
    pub fn sectors_of(self, block: BlockIndex) -> SectorRange {
        SectorRange { start: u64::from(block.0) << self.shift, count: u64::from(self.sectors()) }
    }

    /// Returns the index of bitmap sector `number` of a block.
    #[inline]
    pub fn bitmap_sector(self, block: BlockIndex, number: u32) -> BitmapSectorIndex {
        BitmapSectorIndex(block.as_usize() * self.bitmap_sectors() as usize + number as usize)
    }

    /// Returns the block of a bitmap sector, and the number of the sector in the bitmap of the block.
    #[inline]
    pub fn block_of_bitmap_sector(self, index: BitmapSectorIndex) -> (BlockIndex, u32) {
        let per_block = self.bitmap_sectors() as usize;
        let number = u32::try_from(index.0 % per_block).expect("below the sectors of a bitmap");
        (BlockIndex::from_usize(index.0 / per_block), number)
    }

    /// Returns the number of blocks of a disk with `sectors` sectors.
    pub fn blocks_for(self, sectors: u64) -> u64 {
        sectors.div_ceil(u64::from(self.sectors()))
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes() {
            b if b >= 1 << 20 => write!(f, "{} MiB", b >> 20),
            b => write!(f, "{} KiB", b >> 10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_split_at_block_boundaries() {
        let size = BlockSize::from_bytes(4096).unwrap();
        let parts = |from, to| -> Vec<_> {
            size.split_at_blocks(SectorRange::between(from, to))
                .map(|(b, part)| (b.get(), part.start(), part.end()))
                .collect()
        };
        assert_eq!(parts(6, 17), [(0, 6, 8), (1, 8, 16), (2, 16, 17)]);
        assert_eq!(parts(8, 16), [(1, 8, 16)]);
        assert_eq!(parts(9, 9), []);
    }

    #[test]
    fn block_sizes() {
        assert_eq!(BlockSize::from_bytes(2 << 20), Some(BlockSize::DEFAULT));
        for bad in [0, 512, 2048, 4096 + 512, 3 << 20, 512 << 20] {
            assert_eq!(BlockSize::from_bytes(bad), None, "{bad}");
        }
        let b = BlockSize::from_bytes(4 << 20).unwrap();
        assert_eq!((b.sectors(), b.bitmap_sectors(), b.stride_sectors()), (8192, 2, 8194));
        assert_eq!((b.block_at(8193), b.sector_in_block(8193)), (BlockIndex::new(1), 1));
        assert_eq!(b.bitmap_sector(BlockIndex::new(3), 1), BitmapSectorIndex::new(7));
        assert_eq!(b.block_of_bitmap_sector(BitmapSectorIndex::new(7)), (BlockIndex::new(3), 1));
        assert_eq!(BlockSize::from_bytes(4096).unwrap().bitmap_sectors(), 1);
    }
}
