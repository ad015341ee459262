//! A granule's place in memory: the word of the table that tells of it, and the frame that holds its bits.
//!
//! ```text
//!   table   a word a granule:  absent (and how often it left) | full | in frame N
//!   frame   whose it is | its bits | what a commit and the journal know of it
//! ```
//!
//! Frames live as long as the image is open and pass from granule to granule (`bitmaps.rs` says when). So who looks needs
//! no lock, only proof that the frame did not pass on meanwhile: its *tag* names the granule and counts the changes of
//! hands. Who changes anything holds the frame's lock, under which a tag and the word of the table always agree.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::format::bitmap;
use crate::mutant::{self, Mutant};
use crate::units::SECTOR_BYTES;

/// Memory for one granule.
#[derive(Debug)]
pub(in crate::image::write) struct BitmapFrame {
    /// Changes of hands in the upper half, the granule in the lower.
    tag: AtomicU64,
    /// Somebody looked since the hand of the clock came by.
    used: AtomicBool,
    /// A mark must look closer even where it finds its bits set.
    owes_commit: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
    state: Mutex<FrameState>,
}

/// In the lower half of a tag: no granule.
const UNOWNED: u64 = u32::MAX as u64;

/// What is known of a granule besides its bits.
#[derive(Clone, Copy, Default, Debug)]
pub(in crate::image::write) struct FrameState {
    /// Noted for the next commit.
    pub(in crate::image::write) dirty: bool,
    /// The running commit has a copy of it that the file may not have yet.
    pub(in crate::image::write) in_commit: bool,
    /// The file says nothing of it yet, so a commit is owed even where no bit changes.
    pub(in crate::image::write) unwritten: bool,
    /// The file does not know the place of the block yet.
    pub(in crate::image::write) unplaced: bool,
    /// It has bits that would not outlive this process: whoever relies on them owes a commit.
    pub(in crate::image::write) not_journaled: bool,
    /// Its bits may reach the file only after a sync of the data.
    pub(in crate::image::write) ordered: bool,
    /// The journal's slot that speaks for it.
    pub(in crate::image::write) journal_slot: Option<u32>,
    /// Requests that need it to stay in memory.
    pub(in crate::image::write) pins: u32,
    /// How often it was in memory before.
    pub(in crate::image::write) evictions: u32,
}

impl FrameState {
    /// Whether the file says all that memory does, or what reads the same: the bitmap of a fresh block that has its place
    /// and was never marked is zeros in the file, and a root without a bit reads zeros as well.
    pub(in crate::image::write) fn is_clean(&self) -> bool {
        let dirty = (self.dirty || self.journal_slot.is_some()) && !mutant::enabled(Mutant::EvictDirty);
        let taken = self.in_commit && !mutant::enabled(Mutant::EvictInCommit);
        !dirty && !taken && !self.unplaced
    }
}

impl BitmapFrame {
    pub(in crate::image::write) fn new() -> BitmapFrame {
        let (used, owing) = (AtomicBool::new(false), AtomicBool::new(false));
        BitmapFrame {
            tag: AtomicU64::new(UNOWNED),
            used,
            owes_commit: owing,
            words: OnceLock::new(),
            state: Mutex::default(),
        }
    }

    /// Begins to look at a granule; `None` where the frame is another's by now.
    #[inline]
    pub(in crate::image::write) fn read_optimistic(&self, granule: usize) -> Option<OptimisticRead<'_>> {
        let tag = self.tag.load(Ordering::Acquire);
        if tag & UNOWNED != granule as u64 {
            return None;
        }
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(OptimisticRead { frame: self, words: self.words.get()?, tag })
    }

    /// Whether anybody looked since this was asked last.
    pub(in crate::image::write) fn take_used(&self) -> bool {
        self.used.load(Ordering::Relaxed) && self.used.swap(false, Ordering::Relaxed)
    }

    /// Whose it is. Stays so while the frame is locked.
    pub(in crate::image::write) fn owner(&self) -> Option<usize> {
        let owner = self.tag.load(Ordering::Acquire) & UNOWNED;
        (owner != UNOWNED).then(|| usize::try_from(owner).expect("32 bits"))
    }

    pub(in crate::image::write) fn lock(&self) -> LockedFrame<'_> {
        LockedFrame { frame: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// `None` where somebody else has locked it.
    pub(in crate::image::write) fn try_lock(&self) -> Option<LockedFrame<'_>> {
        Some(LockedFrame { frame: self, state: self.state.try_lock().ok()? })
    }
}

/// A look at a granule's bits, without a lock.
pub(in crate::image::write) struct OptimisticRead<'a> {
    frame: &'a BitmapFrame,
    words: &'a [AtomicU64],
    tag: u64,
}

impl OptimisticRead<'_> {
    /// The run of equal bits from `from`, not beyond `end`: whether they are set, and how many.
    #[inline]
    pub(in crate::image::write) fn run(&self, from: u32, end: u32) -> (bool, u32) {
        bitmap::run_atomic(self.words, from, end)
    }

    /// Whether a mark that finds its bits set is done.
    #[inline]
    pub(in crate::image::write) fn owes_no_commit(&self) -> bool {
        !self.frame.owes_commit.load(Ordering::Acquire)
    }

    /// Whether all that was seen was of the granule. If not, it means nothing.
    #[inline]
    pub(in crate::image::write) fn is_valid(&self) -> bool {
        // With the fence in `fill`: who has seen a bit of the next granule sees the tag changed.
        fence(Ordering::Acquire);
        self.frame.tag.load(Ordering::Relaxed) == self.tag
    }
}

/// A frame that nobody else changes.
pub(in crate::image::write) struct LockedFrame<'a> {
    frame: &'a BitmapFrame,
    pub(in crate::image::write) state: MutexGuard<'a, FrameState>,
}

impl LockedFrame<'_> {
    /// Whether its bits may reach the file only after a sync of the data.
    pub(in crate::image::write) fn is_ordered(&self) -> bool {
        self.state.ordered
    }

    /// Copies its bits for a commit. What is marked from now on is noted anew, and claims another slot of the journal.
    pub(in crate::image::write) fn snapshot(&mut self) -> [u8; SECTOR_BYTES] {
        self.state.journal_slot = None;
        self.state.dirty = false;
        self.state.in_commit = true;
        self.to_bytes()
    }

    /// Copies its bits.
    pub(in crate::image::write) fn to_bytes(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.words()) {
            *to = word.load(Ordering::SeqCst).to_be_bytes();
        }
        bytes
    }

    /// Its bits.
    pub(in crate::image::write) fn words(&self) -> &[AtomicU64] {
        self.frame.words.get().expect("a granule's frame has words")
    }

    pub(in crate::image::write) fn owner(&self) -> Option<usize> {
        self.frame.owner()
    }

    /// Sets `count` bits from `bit`; whether any of them was clear.
    pub(in crate::image::write) fn set_bits(&self, bit: u32, count: u32) -> bool {
        // Before the bits: who finds them set must not take them for kept before that is so. Cleared on unlocking.
        self.frame.owes_commit.store(true, Ordering::Relaxed);
        bitmap::set_atomic(self.words(), bit, count)
    }

    /// Gives the frame to nobody.
    pub(in crate::image::write) fn release(&mut self) {
        let hands = self.frame.tag.load(Ordering::Relaxed) >> 32;
        self.frame.tag.store(hands.wrapping_add(1) << 32 | UNOWNED, Ordering::Relaxed);
        *self.state = FrameState::default();
    }

    /// Puts `count` words into a frame that is nobody's, and leaves it so.
    pub(in crate::image::write) fn fill(
        &mut self,
        count: usize,
        mut words: impl Iterator<Item = u64>,
        known: FrameState,
    ) {
        self.release();
        // Whoever sees a bit that is stored below sees the tag of `vacate`, or a later one.
        fence(Ordering::Release);
        let held = self.frame.words.get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect());
        held.iter().for_each(|to| to.store(words.next().unwrap_or(0), Ordering::Relaxed));
        *self.state = known;
    }

    /// Gives a frame that was filled to a granule, of which the table says so already: who remembers this frame from an
    /// earlier stay of the granule must not meet bits that turn out to be out of date.
    pub(in crate::image::write) fn assign_to(&mut self, granule: usize) {
        let tag = self.frame.tag.load(Ordering::Relaxed) & !UNOWNED;
        self.frame.used.store(false, Ordering::Relaxed);
        self.frame.tag.store(tag | granule as u64, Ordering::Release);
    }
}

impl Drop for LockedFrame<'_> {
    fn drop(&mut self) {
        let owing = self.state.unwritten || self.state.not_journaled;
        if self.frame.owes_commit.load(Ordering::Relaxed) != owing {
            self.frame.owes_commit.store(owing, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_sound_while_the_frame_has_one_owner() {
        let frame = BitmapFrame::new();
        assert!(frame.read_optimistic(7).is_none());
        let give = |granule, word| {
            let mut frame = frame.lock();
            frame.fill(1, std::iter::once(word), FrameState::default());
            assert_eq!(frame.owner(), None, "filled, and nobody's yet");
            frame.assign_to(granule);
        };
        give(7, 1 << 63);
        let look = frame.read_optimistic(7).unwrap();
        assert!(
            look.run(0, 8) == (true, 1)
                && look.is_valid()
                && look.owes_no_commit()
                && frame.read_optimistic(8).is_none()
        );
        frame.lock().set_bits(1, 1);
        assert!(look.run(0, 8) == (true, 2) && look.is_valid());
        // There and back again: the same granule, and yet not what was looked at.
        give(8, 0);
        give(7, 1 << 63);
        assert!(!look.is_valid() && frame.read_optimistic(7).unwrap().is_valid());
        frame.lock().release();
        assert!(frame.read_optimistic(7).is_none() && frame.owner().is_none());
    }
}
