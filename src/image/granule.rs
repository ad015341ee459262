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

/// What the table says of a granule, in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// Only the file knows it. It was in memory so many times before (30 bits).
    Absent(u32),
    /// All its sectors are here, and the file says so: nothing can change any more.
    Full,
    /// In the frame of this number.
    In(u32),
}

const FULL: u32 = 1 << 30;
const IN: u32 = 1 << 31;

impl Entry {
    #[inline]
    pub(super) fn decode(word: u32) -> Entry {
        match word {
            _ if word & IN != 0 => Entry::In(word & !IN),
            FULL => Entry::Full,
            times => Entry::Absent(times),
        }
    }

    pub(super) fn encode(self) -> u32 {
        match self {
            Entry::Absent(times) => times & (FULL - 1),
            Entry::Full => FULL,
            Entry::In(number) => IN | number,
        }
    }
}

/// Memory for one granule.
#[derive(Debug)]
pub(super) struct Frame {
    /// Changes of hands in the upper half, the granule in the lower.
    tag: AtomicU64,
    /// Somebody looked since the hand of the clock came by.
    used: AtomicBool,
    /// A mark must look closer even where it finds its bits set.
    owing: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
    known: Mutex<Known>,
}

/// In the lower half of a tag: no granule.
const NOBODY: u64 = u32::MAX as u64;

/// What is known of a granule besides its bits.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Known {
    /// Noted for the next commit.
    pub(super) dirty: bool,
    /// The running commit has a copy of it that the file may not have yet.
    pub(super) taken: bool,
    /// The file says nothing of it yet, so a commit is owed even where no bit changes.
    pub(super) unwritten: bool,
    /// The file does not know the place of the block yet.
    pub(super) unplaced: bool,
    /// It has bits that would not outlive this process: whoever relies on them owes a commit.
    pub(super) unkept: bool,
    /// Its bits may reach the file only after a sync of the data.
    pub(super) ordered: bool,
    /// The journal's slot that speaks for it.
    pub(super) slot: Option<u32>,
    /// Requests that need it to stay in memory.
    pub(super) pins: u32,
    /// How often it was in memory before.
    pub(super) times: u32,
}

impl Known {
    /// Whether the file says all that memory does, or what reads the same: the bitmap of a fresh block that has its place
    /// and was never marked is zeros in the file, and a root without a bit reads zeros as well.
    pub(super) fn is_in_file(&self) -> bool {
        let dirty = (self.dirty || self.slot.is_some()) && !mutant::is(Mutant::EvictDirty);
        let taken = self.taken && !mutant::is(Mutant::EvictTaken);
        !dirty && !taken && !self.unplaced
    }
}

impl Frame {
    pub(super) fn new() -> Frame {
        let (used, owing) = (AtomicBool::new(false), AtomicBool::new(false));
        Frame { tag: AtomicU64::new(NOBODY), used, owing, words: OnceLock::new(), known: Mutex::default() }
    }

    /// Begins to look at a granule; `None` where the frame is another's by now.
    #[inline]
    pub(super) fn look(&self, granule: usize) -> Option<Look<'_>> {
        let tag = self.tag.load(Ordering::Acquire);
        if tag & NOBODY != granule as u64 {
            return None;
        }
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Some(Look { frame: self, words: self.words.get()?, tag })
    }

    /// Whether anybody looked since this was asked last.
    pub(super) fn take_used(&self) -> bool {
        self.used.load(Ordering::Relaxed) && self.used.swap(false, Ordering::Relaxed)
    }

    /// Whose it is. Stays so while the frame is locked.
    pub(super) fn owner(&self) -> Option<usize> {
        let owner = self.tag.load(Ordering::Acquire) & NOBODY;
        (owner != NOBODY).then(|| usize::try_from(owner).expect("32 bits"))
    }

    pub(super) fn lock(&self) -> Locked<'_> {
        Locked { frame: self, known: self.known.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// `None` where somebody else has locked it.
    pub(super) fn try_lock(&self) -> Option<Locked<'_>> {
        Some(Locked { frame: self, known: self.known.try_lock().ok()? })
    }
}

/// A look at a granule's bits, without a lock.
pub(super) struct Look<'a> {
    frame: &'a Frame,
    words: &'a [AtomicU64],
    tag: u64,
}

impl Look<'_> {
    /// The run of equal bits from `from`, not beyond `end`: whether they are set, and how many.
    #[inline]
    pub(super) fn run(&self, from: u32, end: u32) -> (bool, u32) {
        bitmap::run_atomic(self.words, from, end)
    }

    /// Whether a mark that finds its bits set is done.
    #[inline]
    pub(super) fn owes_nothing(&self) -> bool {
        !self.frame.owing.load(Ordering::Acquire)
    }

    /// Whether all that was seen was of the granule. If not, it means nothing.
    #[inline]
    pub(super) fn is_sound(&self) -> bool {
        // With the fence in `fill`: who has seen a bit of the next granule sees the tag changed.
        fence(Ordering::Acquire);
        self.frame.tag.load(Ordering::Relaxed) == self.tag
    }
}

/// A frame that nobody else changes.
pub(super) struct Locked<'a> {
    frame: &'a Frame,
    pub(super) known: MutexGuard<'a, Known>,
}

impl Locked<'_> {
    /// Whether its bits may reach the file only after a sync of the data.
    pub(super) fn is_ordered(&self) -> bool {
        self.known.ordered
    }

    /// Copies its bits for a commit. What is marked from now on is noted anew, and claims another slot of the journal.
    pub(super) fn snapshot(&mut self) -> [u8; SECTOR_BYTES] {
        self.known.slot = None;
        self.known.dirty = false;
        self.known.taken = true;
        self.copy()
    }

    /// Copies its bits.
    pub(super) fn copy(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.words()) {
            *to = word.load(Ordering::SeqCst).to_be_bytes();
        }
        bytes
    }

    /// Its bits.
    pub(super) fn words(&self) -> &[AtomicU64] {
        self.frame.words.get().expect("a granule's frame has words")
    }

    pub(super) fn owner(&self) -> Option<usize> {
        self.frame.owner()
    }

    /// Sets `count` bits from `bit`; whether any of them was clear.
    pub(super) fn set(&self, bit: u32, count: u32) -> bool {
        // Before the bits: who finds them set must not take them for kept before that is so. Cleared on unlocking.
        self.frame.owing.store(true, Ordering::Relaxed);
        bitmap::set_atomic(self.words(), bit, count)
    }

    /// Gives the frame to nobody.
    pub(super) fn vacate(&mut self) {
        let hands = self.frame.tag.load(Ordering::Relaxed) >> 32;
        self.frame.tag.store(hands.wrapping_add(1) << 32 | NOBODY, Ordering::Relaxed);
        *self.known = Known::default();
    }

    /// Puts `count` words into a frame that is nobody's, and leaves it so.
    pub(super) fn fill(&mut self, count: usize, mut words: impl Iterator<Item = u64>, known: Known) {
        self.vacate();
        // Whoever sees a bit that is stored below sees the tag of `vacate`, or a later one.
        fence(Ordering::Release);
        let held = self.frame.words.get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect());
        held.iter().for_each(|to| to.store(words.next().unwrap_or(0), Ordering::Relaxed));
        *self.known = known;
    }

    /// Gives a frame that was filled to a granule, of which the table says so already: who remembers this frame from an
    /// earlier stay of the granule must not meet bits that turn out to be out of date.
    pub(super) fn give_to(&mut self, granule: usize) {
        let tag = self.frame.tag.load(Ordering::Relaxed) & !NOBODY;
        self.frame.used.store(false, Ordering::Relaxed);
        self.frame.tag.store(tag | granule as u64, Ordering::Release);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let owing = self.known.unwritten || self.known.unkept;
        if self.frame.owing.load(Ordering::Relaxed) != owing {
            self.frame.owing.store(owing, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_limits() {
        for entry in [Entry::Absent(0), Entry::Absent(FULL - 1), Entry::Full, Entry::In(0), Entry::In(IN - 1)] {
            assert_eq!(Entry::decode(entry.encode()), entry);
        }
        assert_eq!(Entry::Absent(FULL).encode(), 0, "the count begins anew");
    }

    #[test]
    fn a_look_is_sound_while_the_frame_has_one_owner() {
        let frame = Frame::new();
        assert!(frame.look(7).is_none());
        let give = |granule, word| {
            let mut frame = frame.lock();
            frame.fill(1, std::iter::once(word), Known::default());
            assert_eq!(frame.owner(), None, "filled, and nobody's yet");
            frame.give_to(granule);
        };
        give(7, 1 << 63);
        let look = frame.look(7).unwrap();
        assert!(look.run(0, 8) == (true, 1) && look.is_sound() && look.owes_nothing() && frame.look(8).is_none());
        frame.lock().set(1, 1);
        assert!(look.run(0, 8) == (true, 2) && look.is_sound());
        // There and back again: the same granule, and yet not what was looked at.
        give(8, 0);
        give(7, 1 << 63);
        assert!(!look.is_sound() && frame.look(7).unwrap().is_sound());
        frame.lock().vacate();
        assert!(frame.look(7).is_none() && frame.owner().is_none());
    }
}
