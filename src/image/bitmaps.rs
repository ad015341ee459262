//! The sector bitmaps of a writable image in memory, a granule at a time.
//!
//! A granule is what one sector of bitmap speaks for: at most 4096 sectors (2 MiB), less where the block is smaller.
//! Granules are read when first asked for, and stay: bits only go from clear to set while an image is open, so a
//! look-up takes no lock, and a granule that was read is never stale.
//!
//! A granule is *dirty* when it says more than the file does, *ordered* when its bits must not reach the file before
//! the data they speak for (crash-safety 3.6).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::paged::Paged;
use crate::format::bitmap;
use crate::units::{BlockSize, SECTOR_BITS, SECTOR_BYTES, SectorRange};

/// The bits that one sector of bitmap holds.
#[derive(Debug)]
pub struct Granule {
    words: Box<[AtomicU64]>,
    /// Noted for the next commit.
    dirty: AtomicBool,
    /// The file says nothing of it yet, so a commit is owed even where no bit changes.
    unwritten: AtomicBool,
    /// The file does not know the place of the block yet.
    unplaced: AtomicBool,
    /// Its bits may reach the file only after a sync of the data.
    ordered: bool,
    /// The journal's slot that speaks for it. Held while bits are put there, so that a slot is never given away under a
    /// mark in progress.
    slot: Mutex<Option<u32>>,
}

impl Granule {
    /// The run of equal bits from `from`, not beyond `end`: whether they are set, and how many.
    #[inline]
    pub fn run(&self, from: u32, end: u32) -> (bool, u32) {
        bitmap::run_atomic(&self.words, from, end)
    }

    /// Whether its bits may reach the file only after a sync of the data.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// Takes the note that it is dirty and the journal's slot, and copies its bits, in that order: a mark that comes in
    /// between notes it anew, and claims another slot.
    pub fn snapshot(&self) -> [u8; SECTOR_BYTES] {
        let mut slot = self.slot();
        *slot = None;
        self.dirty.swap(false, Ordering::SeqCst);
        let mut bytes = [0; SECTOR_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&self.words) {
            *to = word.load(Ordering::SeqCst).to_be_bytes();
        }
        bytes
    }

    /// The journal's slot that speaks for it.
    pub(super) fn slot(&self) -> MutexGuard<'_, Option<u32>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its bits.
    pub(super) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    /// Whether the file does not know the place of its block.
    pub(super) fn is_unplaced(&self) -> bool {
        self.unplaced.load(Ordering::Acquire)
    }

    /// Says that its bits are in the file.
    pub(super) fn set_written(&self) {
        self.unwritten.store(false, Ordering::Release);
    }

    /// Notes it as dirty; false where it was noted already.
    pub fn note_dirty(&self) -> bool {
        !self.dirty.swap(true, Ordering::SeqCst)
    }
}

/// What a fresh block's bitmap says before anything is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fresh {
    /// Nothing is here: the parent answers.
    Clear,
    /// All is here, as zeros: blocks of a dynamic root, which come from durably zero room. Readers that do not look at
    /// bitmaps (QEMU) then see the same, and no order is needed between bits and data.
    Set,
}

/// All granules of an image.
#[derive(Debug)]
pub struct Bitmaps {
    granules: Paged<OnceLock<Granule>>,
    block_size: BlockSize,
    sectors_per_granule: u32,
}

impl Bitmaps {
    /// None read yet.
    pub fn new(blocks: u32, block_size: BlockSize) -> Bitmaps {
        let count = blocks as usize * block_size.bitmap_sectors() as usize;
        let sectors_per_granule = block_size.sectors().min(SECTOR_BITS);
        Bitmaps { granules: Paged::new(count, OnceLock::new), block_size, sectors_per_granule }
    }

    /// Sectors that a granule speaks for.
    pub fn sectors_per_granule(&self) -> u32 {
        self.sectors_per_granule
    }

    /// The granule that speaks for a virtual sector.
    #[inline]
    pub fn index_of(&self, sector: u64) -> usize {
        let block = self.block_size.block_of(sector) as usize;
        let within = self.block_size.within(sector) / self.sectors_per_granule;
        block * self.block_size.bitmap_sectors() as usize + within as usize
    }

    /// The place of a virtual sector in its granule.
    #[inline]
    pub fn bit_of(&self, sector: u64) -> u32 {
        self.block_size.within(sector) % self.sectors_per_granule
    }

    /// The block a granule belongs to, and which of the block's bitmap sectors it is.
    pub fn block_of(&self, granule: usize) -> (u32, u32) {
        let per_block = self.block_size.bitmap_sectors() as usize;
        let block = u32::try_from(granule / per_block).expect("granules of at most 2^32 blocks");
        (block, u32::try_from(granule % per_block).expect("below the sectors of a bitmap"))
    }

    /// A granule, if it was read or made.
    #[inline]
    pub fn get(&self, granule: usize) -> Option<&Granule> {
        self.granules.get(granule)?.get()
    }

    /// Takes in what the file says of a granule. Where it is known already, what is known stays (it may say more).
    pub fn supply(&self, granule: usize, sector: &[u8]) {
        let words = sector.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b));
        self.granules.touch(granule).get_or_init(|| self.made(words, false, true));
    }

    /// Takes in what the journal of a predecessor says of a granule: all its bits, or more of them.
    pub(super) fn adopt(&self, granule: usize, words: &[u64]) -> &Granule {
        let known = self.granules.touch(granule).get_or_init(|| self.made(words.iter().copied(), false, true));
        for (to, word) in known.words.iter().zip(words) {
            to.fetch_or(*word, Ordering::SeqCst);
        }
        known
    }

    /// Makes the granules of a block that is about to get its place. The block has none yet, so nobody reads them.
    pub fn prepare(&self, block: u32, fresh: Fresh) {
        let per_block = self.block_size.bitmap_sectors() as usize;
        for granule in (0..per_block).map(|k| block as usize * per_block + k) {
            let word = if fresh == Fresh::Set { u64::MAX } else { 0 };
            let made = self.made(std::iter::repeat(word), true, fresh == Fresh::Clear);
            assert!(self.granules.touch(granule).set(made).is_ok(), "a block without a place has no bitmap");
        }
    }

    /// The first granule of a block.
    pub(super) fn first_of(&self, block: u32) -> usize {
        block as usize * self.block_size.bitmap_sectors() as usize
    }

    /// Says that the file now knows the place of a block.
    pub(super) fn set_placed(&self, block: u32) {
        let first = self.first_of(block);
        for granule in (first..first + self.block_size.bitmap_sectors() as usize).filter_map(|g| self.get(g)) {
            granule.unplaced.store(false, Ordering::Release);
        }
    }

    fn made(&self, words: impl Iterator<Item = u64>, fresh: bool, ordered: bool) -> Granule {
        let count = self.sectors_per_granule.div_ceil(64) as usize;
        Granule {
            words: words.take(count).map(AtomicU64::new).collect(),
            dirty: AtomicBool::new(false),
            unwritten: AtomicBool::new(fresh),
            unplaced: AtomicBool::new(fresh),
            ordered,
            slot: Mutex::new(None),
        }
    }

    /// Sets the bits of a range of one block whose granules are all there. Calls `news(index, granule, bit, count)` for
    /// each granule that now says something the file does not.
    #[inline]
    pub fn mark(&self, range: SectorRange, mut news: impl FnMut(usize, &Granule, u32, u32)) {
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (self.index_of(rest.start()), self.bit_of(rest.start()));
            let part = rest.first(u64::from(self.sectors_per_granule - bit));
            let count = u32::try_from(part.count()).expect("clipped to a granule");
            let granule = self.get(index).expect("a write is planned only when its bitmaps are there");
            if bitmap::set_atomic(&granule.words, bit, count) || granule.unwritten.load(Ordering::Acquire) {
                news(index, granule, bit, count);
            }
            rest = rest.skip(part.count());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_of_large_and_small_blocks() {
        let large = Bitmaps::new(4, BlockSize::from_bytes(8 << 20).unwrap());
        assert_eq!((large.index_of(16384 + 4096), large.bit_of(16384 + 4097)), (5, 1));
        assert_eq!(large.block_of(5), (1, 1));
        let small = Bitmaps::new(10, BlockSize::from_bytes(4096).unwrap());
        assert_eq!((small.index_of(17), small.bit_of(17), small.sectors_per_granule()), (2, 1, 8));
    }

    #[test]
    fn marks_are_noted_once_until_the_snapshot() {
        let maps = Bitmaps::new(2, BlockSize::DEFAULT);
        assert!(maps.get(0).is_none());
        maps.supply(0, &[0; 512]);
        let mut noted = Vec::new();
        let note = |to: &mut Vec<usize>, g, granule: &Granule| {
            if granule.note_dirty() {
                to.push(g)
            }
        };
        maps.mark(SectorRange::between(3, 5), |g, granule, _, _| note(&mut noted, g, granule));
        maps.mark(SectorRange::between(4, 9), |g, granule, _, _| note(&mut noted, g, granule));
        assert_eq!(noted, [0]);
        let granule = maps.get(0).unwrap();
        assert_eq!(granule.run(0, 4096), (false, 3));
        assert_eq!(granule.run(3, 4096), (true, 6));
        assert_eq!(granule.snapshot()[..2], [0b0001_1111, 0b1000_0000]);
        maps.mark(SectorRange::between(4, 9), |g, granule, _, _| note(&mut noted, g, granule));
        assert_eq!(noted.len(), 1, "bits that were set already say nothing new");
        maps.mark(SectorRange::between(9, 10), |g, granule, _, _| note(&mut noted, g, granule));
        assert_eq!(noted, [0, 0]);
    }

    #[test]
    fn a_fresh_block_owes_a_commit_even_if_no_bit_changes() {
        let maps = Bitmaps::new(2, BlockSize::DEFAULT);
        maps.prepare(1, Fresh::Set);
        let mut noted = 0;
        maps.mark(SectorRange::between(4096, 4097), |_, _, _, _| noted += 1);
        assert_eq!(noted, 1);
        let granule = maps.get(1).unwrap();
        assert!(!granule.is_ordered() && granule.snapshot() == [0xFF; 512]);
        maps.set_placed(1);
        maps.mark(SectorRange::between(4096, 4097), |_, _, _, _| noted += 1);
        assert_eq!(noted, 2, "that its block has a place is not all: its bits have to be there, too");
        granule.set_written();
        maps.mark(SectorRange::between(4096, 4097), |_, _, _, _| noted += 1);
        assert_eq!(noted, 2);
    }
}
