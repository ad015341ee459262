//! The sector bitmaps of a writable image in memory, a granule at a time.
//!
//! A granule is what one sector of bitmap speaks for: at most 4096 sectors (2 MiB), less where the block is smaller.
//! Granules are read when first asked for. One whose sectors are all here, and of which the file says so, takes no more
//! than its word of the table from then on. Of the others as many are kept as there is memory for (`evict.rs`); what was
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

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::evict::Pool;
use super::granule::{Entry, Frame, Known, Locked, Look};
use super::paged::Paged;
use crate::format::bitmap;
use crate::mutant::{self, Mutant};
use crate::units::{BlockSize, SECTOR_BITS, SECTOR_BYTES, SectorRange};

/// Bytes of frames that are kept for granules that are neither full nor needed by what is under way.
const MOST_BYTES: usize = 64 << 20;
/// Frames that may be in the hands of threads besides those that belong to granules.
const IN_HAND: usize = 1024;
/// Dirty granules that are never too many: as many as the journal has slots.
const FEW_DIRTY: usize = super::journal::SLOTS as usize;

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
    /// An `Entry` each.
    table: Paged<AtomicU32>,
    frames: Paged<Frame>,
    pool: Mutex<Pool>,
    most: AtomicUsize,
    block_size: BlockSize,
    sectors_per_granule: u32,
}

/// Where a granule is.
pub(super) enum Where<'a> {
    /// In the file alone; it left memory so many times.
    Absent(u32),
    /// Nowhere: it is full.
    Full,
    /// In a frame, which is locked.
    Here(Locked<'a>),
}

impl Bitmaps {
    /// None read yet.
    pub fn new(blocks: u32, block_size: BlockSize) -> Bitmaps {
        let count = blocks as usize * block_size.bitmap_sectors() as usize;
        let sectors_per_granule = block_size.sectors().min(SECTOR_BITS);
        let frame = size_of::<Frame>() + bitmap_words(sectors_per_granule) * 8;
        Bitmaps {
            table: Paged::new(count, || AtomicU32::new(Entry::Absent(0).encode())),
            frames: Paged::new(count + IN_HAND, Frame::new),
            pool: Mutex::default(),
            most: AtomicUsize::new(MOST_BYTES / frame),
            block_size,
            sectors_per_granule,
        }
    }

    /// Sets how many granules that are not full are kept, from the next one on that is needed. More are kept only while
    /// the file does not say what they say, or requests under way need them.
    pub fn keep_at_most(&self, granules: usize) {
        self.most.store(granules, Ordering::Relaxed);
    }

    /// How many granules that are not full are kept.
    pub(super) fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    /// Dirty granules from which on a commit is due, so that they leave room for others.
    pub(super) fn most_dirty(&self) -> usize {
        (self.most() / 2).max(FEW_DIRTY)
    }

    /// Frames that were ever needed at once: memory that is taken.
    pub fn frames(&self) -> usize {
        self.pool().made()
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

    /// The first granule of a block.
    pub(super) fn first_of(&self, block: u32) -> usize {
        block as usize * self.block_size.bitmap_sectors() as usize
    }

    fn granules_of(&self, block: u32) -> std::ops::Range<usize> {
        let first = self.first_of(block);
        first..first + self.block_size.bitmap_sectors() as usize
    }

    #[inline]
    fn entry(&self, granule: usize) -> Entry {
        self.table.get(granule).map_or(Entry::Absent(0), |word| Entry::decode(word.load(Ordering::Acquire)))
    }

    #[inline]
    pub(super) fn frame(&self, number: u32) -> &Frame {
        self.frames.get(number as usize).expect("a number that was given out")
    }

    /// The frame of a number that is given out for the first time.
    pub(super) fn new_frame(&self, number: usize) -> &Frame {
        self.frames.touch(number)
    }

    pub(super) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the table says of a granule whose frame is locked.
    pub(super) fn enter(&self, granule: usize, entry: Entry) {
        self.table.touch(granule).store(entry.encode(), Ordering::Release);
    }

    /// Calls `f(set, count)` for each run of equal bits in `from..end` of a granule. False where the granule is not in
    /// memory, or left it meanwhile: then what `f` was told means nothing.
    #[inline]
    pub fn each_run(&self, granule: usize, from: u32, end: u32, mut f: impl FnMut(bool, u32)) -> bool {
        let look = match self.look(granule) {
            Ok(look) => look,
            Err(Entry::Full) => {
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
        look.is_sound()
    }

    #[inline]
    fn look(&self, granule: usize) -> Result<Look<'_>, Entry> {
        match self.entry(granule) {
            Entry::In(number) => self.frame(number).look(granule).ok_or(Entry::Absent(0)),
            other => Err(other),
        }
    }

    /// How often an absent granule has left memory; `None` where it is there. To be asked before the file is read.
    pub fn times_absent(&self, granule: usize) -> Option<u32> {
        match self.entry(granule) {
            Entry::Absent(times) => Some(times),
            _ => None,
        }
    }

    /// Takes in what the file says of a granule that was absent from before it was read until now, and pins it. Where it
    /// came and left meanwhile, this is out of date: it stays absent. Where it is known, what is known stays.
    ///
    /// Whether it is pinned.
    pub(super) fn supply(&self, granule: usize, times: u32, sector: &[u8]) -> bool {
        let mut words = [0; SECTOR_BYTES / 8];
        bitmap::decode(sector, &mut words);
        let before = match self.entry(granule) {
            absent @ Entry::Absent(_) if mutant::is(Mutant::StaleBits) => absent,
            _ => Entry::Absent(times),
        };
        if bitmap::run(&words, 0, self.sectors_per_granule) == (true, self.sectors_per_granule) {
            return !self.exchange(granule, before, Entry::Full) && self.pin(granule);
        }
        let known = Known { ordered: true, pins: 1, times, ..Known::default() };
        self.assign(granule, before, words.into_iter(), known) || self.pin(granule)
    }

    /// Makes a granule stay in memory, if it is there. Whether it is to be unpinned.
    pub(super) fn pin(&self, granule: usize) -> bool {
        match self.lock(granule) {
            Where::Here(mut here) => {
                here.known.pins += 1;
                true
            }
            Where::Full | Where::Absent(_) => false,
        }
    }

    /// Takes back one `pin` that was true.
    pub(super) fn unpin(&self, granule: usize) {
        match self.lock(granule) {
            Where::Here(mut here) => here.known.pins -= 1,
            Where::Full => {}
            Where::Absent(_) => debug_assert!(false, "a granule that is pinned stays"),
        }
    }

    /// Takes in what the journal of a predecessor says of a granule: all its bits, or more of them.
    pub(super) fn adopt(&self, granule: usize, words: &[u64]) -> Locked<'_> {
        if let Where::Absent(times) = self.lock(granule) {
            let known = Known { ordered: true, times, ..Known::default() };
            self.assign(granule, Entry::Absent(times), words.iter().copied(), known);
        }
        let known = self.expect(granule);
        for (to, word) in known.words().iter().zip(words) {
            to.fetch_or(*word, Ordering::SeqCst);
        }
        known
    }

    /// Makes the granules of a block that is about to get its place. The block has none yet, so nobody reads them.
    pub(super) fn prepare(&self, block: u32, fresh: Fresh) {
        for granule in self.granules_of(block) {
            let word = if fresh == Fresh::Set { u64::MAX } else { 0 };
            let times = self.times_absent(granule).expect("a block without a place has no bitmap");
            let ordered = fresh == Fresh::Clear;
            let known = Known { unwritten: true, unplaced: true, ordered, times, ..Known::default() };
            let made = self.assign(granule, Entry::Absent(times), std::iter::repeat(word), known);
            assert!(made, "a block without a place has no bitmap");
        }
    }

    /// Gives a frame to a granule, if the table still says `before` of it.
    fn assign(&self, granule: usize, before: Entry, words: impl Iterator<Item = u64>, known: Known) -> bool {
        if self.entry(granule) != before {
            return false; // nobody has to leave for it
        }
        let (number, mut frame) = self.vacate();
        frame.fill(bitmap_words(self.sectors_per_granule), words, known);
        let entered = self.exchange(granule, before, Entry::In(number));
        if entered {
            frame.give_to(granule);
        } else {
            self.put_back(number, frame);
        }
        entered
    }

    fn exchange(&self, granule: usize, before: Entry, after: Entry) -> bool {
        let word = self.table.touch(granule);
        word.compare_exchange(before.encode(), after.encode(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// A granule, locked where it is in a frame.
    pub(super) fn lock(&self, granule: usize) -> Where<'_> {
        loop {
            match self.entry(granule) {
                Entry::Absent(times) => return Where::Absent(times),
                Entry::Full => return Where::Full,
                Entry::In(number) => {
                    let here = self.frame(number).lock();
                    if here.owner() == Some(granule) {
                        return Where::Here(here);
                    }
                    // It left before it was locked, and the table says so.
                }
            }
        }
    }

    /// A granule that cannot have left, locked.
    pub(super) fn expect(&self, granule: usize) -> Locked<'_> {
        match self.lock(granule) {
            Where::Here(here) => here,
            Where::Full | Where::Absent(_) => panic!("a granule stays until the file says all it says"),
        }
    }

    /// Says that the file now knows the place of a block.
    pub(super) fn set_placed(&self, block: u32) {
        for granule in self.granules_of(block) {
            if let Where::Here(mut here) = self.lock(granule) {
                here.known.unplaced = false;
                // Claimed with the place, which the file has now; of the bits nobody has relied on any.
                if !here.known.dirty {
                    here.known.slot = None;
                }
            }
        }
    }

    /// Says that the file has the copy of a granule that a commit has taken.
    pub(super) fn set_written(&self, granule: usize) {
        let mut here = self.expect(granule);
        (here.known.taken, here.known.unwritten) = (false, false);
        here.known.unkept &= here.known.dirty;
        let whole = (true, self.sectors_per_granule);
        if here.known.is_in_file() && bitmap::run_atomic(here.words(), 0, self.sectors_per_granule) == whole {
            let Entry::In(number) = self.entry(granule) else { unreachable!("its frame is locked") };
            self.enter(granule, Entry::Full);
            self.put_back(number, here);
        }
    }

    /// Whether a mark of these bits has nothing to do.
    #[inline]
    fn is_marked(&self, granule: usize, bit: u32, count: u32) -> bool {
        match self.look(granule) {
            Ok(look) => look.run(bit, bit + count) == (true, count) && look.owes_nothing() && look.is_sound(),
            Err(entry) => entry == Entry::Full,
        }
    }

    /// Sets the bits of a range of one block. Calls `news(granule, its frame, what)` for each granule of which the file
    /// does not say all that it now says. Granules that are not there are named in `absent`, and not marked.
    #[inline]
    pub(super) fn mark(
        &self,
        range: SectorRange,
        absent: &mut Vec<usize>,
        mut news: impl FnMut(usize, &mut Locked<'_>, News),
    ) {
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (self.index_of(rest.start()), self.bit_of(rest.start()));
            let part = rest.first(u64::from(self.sectors_per_granule - bit));
            let count = u32::try_from(part.count()).expect("clipped to a granule");
            rest = rest.skip(part.count());
            if self.is_marked(index, bit, count) {
                continue;
            }
            match self.lock(index) {
                Where::Here(mut here) => {
                    let more = here.set(bit, count) || here.known.unwritten;
                    if more || here.known.unkept {
                        news(index, &mut here, News { bit, count, more });
                    }
                }
                Where::Full => {}
                Where::Absent(_) => absent.push(index),
            }
        }
    }
}

/// What is new about a granule that was marked.
pub(super) struct News {
    /// The first bit.
    pub(super) bit: u32,
    /// How many.
    pub(super) count: u32,
    /// It says more than the file. If not, the bits were set before, and would not outlive the process.
    pub(super) more: bool,
}

/// Words that hold the bits of so many sectors.
fn bitmap_words(sectors: u32) -> usize {
    sectors.div_ceil(u64::BITS) as usize
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
