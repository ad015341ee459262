//! The live journal: what was marked since the last commit, in memory that outlives the process (crash-safety 3.9).
//!
//! A killed daemon's guest lives on and will never repeat what was acknowledged, so its successor must know every mark.
//! The journal lies on tmpfs: it is there after a kill, and gone after a host crash, when the guest is gone too. Marking
//! costs a store.
//!
//! ```text
//!   words 0..512      header: whose it is, which generation of the stamp fits, the last commit, a sum over the block table
//!   then SLOTS x 68   slot: epoch | granule | place | placed by | 64 words of bitmap
//! ```
//!
//! A slot holds the place of one granule's block, and all its bits. It counts while its epoch is younger than the last
//! commit. Epochs advance with each commit's snapshot, so one store of the header (`COMMITTED`) ends all slots that
//! the commit has made superfluous, together with the sum that goes with it; there is no moment in between.
//!
//! Order of stores: a slot's words before its epoch; its bits before the request is answered.
//!
//! The file is named by its session, which the image's stamp names. `session.rs` tells when it is made and ends, and
//! `journal_replay.rs` what a successor believes of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::error::Result;
use crate::format::bitmap;
use crate::image::journal_id::{entry_hash, table_sum};
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::mutant::{self, Mutant};
use crate::storage::{FileId, RuntimeFolder, Shm};

/// Granules that may be marked between two commits.
pub const JOURNAL_SLOTS: u32 = 4096;
/// Slots in use from which on a commit is due.
const DUE_SLOTS: usize = JOURNAL_SLOTS as usize * 3 / 4;

pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"ddjrnl02");
const HEADER_WORDS: usize = 512;
const SLOT_WORDS: usize = 68;
pub(super) const BITMAP_WORDS: usize = 64;
/// Bytes of memory that a journal takes.
pub const BYTES: u64 = ((HEADER_WORDS + JOURNAL_SLOTS as usize * SLOT_WORDS) * size_of::<u64>()) as u64;
/// Epochs that can be; no journal of ours comes near.
pub(super) const EPOCH_LIMIT: u64 = 1 << 60;

// Words of the header.
pub(super) const MAGIC_AT: usize = 0;
pub(super) const SESSION_AT: usize = 1; // two
pub(super) const IMAGE_AT: usize = 3; // two
pub(super) const BOOT_AT: usize = 5; // two
pub(super) const COMMITTED: usize = 7; // last commit's epoch << 1 | which sum counts
pub(super) const TABLE_SUMS: usize = 8; // two
pub(super) const UNACCOUNTED: usize = 10; // 1: a commit under way may put places into the file that no slot tells
pub(super) const NEXT_GENERATION: usize = 11; // the generation that the stamp is about to get, or has
pub(super) const CURRENT_GENERATION: usize = 12; // the generation that the stamp had last
const FILE_ID_AT: usize = 13; // the file it is held for: device, inode
// Not zero: why the image was poisoned, as text.
const POISON_AT: usize = 16;
const POISON_WORDS: usize = 32;
// The path of the file it is held for; none if it is longer.
const PATH_AT: usize = 64;
const PATH_WORDS: usize = 128;

// Words of a slot.
pub(super) const SLOT_EPOCH: usize = 0;
pub(super) const SLOT_BITMAP_SECTOR: usize = 1;
pub(super) const SLOT_PLACE: usize = 2;
pub(super) const SLOT_PLACED_BY: usize = 3;
pub(super) const SLOT_BITS: usize = 4;

/// No commit has put the block's place into the file.
pub(super) const NOT_PLACED: u64 = u64::MAX;

/// The journal of an image that is open for writing.
#[derive(Debug)]
pub struct Journal {
    shm: Shm,
    runtime: RuntimeFolder,
    name: String,
    state: Mutex<JournalState>,
}

#[derive(Debug)]
pub(super) struct JournalState {
    /// Slots claimed now belong to this epoch.
    pub(super) epoch: u64,
    pub(super) free: Vec<u32>,
    pub(super) used: BTreeSet<u32>,
    /// Blocks whose places the running commit puts into the file, and its epoch.
    placing: (u64, BTreeSet<u32>),
}

impl Journal {
    /// Makes the journal of a new session for an image, on a start of the host.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn create(runtime: &RuntimeFolder, session: Uuid, boot: Uuid, image: &Image) -> Result<Journal> {
        let name = journal_name(session);
        let live = runtime.create(&name, HEADER_WORDS + JOURNAL_SLOTS as usize * SLOT_WORDS)?;
        let journal = Journal::from_shm(live, runtime, name);
        for (at, uuid) in [(SESSION_AT, session), (IMAGE_AT, image.uuid()), (BOOT_AT, boot)] {
            let (high, low) = uuid.as_u64_pair();
            journal.shm[at].store(high, Ordering::Relaxed);
            journal.shm[at + 1].store(low, Ordering::Relaxed);
        }
        journal.shm[TABLE_SUMS].store(table_sum(image), Ordering::Relaxed);
        journal.record_file(image)?;
        journal.shm[MAGIC_AT].store(MAGIC, Ordering::Release);
        journal.lock().free = (0..JOURNAL_SLOTS).rev().collect();
        Ok(journal)
    }

    /// Opens and locks the journal of a session; nothing of it is believed yet.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if a process has it open; `Refused` if it is not one of ours; `Io`.
    pub(super) fn open(runtime: &RuntimeFolder, name: &str) -> Result<Journal> {
        let live = runtime.open(name, HEADER_WORDS + JOURNAL_SLOTS as usize * SLOT_WORDS)?;
        Ok(Journal::from_shm(live, runtime, name.to_owned()))
    }

    fn from_shm(live: Shm, runtime: &RuntimeFolder, name: String) -> Journal {
        let state = JournalState { epoch: 1, free: Vec::new(), used: BTreeSet::new(), placing: Default::default() };
        Journal { shm: live, runtime: runtime.clone(), name, state: Mutex::new(state) }
    }

    /// Whether a journal can be made in a folder.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn probe(runtime: &RuntimeFolder) -> Result<()> {
        runtime.check_space(BYTES)
    }

    /// The folder in which it lies.
    pub(super) fn folder(&self) -> &Path {
        self.runtime.path()
    }

    /// Where it lies, for messages.
    pub(super) fn path(&self) -> PathBuf {
        self.runtime.path().join(&self.name)
    }

    /// Notes which file it is held for.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn record_file(&self, image: &Image) -> Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let id = image.file().stat()?.id;
        self.shm[FILE_ID_AT].store(id.dev, Ordering::Relaxed);
        self.shm[FILE_ID_AT + 1].store(id.ino, Ordering::Relaxed);
        let path = std::path::absolute(image.file().path()).unwrap_or_default();
        let path = path.as_os_str().as_bytes();
        let mut bytes = [0; PATH_WORDS * 8];
        if path.len() < bytes.len() {
            bytes[..path.len()].copy_from_slice(path);
        }
        self.put_text(PATH_AT, &bytes);
        Ok(())
    }

    /// The file it was last held for.
    pub(super) fn recorded_file(&self) -> (FileId, Option<PathBuf>) {
        use std::os::unix::ffi::OsStringExt;
        let id = FileId { dev: self.header_word(FILE_ID_AT), ino: self.header_word(FILE_ID_AT + 1) };
        let path = self.text(PATH_AT, PATH_WORDS);
        (id, (!path.is_empty()).then(|| std::ffi::OsString::from_vec(path).into()))
    }

    /// The stamp is about to get a generation: from here on a stamp with it fits, too.
    pub(super) fn announce_generation(&self, generation: u64) {
        self.shm[NEXT_GENERATION].store(generation, Ordering::Release);
    }

    /// The stamp has the generation that was announced: from here on no stamp with an older one fits.
    pub(super) fn confirm_generation(&self, generation: u64) {
        self.shm[CURRENT_GENERATION].store(generation, Ordering::Release);
    }

    /// Whether the file was cut: nothing that is stored will be found again.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.shm.is_lost()
    }

    /// Ends all slots by one store: all they hold is in the file, or was never written.
    pub(super) fn end_all_slots(&self) {
        let state = self.lock();
        let which = self.shm[COMMITTED].load(Ordering::Acquire) & 1;
        self.shm[COMMITTED].store(state.epoch << 1 | which, Ordering::Release);
    }

    /// Removes it: everything it holds is in the file, or is given up.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn remove(&self) -> Result<()> {
        self.runtime.remove(&self.name)
    }

    /// Whether any slot counts.
    pub(super) fn has_marks(&self) -> bool {
        let committed = self.header_word(COMMITTED) >> 1;
        (0..JOURNAL_SLOTS).any(|slot| self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire) > committed)
    }

    /// A word of the header.
    pub(super) fn header_word(&self, word: usize) -> u64 {
        self.shm[word].load(Ordering::Acquire)
    }

    /// A UUID in the header.
    pub(super) fn header_uuid(&self, word: usize) -> Uuid {
        Uuid::from_u64_pair(self.header_word(word), self.header_word(word + 1))
    }

    pub(super) fn store_header_word(&self, word: usize, value: u64) {
        self.shm[word].store(value, Ordering::Release);
    }

    fn put_text(&self, word: usize, bytes: &[u8]) {
        for (n, word_bytes) in bytes.as_chunks::<8>().0.iter().enumerate().rev() {
            self.shm[word + n].store(u64::from_be_bytes(*word_bytes), Ordering::Release);
        }
    }

    fn text(&self, word: usize, words: usize) -> Vec<u8> {
        (word..word + words).flat_map(|n| self.header_word(n).to_be_bytes()).take_while(|b| *b != 0).collect()
    }

    /// Takes a slot for a granule whose bits are `words`; `None` where all are taken. `fresh`: no commit has put the
    /// block's place into the file.
    pub(super) fn claim_slot(
        &self,
        granule: usize,
        block: u32,
        place: u32,
        fresh: bool,
        words: &[AtomicU64],
    ) -> Option<u32> {
        let mut state = self.lock();
        let slot = state.free.pop()?;
        let placed_by = match &state.placing {
            (epoch, blocks) if blocks.contains(&block) => *epoch,
            _ if fresh => NOT_PLACED,
            _ => 0,
        };
        self.slot_word(slot, SLOT_BITMAP_SECTOR).store(granule as u64, Ordering::Relaxed);
        self.slot_word(slot, SLOT_PLACE).store(place.into(), Ordering::Relaxed);
        self.slot_word(slot, SLOT_PLACED_BY).store(placed_by, Ordering::Relaxed);
        for n in 0..BITMAP_WORDS {
            let bits = words.get(n).map_or(0, |w| w.load(Ordering::SeqCst));
            let bits = if mutant::enabled(Mutant::SlotReplacesBits) { 0 } else { bits };
            self.slot_word(slot, SLOT_BITS + n).store(bits, Ordering::Relaxed);
        }
        self.slot_word(slot, SLOT_EPOCH).store(state.epoch, Ordering::Release);
        state.used.insert(slot);
        Some(slot)
    }

    /// Sets bits of a slot.
    pub(super) fn set_bits(&self, slot: u32, bit: u32, count: u32) {
        let at = HEADER_WORDS + slot as usize * SLOT_WORDS + SLOT_BITS;
        bitmap::set_atomic(&self.shm[at..at + BITMAP_WORDS], bit, count);
    }

    /// Remembers for the next process that a sync failed: what the slots say must not be believed any more, since the
    /// host may have dropped the data they speak for.
    pub(super) fn poison(&self, why: &str) {
        let mut bytes = [0; POISON_WORDS * 8];
        let len = why.len().min(bytes.len());
        bytes[..len].copy_from_slice(&why.as_bytes()[..len]);
        self.put_text(POISON_AT, &bytes);
    }

    /// Why it was poisoned.
    pub(super) fn poison_reason(&self) -> Option<String> {
        let bytes = self.text(POISON_AT, POISON_WORDS);
        (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether a commit should begin, so that slots do not run out.
    pub fn is_commit_due(&self) -> bool {
        self.lock().used.len() >= DUE_SLOTS
    }

    /// Slots in use.
    pub fn len(&self) -> usize {
        self.lock().used.len()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A commit begins, which is going to put the places of `blocks` into the file. Called before its snapshot is taken:
    /// slots claimed from now on belong to the next one. Its epoch. `unaccounted`: some of the blocks found no slot when
    /// they got their places; if this commit is killed, the sum proves nothing.
    pub(super) fn begin_commit(&self, blocks: BTreeSet<u32>, unaccounted: bool) -> u64 {
        let mut state = self.lock();
        if unaccounted {
            self.shm[UNACCOUNTED].store(1, Ordering::Release);
        }
        let epoch = state.epoch;
        state.placing = (epoch, blocks);
        state.epoch += 1;
        epoch
    }

    /// The commit that began last failed; what it was to place, the next one will.
    pub(super) fn fail_commit(&self) {
        self.lock().placing.1.clear();
    }

    /// The commit of `epoch` has made its snapshot durable, `places` (block, place) included: all slots up to that epoch are
    /// superfluous, but for those that are still in use. `keep(slot, granule, renew)` tells: of a slot in use it calls
    /// `renew` while it holds the granule.
    pub(super) fn finish_commit(
        &self,
        epoch: u64,
        places: &[(u32, u32)],
        keep: impl Fn(u32, usize, &dyn Fn()) -> bool,
    ) {
        let (next, old) = {
            let state = self.lock();
            let old: Vec<u32> = state.used.iter().copied().filter(|s| self.epoch_of(*s) <= epoch).collect();
            (state.epoch, old)
        };
        let placed: BTreeSet<u64> = places.iter().map(|(_, place)| u64::from(*place)).collect();
        let mut over = Vec::new();
        for slot in old {
            let granule = self.slot_word(slot, SLOT_BITMAP_SECTOR).load(Ordering::Relaxed);
            let renew = || {
                // Counts only from the store of COMMITTED below on.
                if placed.contains(&self.slot_word(slot, SLOT_PLACE).load(Ordering::Relaxed)) {
                    self.slot_word(slot, SLOT_PLACED_BY).store(epoch, Ordering::Release);
                }
                self.slot_word(slot, SLOT_EPOCH).store(next, Ordering::Release);
            };
            if !keep(slot, usize::try_from(granule).expect("an index of ours"), &renew) {
                over.push(slot);
            }
        }
        let word = self.shm[COMMITTED].load(Ordering::Acquire);
        let which = usize::from(word & 1 == 1);
        let sum = places.iter().fold(self.shm[TABLE_SUMS + which].load(Ordering::Acquire), |sum, (block, place)| {
            sum.wrapping_add(entry_hash(*block, *place))
        });
        self.shm[TABLE_SUMS + (1 - which)].store(sum, Ordering::Release);
        self.shm[COMMITTED].store(epoch << 1 | (1 - which) as u64, Ordering::Release);
        self.shm[UNACCOUNTED].store(0, Ordering::Release);
        let mut state = self.lock();
        // Not before the store: a slot claimed in between must say that it counts with this commit only.
        state.placing.1.clear();
        for slot in over {
            state.used.remove(&slot);
            state.free.push(slot);
        }
    }

    /// Adds bits to a slot of a predecessor.
    pub(super) fn add_bits(&self, slot: u32, words: &[u64; BITMAP_WORDS]) {
        for (n, word) in words.iter().enumerate() {
            self.slot_word(slot, SLOT_BITS + n).fetch_or(*word, Ordering::Release);
        }
    }

    fn epoch_of(&self, slot: u32) -> u64 {
        self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire)
    }

    pub(super) fn slot_word(&self, slot: u32, at: usize) -> &AtomicU64 {
        &self.shm[HEADER_WORDS + slot as usize * SLOT_WORDS + at]
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, JournalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "sim"))]
#[path = "journal_tests.rs"]
mod tests;
