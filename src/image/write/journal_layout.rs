//! Layout of the live journal: its slots, and the positions of its 64-bit words.
//!
//! ```text
//!   words 0..512              header: identity, generations of the stamp, last commit, sum over the BAT
//!   then JOURNAL_SLOTS x 68   slot: epoch | bitmap sector | place | placed by | 64 words of bitmap
//! ```

/// Number of slots: bitmap sectors whose marks the journal can record between two commits.
pub const JOURNAL_SLOTS: u32 = 4096;

/// First word of a journal; contains the version.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"ddjrnl02");
const HEADER_WORDS: usize = 512;
const SLOT_WORDS: usize = 68;
pub(super) const BITMAP_WORDS: usize = 64;
/// Number of words of a journal.
pub(super) const JOURNAL_WORDS: usize = HEADER_WORDS + JOURNAL_SLOTS as usize * SLOT_WORDS;
/// Size of a journal in bytes.
pub const BYTES: u64 = (JOURNAL_WORDS * size_of::<u64>()) as u64;
/// Limit of epochs, which no daemon reaches: a larger one is damage.
pub(super) const EPOCH_LIMIT: u64 = 1 << 60;

// Words of the header.
pub(super) const MAGIC_AT: usize = 0;
pub(super) const SESSION_AT: usize = 1; // UUID, two words
pub(super) const IMAGE_AT: usize = 3; // UUID, two words
pub(super) const BOOT_AT: usize = 5; // UUID, two words
pub(super) const COMMITTED: usize = 7; // epoch of the last commit << 1 | index of the valid sum
pub(super) const TABLE_SUMS: usize = 8; // two sums over the BAT, one of them valid
pub(super) const UNACCOUNTED: usize = 10; // 1 while a running commit may write BAT entries that are in no slot
pub(super) const NEXT_GENERATION: usize = 11; // generation that the stamp has, or is about to get
pub(super) const CURRENT_GENERATION: usize = 12; // last generation that the stamp is confirmed to have
pub(super) const FILE_ID_AT: usize = 13; // device and inode of the image's file
// Reason for which the image was poisoned, as text; zeros if it was not.
pub(super) const POISON_AT: usize = 16;
pub(super) const POISON_WORDS: usize = 32;
// Path of the image's file; zeros if it is too long.
pub(super) const PATH_AT: usize = 64;
pub(super) const PATH_WORDS: usize = 128;

// Words of a slot.
pub(super) const SLOT_EPOCH: usize = 0;
pub(super) const SLOT_BITMAP_SECTOR: usize = 1;
pub(super) const SLOT_PLACE: usize = 2;
pub(super) const SLOT_PLACED_BY: usize = 3;
pub(super) const SLOT_BITS: usize = 4;

/// Value of `SLOT_PLACED_BY`: no commit has written the BAT entry of the slot's block.
pub(super) const NOT_PLACED: u64 = u64::MAX;

/// The index of a slot of a live journal, less than [`JOURNAL_SLOTS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct JournalSlot(u32);

impl JournalSlot {
    /// Creates an index.
    #[cfg(test)]
    pub(super) fn new(index: u32) -> JournalSlot {
        assert!(index < JOURNAL_SLOTS, "an index of a slot");
        JournalSlot(index)
    }

    /// Returns all slots, the last one first: a claim takes the slot at the end of the list of free slots.
    pub(super) fn last_to_first() -> impl Iterator<Item = JournalSlot> {
        (0..JOURNAL_SLOTS).rev().map(JournalSlot)
    }

    /// Returns the position in the journal of word `at` of the slot.
    #[inline]
    pub(super) const fn word(self, at: usize) -> usize {
        HEADER_WORDS + self.0 as usize * SLOT_WORDS + at
    }
}
