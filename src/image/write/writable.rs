//! The one image of a chain that takes writes: reserve, mark, and what commits and growth need of it.
//!
//! The life of a write: [`Writable::reserve`] gives the block a place (in memory), the data goes there,
//! [`Writable::mark`] makes its sectors visible to reads of this process, and a [`Commit`](crate::image::Commit) tells the file.
//!
//! Does not order durable writes (`commit.rs`), nor make room (`growth.rs`), nor look at parents.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::allocation::Allocation;
use super::bitmap::bitmaps::{Bitmaps, NewBits};
use super::bitmap::frame::{FrameState, LockedFrame};
use super::durability::{Durability, DurabilityState};
use super::free_tail::{FreeTail, stamp_sector_from};
use super::journal::{JOURNAL_SLOTS, Journal};
use super::journal_replay::ReplaySlot;
use super::recover::{WritableSparse, recover};
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout;
use crate::image::mtime::SavedMtime;
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::storage::{AllocationMode, Env, File};
use crate::units::{SECTOR, SECTOR_BYTES, SectorRange};

/// Dirty granules that are never too many: as many as the journal has slots.
const MIN_DIRTY_LIMIT: usize = JOURNAL_SLOTS as usize;

/// An image open for writing, shared by all queues of its disk.
pub struct Writable {
    image: Image,
    pub(super) sparse: Option<WritableSparse>,
    /// Data or punches completed that no sync covers yet. Set at open: what a predecessor left in the page cache counts.
    pub(super) unsynced: AtomicBool,
    /// Granules that say more than the file does.
    dirty: Mutex<Vec<usize>>,
    poison: OnceLock<String>,
    pub(super) durability: DurabilityState,
    /// The journal is running full, or memory with what is dirty: a commit should begin.
    commit_due: AtomicBool,
    /// What its file system promises about room, and how new blocks take it.
    pub(super) room_rule: AllocationMode,
    pub(super) allocation: OnceLock<Allocation>,
    /// The time of the file when it was opened, and whether the disk's contents may have changed since.
    pub(super) mtime_at_open: SavedMtime,
    pub(super) content_changed: AtomicBool,
}

/// There is no prepared room for the block: the write waits for growth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeedsGrowth;

impl Writable {
    /// Makes an opened image writable that is locked already, and recovers what an unclean end left behind.
    ///
    /// Recovery (crash-safety 3.5): what a killed predecessor's live journal says is taken in; the trailing footer is
    /// written where it is missing; and everything between the last block and the footer is made durably zero, as stale
    /// bytes there would be taken for bitmaps of later blocks.
    ///
    /// # Errors
    /// `Refused` where its own bytes forbid writing (hidden, saved state, footers that disagree) or where a live journal
    /// does not fit it; `Poisoned` where a predecessor's sync failed; `Io`.
    pub fn new(env: &dyn Env, image: Image, keep: &Durability) -> Result<Writable> {
        image.check_writable()?;
        let opened = SavedMtime::save(image.file())?;
        let (keep, found) = DurabilityState::begin(env, &image, keep)?;
        let stamped = matches!(&keep, DurabilityState::Session(session) if session.is_stamped());
        let sparse = match image.block_size() {
            None => None,
            Some(block_size) => Some(recover(&image, block_size, &found, stamped)?),
        };
        opened.restore_at_open()?;
        let (unsynced, due) = (AtomicBool::new(!mutant::enabled(Mutant::CleanAtOpen)), AtomicBool::new(false));
        let (dirty, poison, changed) = (Mutex::default(), OnceLock::new(), AtomicBool::new(!found.is_empty()));
        let (room_rule, allocation) = (image.file().allocation_mode(), OnceLock::new());
        let image = Writable {
            image,
            sparse,
            unsynced,
            dirty,
            poison,
            durability: keep,
            commit_due: due,
            room_rule,
            allocation,
            mtime_at_open: opened,
            content_changed: changed,
        };
        if let Some(session) = image.session() {
            session.renew_after_replay(image.image())?;
        }
        image.replay(&found);
        Ok(image)
    }

    /// Takes in the marks of a killed predecessor; the places of their blocks are known already.
    fn replay(&self, found: &[ReplaySlot]) {
        let (Some(sparse), Some(journal)) = (&self.sparse, self.journal()) else { return };
        for f in found {
            let mut granule = sparse.bitmaps.replay(f.bitmap_sector, &f.words);
            // Of two slots for one granule the first goes on, with the bits of both; the commit frees the other.
            journal.add_bits(*granule.state.journal_slot.get_or_insert(f.slot), &f.words);
            self.note_dirty(f.bitmap_sector, &mut granule.state);
        }
        if !found.is_empty() {
            log::info!("{}: {} marks of a killed predecessor taken in", self.path().display(), found.len());
        }
    }

    /// What it is.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Its file.
    pub fn file(&self) -> &File {
        self.image.file()
    }

    /// The path of its file.
    pub fn path(&self) -> &Path {
        self.image.file().path()
    }

    /// The bitmaps; `None` for a fixed image, which is present everywhere.
    #[inline]
    pub fn bitmaps(&self) -> Option<&Bitmaps> {
        self.sparse.as_ref().map(|s| &s.bitmaps)
    }

    /// The place of a block, a new one if it has none: a file sector, where its bitmap begins. Never waits and makes no
    /// system call; safe to repeat.
    ///
    /// # Errors
    /// [`NeedsGrowth`] where the prepared tail is used up.
    pub fn reserve(&self, block: u32) -> Result<u32, NeedsGrowth> {
        let table = self.image.bat().expect("only images with a table reserve");
        if let Some(place) = table.place(block) {
            return Ok(place);
        }
        let sparse = self.sparse();
        let mut room = lock(&sparse.free_tail);
        if let Some(place) = table.place(block) {
            return Ok(place); // another queue was faster
        }
        let place = layout::next_place(room.next, sparse.block_size, room.unplaced).map_err(|_| NeedsGrowth)?;
        let end = u64::from(place) + u64::from(sparse.block_size.stride_sectors());
        if end > room.usable_end() {
            return Err(NeedsGrowth);
        }
        self.begin_session(&mut room);
        sparse.bitmaps.insert_fresh(block, sparse.fresh);
        if let Some(journal) = self.journal() {
            // Not needed for safety (marks bring the place along), but a block that is known after a kill is no leak, and an
            // entry that a killed commit leaves in the table is accounted for.
            let granule = sparse.bitmaps.first_sector_of(block);
            let mut made = sparse.bitmaps.lock_resident(granule);
            made.state.journal_slot = journal.claim_slot(granule, block, place, true, made.words());
            drop(made);
            self.note_commit_due(journal);
        }
        room.note_placed(block, end);
        table.set(block, place);
        Ok(place)
    }

    /// Says that the data of a range is in its final place: from here on reads find it, and the next commit makes it
    /// durable. Blocks of the range have places.
    ///
    /// False where only a commit makes it outlive this process: the write must not be answered before.
    ///
    /// # Errors
    /// The granules that were not in memory. All others are marked; load these, and mark the whole range again.
    #[must_use = "a write that is answered must outlive the process"]
    pub fn mark(&self, range: SectorRange) -> Result<bool, Vec<usize>> {
        let (mut kept, mut news_kept, mut absent) = (true, false, Vec::new());
        if let Some(sparse) = &self.sparse {
            self.ensure_session();
            for (_, part) in sparse.block_size.split_at_blocks(range) {
                sparse.bitmaps.mark(part, &mut absent, |index, granule, news| {
                    let keeps = self.make_bits_durable(index, granule, &news);
                    granule.state.not_journaled = !keeps;
                    (kept, news_kept) = (kept & keeps, true);
                    // A slot in use belongs to a dirty granule.
                    if news.is_newer || granule.state.journal_slot.is_some() {
                        self.note_dirty(index, &mut granule.state);
                    }
                });
            }
        }
        self.note_unsynced();
        if news_kept && let Some(Err(e)) = self.session().map(Session::renew_each_second) {
            log::warn!("{}: a commit has to do what the live journal cannot: {}", self.path().display(), e.line());
            kept = false;
        }
        #[cfg(feature = "mutants")]
        self.mutate_metadata();
        if absent.is_empty() { Ok(kept) } else { Err(absent) }
    }

    /// Notes that the disk's contents are going to change.
    #[inline]
    pub fn note_content_change(&self) {
        // Mostly set already: a look is cheaper than a store to a line that all queues share.
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

    /// The journal, if marks go to it.
    #[inline]
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.session()?.journal()
    }

    /// Begins the session if it has not begun; `room` is that of the image.
    ///
    /// The stamp goes into the gap before the footer. If there is none, stamp and footer go behind the footer, which stays
    /// where it is until the next step of growth wipes it, or the end of the session.
    pub(super) fn begin_session(&self, room: &mut FreeTail) {
        let Some(session) = self.session().filter(|session| !session.is_begun()) else { return };
        let Some(stamp) = session.prepared_stamp(self.image()) else { return };
        let old = room.footer;
        if old > room.next {
            // A failure is told by `begin`.
            let _ = session.begin(stamp, old - 1, None, false);
            return self.record_poison_in_journal();
        }
        let at = stamp_sector_from(old + 2, old);
        match session.begin(stamp, at, Some(&self.footer_bytes()), false) {
            Ok(()) => {
                room.stale.push(old);
                room.footer = at + 1;
            }
            Err(_) => self.truncate_after_footer(old),
        }
        self.record_poison_in_journal();
    }

    /// Notes in the journal of a session that has just begun that the image was poisoned meanwhile: there was no journal to note
    /// it in.
    fn record_poison_in_journal(&self) {
        if let (Err(e), Some(journal)) = (self.check_poison(), self.session().and_then(Session::any_journal)) {
            journal.poison(&e.line());
        }
    }

    /// Begins the session, if it has not begun, before something is marked.
    #[inline]
    pub(super) fn ensure_session(&self) {
        if self.session().is_some_and(|session| !session.is_begun()) {
            self.begin_session(&mut self.free_tail());
        }
    }

    /// Puts new bits of a granule where they outlive the process; false where a commit has to.
    pub(super) fn make_bits_durable(&self, index: usize, granule: &mut LockedFrame<'_>, news: &NewBits) -> bool {
        let session = match &self.durability {
            DurabilityState::FlushOnly => return true,
            DurabilityState::Commit => return false,
            DurabilityState::Session(_) if mutant::enabled(Mutant::NoJournal) => return true,
            DurabilityState::Session(session) => session,
        };
        let Some(journal) = session.journal() else { return false };
        if granule.state.journal_slot.is_none() {
            let (block, place, _) = self.bitmap_sector_place(index);
            granule.state.journal_slot =
                journal.claim_slot(index, block, place, granule.state.unplaced, granule.words());
            self.note_commit_due(journal);
        }
        let Some(slot) = granule.state.journal_slot else { return false };
        journal.set_bits(slot, news.bit, news.count);
        session.check_journal(journal)
    }

    /// The folder of its live journal, or in which it will be; `None` if it has none.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.session().and_then(Session::folder)
    }

    /// Cuts the file behind the footer at a sector, after a longer end could not be written.
    fn truncate_after_footer(&self, footer: u64) {
        if let Err(e) = self.file().set_len((footer + 1) * SECTOR) {
            self.poison(&format!("the end of the file is unknown ({})", e.line()));
        }
    }

    pub(super) fn note_commit_due(&self, journal: &Journal) {
        if journal.is_commit_due() {
            self.commit_due.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the journal is running full, or memory with what is dirty, and no commit has begun since: true once.
    #[inline]
    pub fn take_commit_due(&self) -> bool {
        self.commit_due.load(Ordering::Relaxed) && self.commit_due.swap(false, Ordering::Relaxed)
    }

    /// Whether a commit would have anything to do.
    pub fn is_dirty(&self) -> bool {
        self.unsynced.load(Ordering::SeqCst) || !self.dirty().is_empty()
    }

    /// Says that bytes changed that no bit speaks for (a punch in present sectors).
    pub fn note_unsynced(&self) {
        // Mostly set already: a look is cheaper than a store to a line that all queues share.
        if !self.unsynced.load(Ordering::SeqCst) {
            self.unsynced.store(true, Ordering::SeqCst);
        }
    }

    /// Refuses further writes until the image is opened anew. The first reason stays.
    pub fn poison(&self, why: &str) {
        if self.poison.set(why.to_owned()).is_ok() {
            log::error!("{}: {why}; writes are refused until it is opened and checked", self.path().display());
            if let Some(Ok(mut room)) = self.sparse.as_ref().map(|sparse| sparse.free_tail.try_lock()) {
                self.begin_session(&mut room);
            }
            if let Some(journal) = self.session().and_then(Session::any_journal) {
                journal.poison(why);
            }
        }
    }

    /// Whether it was poisoned.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.poison.get().is_some()
    }

    /// # Errors
    /// `Poisoned`, with the first reason.
    pub fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Poisoned, why.clone()).at_path(self.path())),
        }
    }

    /// The footer as it stands at both ends.
    pub fn footer_bytes(&self) -> [u8; SECTOR_BYTES] {
        self.image.footer().encode()
    }

    pub(super) fn free_tail(&self) -> MutexGuard<'_, FreeTail> {
        lock(&self.sparse().free_tail)
    }

    pub(super) fn dirty(&self) -> MutexGuard<'_, Vec<usize>> {
        lock(&self.dirty)
    }

    /// Notes a granule as dirty.
    pub(super) fn note_dirty(&self, granule: usize, known: &mut FrameState) {
        if !std::mem::replace(&mut known.dirty, true) {
            let mut dirty = self.dirty();
            dirty.push(granule);
            if dirty.len() >= (self.sparse().bitmaps.max_frames() / 2).max(MIN_DIRTY_LIMIT) {
                self.commit_due.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Where in the file a granule's sector is, in bytes. Its block has a place.
    pub fn bitmap_sector_offset(&self, granule: usize) -> u64 {
        self.bitmap_sector_place(granule).2
    }

    /// The block of a granule, the block's place, and the byte offset of the granule's sector.
    pub(super) fn bitmap_sector_place(&self, granule: usize) -> (u32, u32, u64) {
        let (block, sector) = self.sparse().bitmaps.block_of(granule);
        let place = self.image.bat().and_then(|t| t.place(block)).expect("a dirty granule's block has a place");
        (block, place, (u64::from(place) + u64::from(sector)) * SECTOR)
    }

    pub(super) fn sparse(&self) -> &WritableSparse {
        self.sparse.as_ref().expect("a fixed image has no blocks")
    }
}

/// A lock whose holders leave sound state behind even when they panic: each change is one assignment or insertion.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, feature = "sim"))]
#[path = "writable_tests.rs"]
mod tests;
