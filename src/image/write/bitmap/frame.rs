//! A frame: the bits of one bitmap sector in memory, with a lock for changes, and reads without a lock.
//!
//! A frame exists as long as the image is open, and is assigned to at most one bitmap sector at a time, its *owner*
//! (`clock.rs`). The *tag* of a frame contains the index of the owner and counts the changes of owner.
//!
//! - A reader takes no lock. It reads the tag before and after the bits: if both are equal, the bits are those of the
//!   owner. This is a sequence lock on the owner alone. A reader may or may not see bits that are set concurrently.
//! - A change of the bits, the state or the owner requires the frame's lock. Whenever the lock is free, the tag and the
//!   table entry agree.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::format::bitmap;
use crate::image::write::journal_layout::JournalSlot;
use crate::mutant::{self, Mutant};
use crate::units::{BitmapSectorIndex, SECTOR_BYTES};

/// The bits of one bitmap sector in memory.
#[derive(Debug)]
pub(crate) struct BitmapFrame {
    /// Number of changes of owner in the upper half, index of the owner in the lower half.
    tag: AtomicU64,
    /// Whether the bits were read since the hand of the clock last passed.
    used: AtomicBool,
    /// Whether a mark must take the lock even if its bits are set: another mark is setting bits now, or `unwritten` or
    /// `not_journaled` of the state is set.
    owes_commit: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
    state: Mutex<FrameState>,
}

/// Lower half of a tag without an owner; also the mask of that half.
const UNOWNED: u64 = u32::MAX as u64;

/// State of a bitmap sector besides its bits.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct FrameState {
    /// Whether the next commit writes the bitmap sector.
    pub(crate) dirty: bool,
    /// Whether the running commit has a snapshot of the bitmap sector, which may not be in the file yet.
    pub(crate) in_commit: bool,
    /// Whether the bitmap sector was never written to the file, so that a mark needs a commit even if no bit changes.
    pub(crate) unwritten: bool,
    /// Whether the BAT entry of the block is not in the file yet.
    pub(crate) unplaced: bool,
    /// Whether some bits are neither in the file nor in the journal. A write that relies on such bits must wait for a
    /// commit. Never set with `Durability::FlushOnly`, as no write waits for a commit then.
    pub(crate) not_journaled: bool,
    /// Whether the bits may be written to the file only after a sync of the data.
    pub(crate) ordered: bool,
    /// The journal slot that has the bits. If the bitmap sector is not dirty, the slot only records the place of a
    /// fresh block.
    pub(crate) journal_slot: Option<JournalSlot>,
    /// Number of pins; the bitmap sector is not evicted while there are any.
    pub(crate) pins: u32,
    /// Number of evictions so far.
    pub(crate) evictions: u32,
}

impl FrameState {
    /// Whether the file reads the same as memory, so that the bitmap sector may be evicted.
    ///
    /// This includes the bitmap sector of a block that was never marked, once its BAT entry is in the file: the bitmap
    /// in the file is zeros, and a root reads zeros from absent sectors.
    pub(crate) fn is_clean(&self) -> bool {
        let dirty = (self.dirty || self.journal_slot.is_some()) && !mutant::enabled(Mutant::EvictDirty);
        let taken = self.in_commit && !mutant::enabled(Mutant::EvictInCommit);
        !dirty && !taken && !self.unplaced
    }
}

impl BitmapFrame {
    /// Creates a frame without an owner.
    pub(crate) fn new() -> BitmapFrame {
        let (used, owes_commit) = (AtomicBool::new(false), AtomicBool::new(false));
        BitmapFrame { tag: AtomicU64::new(UNOWNED), used, owes_commit, words: OnceLock::new(), state: Mutex::default() }
    }

    /// Begins a read without a lock. Returns `None` if the frame has another owner by now.
    #[inline]
    pub(crate) fn read_optimistic(&self, index: BitmapSectorIndex) -> Option<OptimisticRead<'_>> {
        let tag = self.tag.load(Ordering::Acquire);
        if tag & UNOWNED != index.get() as u64 {
            return None;
        }
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(OptimisticRead { frame: self, words: self.words.get()?, tag })
    }

    /// Clears the `used` flag, and returns whether it was set.
    pub(crate) fn take_used(&self) -> bool {
        self.used.load(Ordering::Relaxed) && self.used.swap(false, Ordering::Relaxed)
    }

    /// Index of the bitmap sector that has the frame. It does not change while the frame is locked.
    pub(crate) fn owner(&self) -> Option<BitmapSectorIndex> {
        let owner = self.tag.load(Ordering::Acquire) & UNOWNED;
        (owner != UNOWNED).then(|| BitmapSectorIndex::new(usize::try_from(owner).expect("32 bits")))
    }

    /// Locks the frame.
    pub(crate) fn lock(&self) -> LockedFrame<'_> {
        LockedFrame { frame: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Locks the frame; `None` if another thread has locked it, or has panicked with the lock.
    pub(crate) fn try_lock(&self) -> Option<LockedFrame<'_>> {
        Some(LockedFrame { frame: self, state: self.state.try_lock().ok()? })
    }
}

/// A read of a bitmap sector's bits without a lock.
pub(crate) struct OptimisticRead<'a> {
    frame: &'a BitmapFrame,
    words: &'a [AtomicU64],
    tag: u64,
}

impl OptimisticRead<'_> {
    /// Returns the run of equal bits from `from`, up to `end`: their value and their number.
    #[inline]
    pub(crate) fn run(&self, from: u32, end: u32) -> (bool, u32) {
        bitmap::run_atomic(self.words, from, end)
    }

    /// Whether a mark that finds its bits set has nothing more to do.
    #[inline]
    pub(crate) fn owes_no_commit(&self) -> bool {
        !self.frame.owes_commit.load(Ordering::Acquire)
    }

    /// Whether all bits read so far were those of the owner. If not, the bits are invalid.
    #[inline]
    pub(crate) fn is_valid(&self) -> bool {
        // Pairs with the fence in `fill`: a reader that has seen a bit of the next owner sees the changed tag.
        fence(Ordering::Acquire);
        self.frame.tag.load(Ordering::Relaxed) == self.tag
    }
}

/// A locked frame.
pub(crate) struct LockedFrame<'a> {
    frame: &'a BitmapFrame,
    pub(crate) state: MutexGuard<'a, FrameState>,
}

impl LockedFrame<'_> {
    /// Whether the bits may be written to the file only after a sync of the data.
    pub(crate) fn is_ordered(&self) -> bool {
        self.state.ordered
    }

    /// Copies the bits for a commit. A later mark makes the bitmap sector dirty again, and claims another journal slot.
    pub(crate) fn snapshot(&mut self) -> [u8; SECTOR_BYTES] {
        self.state.journal_slot = None;
        self.state.dirty = false;
        self.state.in_commit = true;
        self.to_bytes()
    }

    /// Copies the bits.
    pub(crate) fn to_bytes(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.words()) {
            *to = word.load(Ordering::SeqCst).to_be_bytes();
        }
        bytes
    }

    /// The bits.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.frame.words.get().expect("a frame with an owner has words")
    }

    /// Index of the bitmap sector that has the frame.
    pub(crate) fn owner(&self) -> Option<BitmapSectorIndex> {
        self.frame.owner()
    }

    /// Sets `count` bits from `bit`. Returns whether any of them was clear.
    pub(crate) fn set_bits(&self, bit: u32, count: u32) -> bool {
        // `owes_commit` is set before the bits, as a concurrent mark that finds the bits set must not return before
        // they are in the journal. Unlocking the frame clears the flag if no commit is owed.
        self.frame.owes_commit.store(true, Ordering::Relaxed);
        bitmap::set_atomic(self.words(), bit, count)
    }

    /// Removes the owner of the frame, and resets the state.
    pub(crate) fn release(&mut self) {
        let changes = self.frame.tag.load(Ordering::Relaxed) >> 32;
        self.frame.tag.store(changes.wrapping_add(1) << 32 | UNOWNED, Ordering::Relaxed);
        *self.state = FrameState::default();
    }

    /// Stores `count` words and the state. The frame has no owner afterwards.
    pub(crate) fn fill(&mut self, count: usize, mut words: impl Iterator<Item = u64>, state: FrameState) {
        self.release();
        // Pairs with the fence in `is_valid`: a reader that sees a bit stored below sees the tag stored by `release`.
        fence(Ordering::Release);
        let words_of_frame = self.frame.words.get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect());
        words_of_frame.iter().for_each(|to| to.store(words.next().unwrap_or(0), Ordering::Relaxed));
        *self.state = state;
    }

    /// Makes a bitmap sector the owner of a filled frame.
    ///
    /// The table entry of the bitmap sector already names this frame. If the owner were set first, a reader with an
    /// outdated entry that also names this frame could trust bits that are then not inserted.
    pub(crate) fn assign_to(&mut self, index: BitmapSectorIndex) {
        let tag = self.frame.tag.load(Ordering::Relaxed) & !UNOWNED;
        self.frame.used.store(false, Ordering::Relaxed);
        self.frame.tag.store(tag | index.get() as u64, Ordering::Release);
    }
}

impl Drop for LockedFrame<'_> {
    fn drop(&mut self) {
        let owes_commit = self.state.unwritten || self.state.not_journaled;
        if self.frame.owes_commit.load(Ordering::Relaxed) != owes_commit {
            self.frame.owes_commit.store(owes_commit, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_valid_while_the_frame_keeps_its_owner() {
        let frame = BitmapFrame::new();
        let (seven, eight) = (BitmapSectorIndex::new(7), BitmapSectorIndex::new(8));
        assert!(frame.read_optimistic(seven).is_none());
        let give = |index, word| {
            let mut frame = frame.lock();
            frame.fill(1, std::iter::once(word), FrameState::default());
            assert_eq!(frame.owner(), None, "filled, without an owner");
            frame.assign_to(index);
        };
        give(seven, 1 << 63);
        let look = frame.read_optimistic(seven).unwrap();
        assert!(
            look.run(0, 8) == (true, 1)
                && look.is_valid()
                && look.owes_no_commit()
                && frame.read_optimistic(eight).is_none()
        );
        frame.lock().set_bits(1, 1);
        assert!(look.run(0, 8) == (true, 2) && look.is_valid());
        // The frame has the same owner again, but the read began before the changes of owner, so it is invalid.
        give(eight, 0);
        give(seven, 1 << 63);
        assert!(!look.is_valid() && frame.read_optimistic(seven).unwrap().is_valid());
        frame.lock().release();
        assert!(frame.read_optimistic(seven).is_none() && frame.owner().is_none());
    }
}
