//! The live journal: the marks since the last commit, in memory that survives a kill of the process (crash-safety 7).
//!
//! When a daemon is killed, its guest keeps running and never repeats acknowledged writes. So the next daemon needs
//! every mark. The journal is a mapped file on tmpfs: it survives a kill, and is lost in a kernel crash or a power cut,
//! which end the guest, too. A mark costs a few stores, and no
//! system call.
//!
//! The journal consists of 64-bit words, whose positions are in `journal_layout.rs`: a header (identity, generations of
//! the stamp, last commit, sum over the BAT), then slots. A slot has all bits of one bitmap sector, and the place of
//! its block. It is valid while its epoch is later than the last commit's. Each commit begins a new epoch when it takes
//! its snapshot. So one store to the header (`COMMITTED`) ends all slots that the commit has written to the file, and
//! at the same moment selects the sum that includes the commit.
//!
//! Order of stores: the words of a slot before its epoch; its bits before the request is acknowledged.
//!
//! The name of the file contains the session, which the image's stamp contains, too. `session.rs` creates and removes
//! journals, and `journal_validation.rs` validates the journal of a killed daemon.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::journal_layout::{
    BITMAP_WORDS, BOOT_AT, BYTES, COMMITTED, CURRENT_GENERATION, FILE_ID_AT, IMAGE_AT, JOURNAL_SLOTS, JOURNAL_WORDS,
    JournalSlot, MAGIC, MAGIC_AT, NEXT_GENERATION, NOT_PLACED, PATH_AT, PATH_WORDS, POISON_AT, POISON_WORDS,
    SESSION_AT, SLOT_BITMAP_SECTOR, SLOT_BITS, SLOT_EPOCH, SLOT_PLACE, SLOT_PLACED_BY, TABLE_SUMS, UNACCOUNTED,
};
use crate::error::Result;
use crate::format::bat::BlockPlace;
use crate::format::bitmap;
use crate::image::journal_id::{entry_hash, table_sum};
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::mutant::{self, Mutant};
use crate::storage::{FileId, RuntimeFolder, Shm};
use crate::units::{BitmapSectorIndex, BlockIndex};

/// Number of used slots at which a commit becomes due.
const DUE_SLOTS: usize = JOURNAL_SLOTS as usize * 3 / 4;

/// The journal of an image that is open for writing.
#[derive(Debug)]
pub struct Journal {
    shm: Shm,
    runtime: RuntimeFolder,
    name: String,
    state: Mutex<JournalState>,
}

/// Which slots are in use. This state is in private memory.
#[derive(Debug)]
pub(super) struct JournalState {
    /// Epoch of the slots that are claimed now.
    pub(super) epoch: u64,
    pub(super) free: Vec<JournalSlot>,
    pub(super) used: BTreeSet<JournalSlot>,
    /// Epoch of the running commit, and the blocks whose BAT entries it writes.
    placing: (u64, BTreeSet<BlockIndex>),
}

impl Journal {
    /// Creates the journal of a new session of an image. `boot` is the ID of the machine's boot.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn create(runtime: &RuntimeFolder, session: Uuid, boot: Uuid, image: &Image) -> Result<Journal> {
        let name = journal_name(session);
        let shm = runtime.create(&name, JOURNAL_WORDS)?;
        let journal = Journal::from_shm(shm, runtime, name);
        for (at, uuid) in [(SESSION_AT, session), (IMAGE_AT, image.uuid()), (BOOT_AT, boot)] {
            let (high, low) = uuid.as_u64_pair();
            journal.shm[at].store(high, Ordering::Relaxed);
            journal.shm[at + 1].store(low, Ordering::Relaxed);
        }
        journal.shm[TABLE_SUMS].store(table_sum(image), Ordering::Relaxed);
        journal.record_file(image)?;
        journal.shm[MAGIC_AT].store(MAGIC, Ordering::Release);
        journal.lock().free = JournalSlot::last_to_first().collect();
        Ok(journal)
    }

    /// Opens and locks the journal of a session. The contents of the journal are not validated yet.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Busy` if another process has the journal open
    /// - `Refused` if the file cannot be a journal of this user
    /// - `Unsupported` if the SIGBUS handler cannot be installed
    /// - `Io`
    pub(super) fn open(runtime: &RuntimeFolder, name: &str) -> Result<Journal> {
        let shm = runtime.open(name, JOURNAL_WORDS)?;
        Ok(Journal::from_shm(shm, runtime, name.to_owned()))
    }

    fn from_shm(shm: Shm, runtime: &RuntimeFolder, name: String) -> Journal {
        let state = JournalState { epoch: 1, free: Vec::new(), used: BTreeSet::new(), placing: Default::default() };
        Journal { shm, runtime: runtime.clone(), name, state: Mutex::new(state) }
    }

    /// Checks that a folder has space for a journal.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn probe(runtime: &RuntimeFolder) -> Result<()> {
        runtime.check_space(BYTES)
    }

    /// The folder of the journal.
    pub(super) fn folder(&self) -> &Path {
        self.runtime.path()
    }

    /// The path of the journal, for messages.
    pub(super) fn path(&self) -> PathBuf {
        self.runtime.path().join(&self.name)
    }

    /// Records the ID of the image's file, and its absolute path unless that is too long.
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

    /// Returns the recorded ID of the image's file, and its path unless that was too long.
    pub(super) fn recorded_file(&self) -> (FileId, Option<PathBuf>) {
        use std::os::unix::ffi::OsStringExt;
        let id = FileId { dev: self.header_word(FILE_ID_AT), ino: self.header_word(FILE_ID_AT + 1) };
        let path = self.text(PATH_AT, PATH_WORDS);
        (id, (!path.is_empty()).then(|| std::ffi::OsString::from_vec(path).into()))
    }

    /// Records the generation that the stamp is about to get. From now on a stamp with either generation fits.
    pub(super) fn announce_generation(&self, generation: u64) {
        self.shm[NEXT_GENERATION].store(generation, Ordering::Release);
    }

    /// Records that the stamp has the announced generation. From now on no stamp with an older generation fits.
    pub(super) fn confirm_generation(&self, generation: u64) {
        self.shm[CURRENT_GENERATION].store(generation, Ordering::Release);
    }

    /// Whether an access to the journal raised SIGBUS, usually because the file was truncated. Stores are lost then.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.shm.is_lost()
    }

    /// Ends all slots by one store. The caller has committed the image, so that no acknowledged write depends on a
    /// slot.
    pub(super) fn end_all_slots(&self) {
        let state = self.lock();
        let which = self.shm[COMMITTED].load(Ordering::Acquire) & 1;
        self.shm[COMMITTED].store(state.epoch << 1 | which, Ordering::Release);
    }

    /// Removes the journal. The caller has committed or discarded its contents.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn remove(&self) -> Result<()> {
        self.runtime.remove(&self.name)
    }

    /// Whether any slot is valid.
    pub(super) fn has_marks(&self) -> bool {
        let committed = self.header_word(COMMITTED) >> 1;
        JournalSlot::last_to_first().any(|slot| self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire) > committed)
    }

    /// Loads a word of the header.
    pub(super) fn header_word(&self, word: usize) -> u64 {
        self.shm[word].load(Ordering::Acquire)
    }

    /// Loads a UUID of the header.
    pub(super) fn header_uuid(&self, word: usize) -> Uuid {
        Uuid::from_u64_pair(self.header_word(word), self.header_word(word + 1))
    }

    /// Stores a word of the header.
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

    /// Claims a slot for a bitmap sector with the bits `words`. Returns `None` if all slots are in use.
    ///
    /// `fresh` means that no commit has written the block's BAT entry yet.
    pub(super) fn claim_slot(
        &self,
        index: BitmapSectorIndex,
        block: BlockIndex,
        place: BlockPlace,
        fresh: bool,
        words: &[AtomicU64],
    ) -> Option<JournalSlot> {
        let mut state = self.lock();
        let slot = state.free.pop()?;
        let placed_by = match &state.placing {
            (epoch, blocks) if blocks.contains(&block) => *epoch,
            _ if fresh => NOT_PLACED,
            _ => 0,
        };
        self.slot_word(slot, SLOT_BITMAP_SECTOR).store(index.get() as u64, Ordering::Relaxed);
        self.slot_word(slot, SLOT_PLACE).store(place.entry().into(), Ordering::Relaxed);
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

    /// Sets `count` bits of a slot from `bit`.
    pub(super) fn set_bits(&self, slot: JournalSlot, bit: u32, count: u32) {
        let at = slot.word(SLOT_BITS);
        bitmap::set_atomic(&self.shm[at..at + BITMAP_WORDS], bit, count);
    }

    /// Records for the next daemon that a sync failed: the slots must not be replayed, as the kernel may have dropped
    /// the data of their sectors.
    pub(super) fn poison(&self, why: &str) {
        let mut bytes = [0; POISON_WORDS * 8];
        let len = why.len().min(bytes.len());
        bytes[..len].copy_from_slice(&why.as_bytes()[..len]);
        self.put_text(POISON_AT, &bytes);
    }

    /// The reason for which the journal was poisoned.
    pub(super) fn poison_reason(&self) -> Option<String> {
        let bytes = self.text(POISON_AT, POISON_WORDS);
        (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether so many slots are in use that a commit should begin.
    pub fn is_commit_due(&self) -> bool {
        self.lock().used.len() >= DUE_SLOTS
    }

    /// Number of slots in use.
    pub fn len(&self) -> usize {
        self.lock().used.len()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Begins a commit that writes the BAT entries of `blocks`, and returns its epoch. Slots that are claimed from now
    /// on belong to the next epoch. The caller takes the snapshot afterwards.
    ///
    /// `unaccounted` means that some of the blocks have no slot. If the daemon is killed during this commit, the sum
    /// over the BAT cannot be checked.
    pub(super) fn begin_commit(&self, blocks: BTreeSet<BlockIndex>, unaccounted: bool) -> u64 {
        let mut state = self.lock();
        if unaccounted {
            self.shm[UNACCOUNTED].store(1, Ordering::Release);
        }
        let epoch = state.epoch;
        state.placing = (epoch, blocks);
        state.epoch += 1;
        epoch
    }

    /// Records that the running commit failed. The next commit writes its BAT entries.
    pub(super) fn fail_commit(&self) {
        self.lock().placing.1.clear();
    }

    /// Records that the snapshot of the commit of `epoch` is durable, and ends all slots up to this epoch that are not
    /// in use any more. `places` are the BAT entries that the commit wrote, as (block, place).
    ///
    /// The frame of a bitmap sector that is not in the snapshot may still refer to its slot. Such a slot stays valid:
    /// it moves to the current epoch. `keep(slot, bitmap sector, renew)` returns whether the frame of the bitmap sector
    /// refers to the slot. If so, `keep` first calls `renew`, which moves the slot, under the lock of the frame.
    pub(super) fn finish_commit(
        &self,
        epoch: u64,
        places: &[(BlockIndex, BlockPlace)],
        keep: impl Fn(JournalSlot, BitmapSectorIndex, &dyn Fn()) -> bool,
    ) {
        let (next, old) = {
            let state = self.lock();
            let old: Vec<JournalSlot> = state.used.iter().copied().filter(|s| self.epoch_of(*s) <= epoch).collect();
            (state.epoch, old)
        };
        let placed: BTreeSet<u64> = places.iter().map(|(_, place)| u64::from(place.entry())).collect();
        let mut ended = Vec::new();
        for slot in old {
            let index = self.slot_word(slot, SLOT_BITMAP_SECTOR).load(Ordering::Relaxed);
            let index = BitmapSectorIndex::new(usize::try_from(index).expect("stored from a usize"));
            let renew = || {
                // `placed by` takes effect with the store to COMMITTED below: `epoch` is no finished commit before that
                // store.
                if placed.contains(&self.slot_word(slot, SLOT_PLACE).load(Ordering::Relaxed)) {
                    self.slot_word(slot, SLOT_PLACED_BY).store(epoch, Ordering::Release);
                }
                self.slot_word(slot, SLOT_EPOCH).store(next, Ordering::Release);
            };
            if !keep(slot, index, &renew) {
                ended.push(slot);
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
        // The list is cleared after the store to COMMITTED: a slot that is claimed before that store must contain the
        // epoch of this commit as `placed by`.
        state.placing.1.clear();
        for slot in ended {
            state.used.remove(&slot);
            state.free.push(slot);
        }
    }

    /// Adds bits to a slot that was replayed.
    pub(super) fn add_bits(&self, slot: JournalSlot, words: &[u64; BITMAP_WORDS]) {
        for (n, word) in words.iter().enumerate() {
            self.slot_word(slot, SLOT_BITS + n).fetch_or(*word, Ordering::Release);
        }
    }

    fn epoch_of(&self, slot: JournalSlot) -> u64 {
        self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire)
    }

    pub(super) fn slot_word(&self, slot: JournalSlot, at: usize) -> &AtomicU64 {
        &self.shm[slot.word(at)]
    }

    /// Locks the state of the slots.
    pub(super) fn lock(&self) -> MutexGuard<'_, JournalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "sim"))]
#[path = "journal_tests.rs"]
mod tests;
