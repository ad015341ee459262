//! The sector bitmaps of a writable image in memory, a granule at a time.
//!
//! A granule is what one sector of bitmap speaks for: at most 4096 sectors (2 MiB), less where the block is smaller.
//! Granules are read when first asked for. One whose sectors are all here, and of which the file says so, takes no more
//! than its word of the table from then on. Of the others as many are kept as there is memory for (`clock.rs`); what was
//! forgotten is read again as on the first look, without holding up other requests.
//!
//! No bit is lost by that, since
//! - a granule leaves only while its frame is locked and the file says all it says: it is not dirty, no commit has taken
//!   it that is not over, no slot of the journal speaks for it, its block's place is in the file;
//! - a mark sets bits and notes the granule as dirty under the same lock, after it has made sure whose the frame is.
//!   Where the granule is gone by then it is read again before the write is answered;
//! - what was read counts only where the granule was absent all the while: the table counts how often it left.
//!
//! A granule is *dirty* when it says more than the file does, *ordered* when its bits must not reach the file before
//! the data they speak for (crash-safety 3.6).

use std::sync::atomic::Ordering;

use super::clock::FramePool;
use super::entry::{BitmapEntry, EntryTable};
use super::frame::{BitmapFrame, FrameState, LockedFrame, OptimisticRead};
use crate::format::bitmap;
use crate::mutant::{self, Mutant};
use crate::units::{BlockSize, SECTOR_BITS, SECTOR_BYTES, SectorRange};

/// Bytes of frames that are kept for granules that are neither full nor needed by what is under way.
const MAX_FRAME_BYTES: usize = 64 << 20;
/// Frames that may be in the hands of threads besides those that belong to granules.
const SPARE_FRAMES: usize = 1024;
/// What a fresh block's bitmap says before anything is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InitialBits {
    /// Nothing is here: the parent answers.
    Clear,
    /// All is here, as zeros: blocks of a dynamic root, which come from durably zero room. Readers that do not look at
    /// bitmaps (QEMU) then see the same, and no order is needed between bits and data.
    Set,
}

/// All granules of an image.
#[derive(Debug)]
pub struct Bitmaps {
    table: EntryTable,
    pool: FramePool,
    block_size: BlockSize,
    bits_per_sector: u32,
}

/// Where a granule is.
pub(in crate::image::write) enum Residence<'a> {
    /// In the file alone; it left memory so many times.
    Absent(u32),
    /// Nowhere: it is full.
    Full,
    /// In a frame, which is locked.
    Resident(LockedFrame<'a>),
}

impl Bitmaps {
    /// None read yet.
    pub fn new(blocks: u32, block_size: BlockSize) -> Bitmaps {
        let count = blocks as usize * block_size.bitmap_sectors() as usize;
        let sectors_per_granule = block_size.sectors().min(SECTOR_BITS);
        let frame = size_of::<BitmapFrame>() + bitmap_words(sectors_per_granule) * 8;
        Bitmaps {
            table: EntryTable::new(count),
            pool: FramePool::new(count + SPARE_FRAMES, MAX_FRAME_BYTES / frame),
            block_size,
            bits_per_sector: sectors_per_granule,
        }
    }

    /// Sets how many granules that are not full are kept, from the next one on that is needed. More are kept only while
    /// the file does not say what they say, or requests under way need them.
    pub fn set_max_frames(&self, granules: usize) {
        self.pool.set_max_frames(granules);
    }

    /// How many granules that are not full are kept.
    pub(in crate::image::write) fn max_frames(&self) -> usize {
        self.pool.max_frames()
    }

    /// Frames that were ever needed at once: memory that is taken.
    pub fn frames(&self) -> usize {
        self.pool.made()
    }

    /// Sectors that a granule speaks for.
    pub fn bits_per_sector(&self) -> u32 {
        self.bits_per_sector
    }

    /// The granule that speaks for a virtual sector.
    #[inline]
    pub fn bitmap_sector_of(&self, sector: u64) -> usize {
        let block = self.block_size.block_at(sector) as usize;
        let within = self.block_size.sector_in_block(sector) / self.bits_per_sector;
        block * self.block_size.bitmap_sectors() as usize + within as usize
    }

    /// The place of a virtual sector in its granule.
    #[inline]
    pub fn bit_of(&self, sector: u64) -> u32 {
        self.block_size.sector_in_block(sector) % self.bits_per_sector
    }

    /// The block a granule belongs to, and which of the block's bitmap sectors it is.
    pub fn block_of(&self, granule: usize) -> (u32, u32) {
        let per_block = self.block_size.bitmap_sectors() as usize;
        let block = u32::try_from(granule / per_block).expect("granules of at most 2^32 blocks");
        (block, u32::try_from(granule % per_block).expect("below the sectors of a bitmap"))
    }

    /// The first granule of a block.
    pub(in crate::image::write) fn first_sector_of(&self, block: u32) -> usize {
        block as usize * self.block_size.bitmap_sectors() as usize
    }

    fn bitmap_sectors_of(&self, block: u32) -> std::ops::Range<usize> {
        let first = self.first_sector_of(block);
        first..first + self.block_size.bitmap_sectors() as usize
    }

    /// Calls `f(set, count)` for each run of equal bits in `from..end` of a granule. False where the granule is not in
    /// memory, or left it meanwhile: then what `f` was told means nothing.
    #[inline]
    pub fn each_run(&self, granule: usize, from: u32, end: u32, mut f: impl FnMut(bool, u32)) -> bool {
        let look = match self.read_optimistic(granule) {
            Ok(look) => look,
            Err(BitmapEntry::Full) => {
                f(true, end - from);
                return true;
            }
            Err(_) => return false,
        };
        let mut at = from;
        while at < end {
            let (set, count) = look.run(at, end);
            f(set, count);
            at += count;
        }
        look.is_valid()
    }

    #[inline]
    fn read_optimistic(&self, granule: usize) -> Result<OptimisticRead<'_>, BitmapEntry> {
        match self.table.get(granule) {
            BitmapEntry::InFrame(number) => {
                self.pool.frame(number).read_optimistic(granule).ok_or(BitmapEntry::Absent(0))
            }
            other => Err(other),
        }
    }

    /// How often an absent granule has left memory; `None` where it is there. To be asked before the file is read.
    pub fn eviction_count(&self, granule: usize) -> Option<u32> {
        match self.table.get(granule) {
            BitmapEntry::Absent(times) => Some(times),
            _ => None,
        }
    }

    /// Takes in what the file says of a granule that was absent from before it was read until now, and pins it. Where it
    /// came and left meanwhile, this is out of date: it stays absent. Where it is known, what is known stays.
    ///
    /// Whether it is pinned.
    pub(in crate::image::write) fn insert(&self, granule: usize, times: u32, sector: &[u8]) -> bool {
        let mut words = [0; SECTOR_BYTES / 8];
        bitmap::decode(sector, &mut words);
        let before = match self.table.get(granule) {
            absent @ BitmapEntry::Absent(_) if mutant::enabled(Mutant::StaleBits) => absent,
            _ => BitmapEntry::Absent(times),
        };
        if bitmap::run(&words, 0, self.bits_per_sector) == (true, self.bits_per_sector) {
            return !self.table.compare_exchange(granule, before, BitmapEntry::Full) && self.pin(granule);
        }
        let known = FrameState { ordered: true, pins: 1, evictions: times, ..FrameState::default() };
        self.assign_frame(granule, before, words.into_iter(), known) || self.pin(granule)
    }

    /// Makes a granule stay in memory, if it is there. Whether it is to be unpinned.
    pub(in crate::image::write) fn pin(&self, granule: usize) -> bool {
        match self.lock(granule) {
            Residence::Resident(mut here) => {
                here.state.pins += 1;
                true
            }
            Residence::Full | Residence::Absent(_) => false,
        }
    }

    /// Takes back one `pin` that was true.
    pub(in crate::image::write) fn unpin(&self, granule: usize) {
        match self.lock(granule) {
            Residence::Resident(mut here) => here.state.pins -= 1,
            Residence::Full => {}
            Residence::Absent(_) => debug_assert!(false, "a granule that is pinned stays"),
        }
    }

    /// Takes in what the journal of a predecessor says of a granule: all its bits, or more of them.
    pub(in crate::image::write) fn replay(&self, granule: usize, words: &[u64]) -> LockedFrame<'_> {
        if let Residence::Absent(times) = self.lock(granule) {
            let known = FrameState { ordered: true, evictions: times, ..FrameState::default() };
            self.assign_frame(granule, BitmapEntry::Absent(times), words.iter().copied(), known);
        }
        let known = self.lock_resident(granule);
        for (to, word) in known.words().iter().zip(words) {
            to.fetch_or(*word, Ordering::SeqCst);
        }
        known
    }

    /// Makes the granules of a block that is about to get its place. The block has none yet, so nobody reads them.
    pub(in crate::image::write) fn insert_fresh(&self, block: u32, fresh: InitialBits) {
        for granule in self.bitmap_sectors_of(block) {
            let word = if fresh == InitialBits::Set { u64::MAX } else { 0 };
            let times = self.eviction_count(granule).expect("a block without a place has no bitmap");
            let ordered = fresh == InitialBits::Clear;
            let known =
                FrameState { unwritten: true, unplaced: true, ordered, evictions: times, ..FrameState::default() };
            let made = self.assign_frame(granule, BitmapEntry::Absent(times), std::iter::repeat(word), known);
            assert!(made, "a block without a place has no bitmap");
        }
    }

    /// Gives a frame to a granule, if the table still says `before` of it.
    fn assign_frame(
        &self,
        granule: usize,
        before: BitmapEntry,
        words: impl Iterator<Item = u64>,
        known: FrameState,
    ) -> bool {
        if self.table.get(granule) != before {
            return false; // nobody has to leave for it
        }
        let (number, mut frame) = self.pool.allocate(&self.table);
        frame.fill(bitmap_words(self.bits_per_sector), words, known);
        let entered = self.table.compare_exchange(granule, before, BitmapEntry::InFrame(number));
        if entered {
            frame.assign_to(granule);
        } else {
            self.pool.free(number, frame);
        }
        entered
    }

    /// A granule, locked where it is in a frame.
    pub(in crate::image::write) fn lock(&self, granule: usize) -> Residence<'_> {
        loop {
            match self.table.get(granule) {
                BitmapEntry::Absent(times) => return Residence::Absent(times),
                BitmapEntry::Full => return Residence::Full,
                BitmapEntry::InFrame(number) => {
                    let here = self.pool.frame(number).lock();
                    if here.owner() == Some(granule) {
                        return Residence::Resident(here);
                    }
                    // It left before it was locked, and the table says so.
                }
            }
        }
    }

    /// A granule that cannot have left, locked.
    pub(in crate::image::write) fn lock_resident(&self, granule: usize) -> LockedFrame<'_> {
        match self.lock(granule) {
            Residence::Resident(here) => here,
            Residence::Full | Residence::Absent(_) => panic!("a granule stays until the file says all it says"),
        }
    }

    /// Says that the file now knows the place of a block.
    pub(in crate::image::write) fn set_placed(&self, block: u32) {
        for granule in self.bitmap_sectors_of(block) {
            if let Residence::Resident(mut here) = self.lock(granule) {
                here.state.unplaced = false;
                // Claimed with the place, which the file has now; of the bits nobody has relied on any.
                if !here.state.dirty {
                    here.state.journal_slot = None;
                }
            }
        }
    }

    /// Says that the file has the copy of a granule that a commit has taken.
    pub(in crate::image::write) fn set_written(&self, granule: usize) {
        let mut here = self.lock_resident(granule);
        (here.state.in_commit, here.state.unwritten) = (false, false);
        here.state.not_journaled &= here.state.dirty;
        let whole = (true, self.bits_per_sector);
        if here.state.is_clean() && bitmap::run_atomic(here.words(), 0, self.bits_per_sector) == whole {
            let BitmapEntry::InFrame(number) = self.table.get(granule) else { unreachable!("its frame is locked") };
            self.table.set(granule, BitmapEntry::Full);
            self.pool.free(number, here);
        }
    }

    /// Whether a mark of these bits has nothing to do.
    #[inline]
    fn is_marked(&self, granule: usize, bit: u32, count: u32) -> bool {
        match self.read_optimistic(granule) {
            Ok(look) => look.run(bit, bit + count) == (true, count) && look.owes_no_commit() && look.is_valid(),
            Err(entry) => entry == BitmapEntry::Full,
        }
    }

    /// Sets the bits of a range of one block. Calls `news(granule, its frame, what)` for each granule of which the file
    /// does not say all that it now says. Granules that are not there are named in `absent`, and not marked.
    #[inline]
    pub(in crate::image::write) fn mark(
        &self,
        range: SectorRange,
        absent: &mut Vec<usize>,
        mut news: impl FnMut(usize, &mut LockedFrame<'_>, NewBits),
    ) {
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (self.bitmap_sector_of(rest.start()), self.bit_of(rest.start()));
            let part = rest.first(u64::from(self.bits_per_sector - bit));
            let count = u32::try_from(part.count()).expect("clipped to a granule");
            rest = rest.skip(part.count());
            if self.is_marked(index, bit, count) {
                continue;
            }
            match self.lock(index) {
                Residence::Resident(mut here) => {
                    let more = here.set_bits(bit, count) || here.state.unwritten;
                    if more || here.state.not_journaled {
                        news(index, &mut here, NewBits { bit, count, is_newer: more });
                    }
                }
                Residence::Full => {}
                Residence::Absent(_) => absent.push(index),
            }
        }
    }
}

/// What is new about a granule that was marked.
pub(in crate::image::write) struct NewBits {
    /// The first bit.
    pub(in crate::image::write) bit: u32,
    /// How many.
    pub(in crate::image::write) count: u32,
    /// It says more than the file. If not, the bits were set before, and would not outlive the process.
    pub(in crate::image::write) is_newer: bool,
}

/// Words that hold the bits of so many sectors.
fn bitmap_words(sectors: u32) -> usize {
    sectors.div_ceil(u64::BITS) as usize
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
