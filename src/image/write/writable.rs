//! A writable image: places for new blocks, and marks for written sectors.
//!
//! Steps of a write: [`Writable::reserve`] gives the block a place, in memory. The caller writes the data there.
//! [`Writable::mark`] makes the sectors visible to reads of this process. A [`Commit`](crate::image::Commit) writes the
//! marks and the BAT entries to the file.
//!
//! Not here: the order of durable writes (`commit.rs`), the growth of the file (`growth.rs`), and parents (`chain`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::allocation::Allocation;
use super::bitmap::bitmaps::{Bitmaps, NewBits};
use super::bitmap::frame::{FrameState, LockedFrame};
use super::durability::{Durability, DurabilityState};
use super::free_tail::FreeTail;
use super::journal::Journal;
use super::journal_layout::JOURNAL_SLOTS;
use super::journal_validation::ReplaySlot;
use super::recover::{WritableSparse, recover};
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{DiskEvent, EventReporter};
use crate::format::bat::BlockPlace;
use crate::format::layout;
use crate::image::mtime::SavedMtime;
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::storage::{AllocationMode, Env, File, ModifiedTime};
use crate::units::{BitmapSectorIndex, BlockIndex, SECTOR_BYTES, SectorRange};

/// Minimum number of dirty bitmap sectors at which a commit becomes due. It equals the number of journal slots.
const MIN_DIRTY_LIMIT: usize = JOURNAL_SLOTS as usize;

/// An image open for writing, shared by all queues of its disk.
pub struct Writable {
    image: Image,
    pub(super) sparse: Option<WritableSparse>,
    /// Whether writes or punches have completed since the last sync. True at first, as the previous process may have
    /// left data in the page cache.
    pub(super) unsynced: AtomicBool,
    /// Bitmap sectors that the next commit writes.
    dirty: Mutex<Vec<BitmapSectorIndex>>,
    poison: OnceLock<String>,
    /// Why writes are refused although the image is not poisoned; set once.
    refusal: OnceLock<String>,
    pub(super) durability: DurabilityState,
    /// Whether a commit should begin, as the journal is nearly full or too many bitmap sectors are dirty.
    pub(super) commit_due: AtomicBool,
    /// Guarantee that the file system gives for allocated space.
    pub(super) allocation_mode: AllocationMode,
    /// Reporter of events; set once.
    events: OnceLock<EventReporter>,
    /// Allocation of new blocks; set once.
    pub(super) allocation: OnceLock<Allocation>,
    /// Modification time of the file when it was opened.
    pub(super) mtime_at_open: SavedMtime,
    /// Whether the contents of the disk may have changed since the image was opened.
    pub(super) content_changed: AtomicBool,
    /// Whether the session has ended. No session begins any more.
    pub(super) has_ended: AtomicBool,
    /// Modification time that the file gets when the image is retired; set once.
    pub(super) retired_time: OnceLock<ModifiedTime>,
}

/// Error of [`Writable::reserve`]: the free tail has no space for the block, or no BAT entry can refer to the next
/// place. The caller begins a step of growth, which fails in the second case, and then retries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeedsGrowth;

impl Writable {
    /// Makes an opened image writable, and recovers it after an unclean end. The caller has locked the file.
    ///
    /// Recovery (crash-safety 4) replays the live journal of a killed daemon, writes the trailing footer if it is
    /// missing, and makes the free tail durably zero. Stale bytes there would become bitmaps of new blocks.
    ///
    /// # Errors
    /// - `Refused` if the image must not be written (hidden, saved state, footers that differ), or if it has a session
    ///   of another machine, or one whose journal is not requested, not found or does not fit;
    /// - `Poisoned` if a sync of the killed daemon failed;
    /// - `Busy` if a process has the journal open;
    /// - `NoSpace`, `Io`.
    pub fn new(env: &dyn Env, image: Image, durability: &Durability) -> Result<Writable> {
        image.check_writable()?;
        let mtime_at_open = SavedMtime::save(image.file())?;
        let (durability, replayed) = DurabilityState::begin(env, &image, durability)?;
        let stamped = matches!(&durability, DurabilityState::Session(session) if session.is_stamped());
        let sparse = match image.block_size() {
            None => None,
            Some(block_size) => Some(recover(&image, block_size, &replayed, stamped)?),
        };
        mtime_at_open.restore_at_open()?;
        let image = Writable {
            allocation_mode: image.file().allocation_mode(),
            image,
            sparse,
            unsynced: AtomicBool::new(!mutant::enabled(Mutant::CleanAtOpen)),
            dirty: Mutex::default(),
            poison: OnceLock::new(),
            refusal: OnceLock::new(),
            durability,
            commit_due: AtomicBool::new(false),
            events: OnceLock::new(),
            allocation: OnceLock::new(),
            mtime_at_open,
            content_changed: AtomicBool::new(!replayed.is_empty()),
            has_ended: AtomicBool::new(false),
            retired_time: OnceLock::new(),
        };
        if let Some(session) = image.session() {
            #[cfg(feature = "mutants")]
            session.mutate_session(image.image());
            session.renew_after_replay()?;
        }
        image.replay(&replayed);
        Ok(image)
    }

    /// Applies the slots of a killed daemon's journal to the bitmaps. `recover` has already placed their blocks.
    fn replay(&self, slots: &[ReplaySlot]) {
        let (Some(sparse), Some(journal)) = (&self.sparse, self.journal()) else { return };
        for slot in slots {
            let mut frame = sparse.bitmaps.replay(slot.bitmap_sector, &slot.words);
            // If a bitmap sector has two slots, the first slot receives the bits of both. The next commit ends both.
            journal.add_bits(*frame.state.journal_slot.get_or_insert(slot.slot), &slot.words);
            self.note_dirty(slot.bitmap_sector, &mut frame.state);
        }
        if !slots.is_empty() {
            log::info!("{}: replayed {} journal slots of a killed daemon", self.path().display(), slots.len());
        }
    }

    /// The image as it was opened.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The file of the image.
    pub fn file(&self) -> &File {
        self.image.file()
    }

    /// The path of the image.
    pub fn path(&self) -> &Path {
        self.image.file().path()
    }

    /// The bitmaps; `None` for a fixed image, in which all sectors are present.
    #[inline]
    pub fn bitmaps(&self) -> Option<&Bitmaps> {
        self.sparse.as_ref().map(|s| &s.bitmaps)
    }

    /// Returns the place of a block. Gives the block a place if it has none.
    ///
    /// Performs no I/O, except that the first call that places a block also begins the session: it creates the journal
    /// and writes the stamp. Idempotent.
    ///
    /// # Errors
    /// [`NeedsGrowth`] if the free tail has no space for the block, or no BAT entry can refer to the next place.
    pub fn reserve(&self, block: BlockIndex) -> Result<BlockPlace, NeedsGrowth> {
        let table = self.image.bat().expect("a fixed image reserves no blocks");
        if let Some(place) = table.place(block) {
            return Ok(place);
        }
        let sparse = self.sparse();
        let mut tail = lock(&sparse.free_tail);
        if let Some(place) = table.place(block) {
            return Ok(place); // another queue has placed the block meanwhile
        }
        let place = layout::next_place(tail.next, sparse.block_size, tail.unplaced).map_err(|_| NeedsGrowth)?;
        let end = place.end(sparse.block_size);
        if end > tail.usable_end() {
            return Err(NeedsGrowth);
        }
        self.begin_session(&mut tail);
        sparse.bitmaps.insert_fresh(block, sparse.fresh);
        if let Some(journal) = self.journal() {
            // Without this slot a kill would leak the block's space, and the sum over the BAT would lack an entry of an
            // interrupted commit. Marks do not rely on it: `make_bits_durable` claims a slot if none exists.
            let index = sparse.bitmaps.first_sector_of(block);
            let mut frame = sparse.bitmaps.lock_resident(index);
            frame.state.journal_slot = journal.claim_slot(index, block, place, true, frame.words());
            drop(frame);
            self.note_commit_due(journal);
        }
        tail.note_placed(block, end);
        table.set(block, place);
        Ok(place)
    }

    /// Marks the sectors of a range as present, after their data was written. From now on reads find the data, and the
    /// next commit makes it durable. The blocks of the range have places.
    ///
    /// Returns false if the write must not be acknowledged before a commit, because the marks would be lost with this
    /// process. With [`Durability::FlushOnly`] the result is always true, although the marks would be lost.
    ///
    /// # Errors
    /// The indices of the bitmap sectors that are not in memory. The caller loads them and marks the whole range again.
    #[must_use = "an acknowledged write must survive this process"]
    pub fn mark(&self, range: SectorRange) -> Result<bool, Vec<BitmapSectorIndex>> {
        let (mut is_kept, mut has_new_bits, mut absent) = (true, false, Vec::new());
        if let Some(sparse) = &self.sparse {
            self.ensure_session();
            for (_, part) in sparse.block_size.split_at_blocks(range) {
                sparse.bitmaps.mark(part, &mut absent, |index, frame, bits| {
                    let are_bits_kept = self.make_bits_durable(index, frame, &bits);
                    frame.state.not_journaled = !are_bits_kept;
                    (is_kept, has_new_bits) = (is_kept & are_bits_kept, true);
                    // A bitmap sector with a journal slot counts as dirty, since only a commit ends the slot.
                    if bits.is_newer || frame.state.journal_slot.is_some() {
                        self.note_dirty(index, &mut frame.state);
                    }
                });
            }
        }
        self.note_unsynced();
        if has_new_bits && let Some(Err(e)) = self.session().map(Session::renew_each_second) {
            log::warn!(
                "{}: a write is committed before it is acknowledged, as the stamp could not be renewed: {}",
                self.path().display(),
                e.line()
            );
            is_kept = false;
        }
        #[cfg(feature = "mutants")]
        self.mutate_metadata();
        if absent.is_empty() { Ok(is_kept) } else { Err(absent) }
    }

    /// Records that the contents of the disk are about to change.
    #[inline]
    pub fn note_content_change(&self) {
        // Usually set already, and a load is cheaper than a store to a cache line that all queues share.
        if !self.content_changed.load(Ordering::Relaxed) {
            self.content_changed.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn session(&self) -> Option<&Session> {
        match &self.durability {
            DurabilityState::Session(session) => Some(session),
            DurabilityState::Commit | DurabilityState::FlushOnly => None,
        }
    }

    /// The live journal, if it records marks.
    #[inline]
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.session()?.journal()
    }

    /// Records new bits in the live journal, if any. Returns whether the write may be acknowledged before a commit.
    pub(super) fn make_bits_durable(
        &self,
        index: BitmapSectorIndex,
        frame: &mut LockedFrame<'_>,
        bits: &NewBits,
    ) -> bool {
        let session = match &self.durability {
            DurabilityState::FlushOnly => return true,
            DurabilityState::Commit => return false,
            DurabilityState::Session(_) if mutant::enabled(Mutant::NoJournal) => return true,
            DurabilityState::Session(session) => session,
        };
        let Some(journal) = session.journal() else { return false };
        if frame.state.journal_slot.is_none() {
            let (block, place, _) = self.bitmap_sector_place(index);
            frame.state.journal_slot = journal.claim_slot(index, block, place, frame.state.unplaced, frame.words());
            self.note_commit_due(journal);
        }
        let Some(slot) = frame.state.journal_slot else { return false };
        journal.set_bits(slot, bits.bit, bits.count);
        session.check_journal(journal)
    }

    pub(super) fn note_commit_due(&self, journal: &Journal) {
        if journal.is_commit_due() {
            self.commit_due.store(true, Ordering::Relaxed);
        }
    }

    /// Records that the next commit must sync, although no bit changed: an overwrite, or a punch in present sectors.
    pub fn note_unsynced(&self) {
        // Usually set already, and a load is cheaper than a store to a cache line that all queues share.
        if !self.unsynced.load(Ordering::SeqCst) {
            self.unsynced.store(true, Ordering::SeqCst);
        }
    }

    /// Sets the reporter of the image's events. Only the first call has an effect.
    pub fn report_events_to(&self, events: EventReporter) {
        let _ = self.events.set(events);
    }

    /// Refuses all further writes until the image is opened again. The first reason is kept, also in the live journal.
    pub fn poison(&self, why: &str) {
        if self.poison.set(why.to_owned()).is_ok() {
            log::error!(
                "{}: {why}; writes are refused until the image is opened again. Check it first",
                self.path().display()
            );
            if let Some(Ok(mut tail)) = self.sparse.as_ref().map(|sparse| sparse.free_tail.try_lock()) {
                self.begin_session(&mut tail);
            }
            if let Some(journal) = self.session().and_then(Session::any_journal) {
                journal.poison(why);
            }
            if let Some(events) = self.events.get() {
                events.report(DiskEvent::Poisoned { path: self.path().to_path_buf(), reason: why.to_owned() });
            }
        }
    }

    /// Refuses all further writes and commits of this process. Nothing is lost, so the journal is not poisoned, and the
    /// next process may replay it.
    pub fn refuse_writes(&self, why: &str) {
        if self.refusal.set(why.to_owned()).is_ok() {
            log::error!("{}: {why}; writes are refused until the image is opened again", self.path().display());
            if let Some(events) = self.events.get() {
                events.report(DiskEvent::Poisoned { path: self.path().to_path_buf(), reason: why.to_owned() });
            }
        }
    }

    /// Whether the image is poisoned, or refuses writes for another reason.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.poison.get().is_some() || self.refusal.get().is_some()
    }

    /// Fails if the image is poisoned, or refuses writes for another reason.
    ///
    /// # Errors
    /// `Poisoned`, with the first reason.
    pub fn check_poison(&self) -> Result<()> {
        match self.poison.get().or(self.refusal.get()) {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Poisoned, why.clone()).at_path(self.path())),
        }
    }

    /// Why the image is poisoned; `None` if it is not. The reason given to [`Writable::refuse_writes`] does not count.
    pub(super) fn poison_reason(&self) -> Option<&str> {
        self.poison.get().map(String::as_str)
    }

    /// Encodes the footer, which is the same at both ends of the file.
    pub fn footer_bytes(&self) -> [u8; SECTOR_BYTES] {
        self.image.footer().encode()
    }

    /// Locks the free tail.
    pub(super) fn free_tail(&self) -> MutexGuard<'_, FreeTail> {
        lock(&self.sparse().free_tail)
    }

    /// Locks the list of dirty bitmap sectors.
    pub(super) fn dirty(&self) -> MutexGuard<'_, Vec<BitmapSectorIndex>> {
        lock(&self.dirty)
    }

    /// Records a bitmap sector as dirty. The caller holds the lock of its frame.
    pub(super) fn note_dirty(&self, index: BitmapSectorIndex, state: &mut FrameState) {
        if !std::mem::replace(&mut state.dirty, true) {
            let mut dirty = self.dirty();
            dirty.push(index);
            if dirty.len() >= (self.sparse().bitmaps.max_frames() / 2).max(MIN_DIRTY_LIMIT) {
                self.commit_due.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Byte offset of a bitmap sector in the file. Its block has a place.
    pub fn bitmap_sector_offset(&self, index: BitmapSectorIndex) -> u64 {
        self.bitmap_sector_place(index).2
    }

    /// The block of a bitmap sector, the place of the block, and the byte offset of the bitmap sector in the file.
    pub(super) fn bitmap_sector_place(&self, index: BitmapSectorIndex) -> (BlockIndex, BlockPlace, u64) {
        let (block, sector) = self.sparse().bitmaps.block_of(index);
        let place =
            self.image.bat().and_then(|t| t.place(block)).expect("the block of a bitmap sector in use has a place");
        (block, place, (place.sector() + u64::from(sector)).byte_offset())
    }

    pub(super) fn sparse(&self) -> &WritableSparse {
        self.sparse.as_ref().expect("a fixed image has no blocks")
    }
}

/// Locks a mutex even after a panic of a holder: no holder can panic between two changes that belong together.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, feature = "sim"))]
#[path = "writable_tests.rs"]
mod tests;
