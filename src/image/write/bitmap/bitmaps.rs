//! The sector bitmaps of a writable image, cached one bitmap sector at a time.
//!
//! A *bitmap sector* is 512 bytes of a block's bitmap. It has the bits of at most 4096 sectors (2 MiB) of the disk, of
//! fewer if the block is smaller. It is read when it is first needed. Afterwards:
//!
//! - If all its bits are set, also in the file, it takes only its entry in the table.
//! - Otherwise it has a frame, until `clock.rs` evicts it. An evicted bitmap sector is read again when it is next
//!   needed. Requests for other bitmap sectors do not wait for that read.
//!
//! Why eviction loses no bit:
//!
//! - A bitmap sector is evicted only while its frame is locked, and only if it is not pinned and is clean: it is not
//!   dirty, not in a running commit, no journal slot has its bits, and the BAT entry of its block is in the file.
//! - A mark sets bits and notes the sector as dirty under the same lock, after it has checked the owner of the frame.
//!   If the sector was evicted before, it is read again before the write is answered.
//! - A sector that was read from the file is inserted only if it was absent during the whole read: the entry in the
//!   table counts evictions.
//!
//! A bitmap sector is *dirty* if the next commit writes it: marks have set bits that no commit has taken yet, or a
//! journal slot has its bits. It is *ordered* if its bits must not be written to the file before the data of their
//! sectors is durable (crash-safety 5).

use std::sync::atomic::Ordering;

use super::clock::FramePool;
use super::entry::{BitmapEntry, EntryTable};
use super::frame::{BitmapFrame, FrameState, LockedFrame, OptimisticRead};
use crate::format::bitmap;
use crate::mutant::{self, Mutant};
use crate::units::{BitmapSectorIndex, BlockIndex, BlockSize, SECTOR_BITS, SECTOR_BYTES, SectorRange};

/// Memory for frames, in bytes, beyond which a clean bitmap sector is evicted for another.
const MAX_FRAME_BYTES: usize = 64 << 20;
/// Number of frames in addition to one per bitmap sector. They are for threads that have allocated a frame but not yet
/// assigned it to a bitmap sector.
const SPARE_FRAMES: usize = 1024;

/// The bitmap of a new block before anything is written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InitialBits {
    /// All sectors are absent: reads go to the parent.
    Clear,
    /// All sectors are present, as zeros: a block of a dynamic root, whose space in the file is durably zero. Programs
    /// that ignore bitmaps (QEMU) then read the same, and bits and data may be written in any order.
    Set,
}

/// The sector bitmaps of an image.
#[derive(Debug)]
pub struct Bitmaps {
    table: EntryTable,
    pool: FramePool,
    block_size: BlockSize,
    bits_per_sector: u32,
}

/// The location of a bitmap sector.
pub(in crate::image::write) enum Residence<'a> {
    /// In the file only. Contains the number of evictions so far.
    Absent(u32),
    /// All bits are set, also in the file: it needs no frame.
    Full,
    /// In a frame, which is locked now.
    Resident(LockedFrame<'a>),
}

impl Bitmaps {
    /// Creates the cache for an image of `blocks` blocks; all bitmap sectors are absent.
    pub fn new(blocks: u32, block_size: BlockSize) -> Bitmaps {
        let count = blocks as usize * block_size.bitmap_sectors() as usize;
        let bits_per_sector = block_size.sectors().min(SECTOR_BITS);
        let frame = size_of::<BitmapFrame>() + bitmap_words(bits_per_sector) * 8;
        Bitmaps {
            table: EntryTable::new(count),
            pool: FramePool::new(count + SPARE_FRAMES, MAX_FRAME_BYTES / frame),
            block_size,
            bits_per_sector,
        }
    }

    /// Sets the number of frames at which an insertion evicts another bitmap sector. The next insertion uses the new
    /// number. The cache exceeds the number while most bitmap sectors are dirty, pinned or in frequent use.
    pub fn set_max_frames(&self, frames: usize) {
        self.pool.set_max_frames(frames);
    }

    /// Returns the number of frames at which an insertion evicts another bitmap sector.
    pub(in crate::image::write) fn max_frames(&self) -> usize {
        self.pool.max_frames()
    }

    /// Number of frames in memory, used or free.
    pub fn frames(&self) -> usize {
        self.pool.made()
    }

    /// Sectors of the disk that one bitmap sector covers.
    pub fn bits_per_sector(&self) -> u32 {
        self.bits_per_sector
    }

    /// Index of the bitmap sector with the bit of a sector of the disk.
    #[inline]
    pub fn bitmap_sector_of(&self, sector: u64) -> BitmapSectorIndex {
        let within = self.block_size.sector_in_block(sector) / self.bits_per_sector;
        self.block_size.bitmap_sector(self.block_size.block_at(sector), within)
    }

    /// Position of the bit of a sector of the disk in its bitmap sector.
    #[inline]
    pub fn bit_of(&self, sector: u64) -> u32 {
        self.block_size.sector_in_block(sector) % self.bits_per_sector
    }

    /// The block of a bitmap sector, and the number of the sector in the block's bitmap.
    pub fn block_of(&self, index: BitmapSectorIndex) -> (BlockIndex, u32) {
        self.block_size.block_of_bitmap_sector(index)
    }

    /// Index of a block's first bitmap sector.
    pub(in crate::image::write) fn first_sector_of(&self, block: BlockIndex) -> BitmapSectorIndex {
        self.block_size.bitmap_sector(block, 0)
    }

    /// Indices of a block's bitmap sectors.
    fn bitmap_sectors_of(&self, block: BlockIndex) -> impl Iterator<Item = BitmapSectorIndex> + use<> {
        let block_size = self.block_size;
        (0..block_size.bitmap_sectors()).map(move |number| block_size.bitmap_sector(block, number))
    }

    /// Calls `f(set, count)` for each run of equal bits in `from..end` of a bitmap sector.
    ///
    /// Returns false if the bitmap sector is not in memory, or was evicted meanwhile. The runs passed to `f` are then
    /// invalid.
    #[inline]
    pub fn each_run(&self, index: BitmapSectorIndex, from: u32, end: u32, mut f: impl FnMut(bool, u32)) -> bool {
        let read = match self.read_optimistic(index) {
            Ok(read) => read,
            Err(BitmapEntry::Full) => {
                f(true, end - from);
                return true;
            }
            Err(_) => return false,
        };
        let mut at = from;
        while at < end {
            let (set, count) = read.run(at, end);
            f(set, count);
            at += count;
        }
        read.is_valid()
    }

    /// Begins a read without a lock. The error is the table entry of a bitmap sector that has no frame.
    #[inline]
    fn read_optimistic(&self, index: BitmapSectorIndex) -> Result<OptimisticRead<'_>, BitmapEntry> {
        match self.table.get(index) {
            BitmapEntry::InFrame(number) => {
                self.pool.frame(number).read_optimistic(index).ok_or(BitmapEntry::Absent(0))
            }
            other => Err(other),
        }
    }

    /// Number of evictions of an absent bitmap sector; `None` if the bitmap sector is full or has a frame.
    /// [`Pins::insert`](crate::image::Pins::insert) requires the number from before the file was read.
    pub fn eviction_count(&self, index: BitmapSectorIndex) -> Option<u32> {
        match self.table.get(index) {
            BitmapEntry::Absent(evictions) => Some(evictions),
            _ => None,
        }
    }

    /// Inserts a bitmap sector as it was read from the file, and pins it. `evictions` is the result of
    /// `eviction_count` from before the read. Returns whether the bitmap sector is pinned.
    ///
    /// - If the bitmap sector has a frame by now, its bits in memory do not change, and it is pinned.
    /// - If it was inserted and evicted since, `sector` is out of date and is ignored. It is not pinned.
    /// - If all bits of `sector` are set, only the table records this. Such a bitmap sector has no frame and needs no
    ///   pin.
    pub(in crate::image::write) fn insert(&self, index: BitmapSectorIndex, evictions: u32, sector: &[u8]) -> bool {
        let mut words = [0; SECTOR_BYTES / 8];
        bitmap::decode(sector, &mut words);
        let before = match self.table.get(index) {
            absent @ BitmapEntry::Absent(_) if mutant::enabled(Mutant::StaleBits) => absent,
            _ => BitmapEntry::Absent(evictions),
        };
        if bitmap::run(&words, 0, self.bits_per_sector) == (true, self.bits_per_sector) {
            return !self.table.compare_exchange(index, before, BitmapEntry::Full) && self.pin(index);
        }
        let state = FrameState { ordered: true, pins: 1, evictions, ..FrameState::default() };
        self.assign_frame(index, before, words.into_iter(), state) || self.pin(index)
    }

    /// Pins a bitmap sector if it has a frame. Returns whether it does; the caller unpins it then.
    pub(in crate::image::write) fn pin(&self, index: BitmapSectorIndex) -> bool {
        match self.lock(index) {
            Residence::Resident(mut frame) => {
                frame.state.pins += 1;
                true
            }
            Residence::Full | Residence::Absent(_) => false,
        }
    }

    /// Undoes one `pin` that returned true.
    pub(in crate::image::write) fn unpin(&self, index: BitmapSectorIndex) {
        match self.lock(index) {
            Residence::Resident(mut frame) => frame.state.pins -= 1,
            Residence::Full => {}
            Residence::Absent(_) => debug_assert!(false, "a pinned bitmap sector is not evicted"),
        }
    }

    /// Inserts the bits of a bitmap sector from the journal of the previous daemon, or adds them to those in memory.
    pub(in crate::image::write) fn replay(&self, index: BitmapSectorIndex, words: &[u64]) -> LockedFrame<'_> {
        if let Residence::Absent(evictions) = self.lock(index) {
            let state = FrameState { ordered: true, evictions, ..FrameState::default() };
            self.assign_frame(index, BitmapEntry::Absent(evictions), words.iter().copied(), state);
        }
        let frame = self.lock_resident(index);
        for (to, word) in frame.words().iter().zip(words) {
            to.fetch_or(*word, Ordering::SeqCst);
        }
        frame
    }

    /// Inserts the bitmap of a block that is about to get its place. No reader looks at the bitmap before the block has
    /// its place.
    pub(in crate::image::write) fn insert_fresh(&self, block: BlockIndex, bits: InitialBits) {
        for index in self.bitmap_sectors_of(block) {
            let word = if bits == InitialBits::Set { u64::MAX } else { 0 };
            let evictions = self.eviction_count(index).expect("a block without a place has no bitmap");
            let ordered = bits == InitialBits::Clear;
            let state = FrameState { unwritten: true, unplaced: true, ordered, evictions, ..FrameState::default() };
            let made = self.assign_frame(index, BitmapEntry::Absent(evictions), std::iter::repeat(word), state);
            assert!(made, "a block without a place has no bitmap");
        }
    }

    /// Gives a frame to a bitmap sector if its table entry is still `before`. Returns whether the bitmap sector got the
    /// frame.
    fn assign_frame(
        &self,
        index: BitmapSectorIndex,
        before: BitmapEntry,
        words: impl Iterator<Item = u64>,
        state: FrameState,
    ) -> bool {
        if self.table.get(index) != before {
            return false; // checked first, so that no bitmap sector is evicted in vain
        }
        let (number, mut frame) = self.pool.allocate(&self.table);
        frame.fill(bitmap_words(self.bits_per_sector), words, state);
        let entered = self.table.compare_exchange(index, before, BitmapEntry::InFrame(number));
        if entered {
            frame.assign_to(index);
        } else {
            self.pool.free(number, frame);
        }
        entered
    }

    /// Locks a bitmap sector if it has a frame.
    pub(in crate::image::write) fn lock(&self, index: BitmapSectorIndex) -> Residence<'_> {
        loop {
            match self.table.get(index) {
                BitmapEntry::Absent(evictions) => return Residence::Absent(evictions),
                BitmapEntry::Full => return Residence::Full,
                BitmapEntry::InFrame(number) => {
                    let frame = self.pool.frame(number).lock();
                    if frame.owner() == Some(index) {
                        return Residence::Resident(frame);
                    }
                    // The bitmap sector was evicted before the lock was taken, so the table has another entry by now.
                }
            }
        }
    }

    /// Locks a bitmap sector that cannot have been evicted.
    ///
    /// # Panics
    /// If it has no frame.
    pub(in crate::image::write) fn lock_resident(&self, index: BitmapSectorIndex) -> LockedFrame<'_> {
        match self.lock(index) {
            Residence::Resident(frame) => frame,
            Residence::Full | Residence::Absent(_) => panic!("a bitmap sector that is not clean is never evicted"),
        }
    }

    /// Records that the BAT entry of a block is in the file.
    pub(in crate::image::write) fn set_placed(&self, block: BlockIndex) {
        for index in self.bitmap_sectors_of(block) {
            if let Residence::Resident(mut frame) = self.lock(index) {
                frame.state.unplaced = false;
                // The slot of a sector that is not dirty only records the place, which is in the file now.
                if !frame.state.dirty {
                    frame.state.journal_slot = None;
                }
            }
        }
    }

    /// Records that a commit has made its snapshot of a bitmap sector durable. A bitmap sector that is full and clean
    /// then gives up its frame.
    pub(in crate::image::write) fn set_written(&self, index: BitmapSectorIndex) {
        let mut frame = self.lock_resident(index);
        (frame.state.in_commit, frame.state.unwritten) = (false, false);
        frame.state.not_journaled &= frame.state.dirty;
        let whole = (true, self.bits_per_sector);
        if frame.state.is_clean() && bitmap::run_atomic(frame.words(), 0, self.bits_per_sector) == whole {
            let BitmapEntry::InFrame(number) = self.table.get(index) else { unreachable!("its frame is locked") };
            self.table.set(index, BitmapEntry::Full);
            self.pool.free(number, frame);
        }
    }

    /// Whether a mark of these bits has nothing to do: they are set already, and the bitmap sector needs no commit for
    /// the mark (see [`FrameState::unwritten`] and [`FrameState::not_journaled`]).
    #[inline]
    fn is_marked(&self, index: BitmapSectorIndex, bit: u32, count: u32) -> bool {
        match self.read_optimistic(index) {
            Ok(read) => read.run(bit, bit + count) == (true, count) && read.owes_no_commit() && read.is_valid(),
            Err(entry) => entry == BitmapEntry::Full,
        }
    }

    /// Sets the bits of a range of one block. Calls `on_new(index, frame, bits)` for each bitmap sector in which a bit
    /// was clear, or of which [`FrameState::unwritten`] or [`FrameState::not_journaled`] is set. Adds bitmap sectors
    /// that are not in memory to `absent`, and does not mark them.
    #[inline]
    pub(in crate::image::write) fn mark(
        &self,
        range: SectorRange,
        absent: &mut Vec<BitmapSectorIndex>,
        mut on_new: impl FnMut(BitmapSectorIndex, &mut LockedFrame<'_>, NewBits),
    ) {
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (self.bitmap_sector_of(rest.start()), self.bit_of(rest.start()));
            let part = rest.first(u64::from(self.bits_per_sector - bit));
            let count = u32::try_from(part.count()).expect("clipped to a bitmap sector");
            rest = rest.skip(part.count());
            if self.is_marked(index, bit, count) {
                continue;
            }
            match self.lock(index) {
                Residence::Resident(mut frame) => {
                    let is_newer = frame.set_bits(bit, count) || frame.state.unwritten;
                    if is_newer || frame.state.not_journaled {
                        on_new(index, &mut frame, NewBits { bit, count, is_newer });
                    }
                }
                Residence::Full => {}
                Residence::Absent(_) => absent.push(index),
            }
        }
    }
}

/// Bits that a mark has set.
pub(in crate::image::write) struct NewBits {
    /// Position of the first bit.
    pub(in crate::image::write) bit: u32,
    /// Number of bits.
    pub(in crate::image::write) count: u32,
    /// Whether a bit was clear before, or the bitmap sector was never written to the file. If not, the bits were set
    /// before, but some bits of the sector are neither in the file nor in the journal.
    pub(in crate::image::write) is_newer: bool,
}

/// Number of 64-bit words for the bits of `sectors` sectors.
fn bitmap_words(sectors: u32) -> usize {
    sectors.div_ceil(u64::BITS) as usize
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
