//! Commit: what was written becomes what the file says. The one place that knows the order of durable writes.
//!
//! ```text
//!   S = dirty granules of completed writes, and the places of their blocks that the file does not know
//!   C1  sync             only if S has bits that must not precede their data (an ordered granule)
//!   C2  write bitmap sectors and BAT sectors of S, all at once, in any order
//!       a new generation in the stamp, if a live journal is kept (session.rs)
//!   C3  sync             also covers overwrites, which have nothing in S
//! ```
//!
//! Why this is enough (crash-safety 3.6): before C1 no pointer in the file refers to new data. Between C1 and C3 any
//! subset of the pointers may survive a crash: a bit without its entry is unreachable; an entry without its bits means
//! "ask the parent", as the room was durably zero before it was given out; both mean data that is durable since C1.
//! Pointers only change from unused to used and from clear to set, so a torn page is a mixture of legal sectors.
//! S is copied *before* C1: a bit set while C1 runs is not written in C2. What the live journal says of S is ended only
//! after C3, by one store.
//!
//! Barriers: 0 when nothing was written, 1 for overwrites and for blocks of a dynamic root, 2 for new bits of a child.
//!
//! A failed sync is final: the kernel may have dropped the pages and will say yes the next time, so the image is
//! poisoned. A failed write of C2 is not: S is dirty again, and the next commit starts at C1.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bitmap::bitmaps::Residence;
use super::bitmap::frame::LockedFrame;
use super::job_step::JobStep;
use super::journal::Journal;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat;
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, FileSlot, Op, Payload};
use crate::units::{SECTOR, SECTOR_BYTES};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum CommitPhase {
    Start,
    /// C1 runs.
    SyncData,
    /// C2 runs.
    WritePointers,
    /// C3 runs.
    SyncPointers,
    Finished,
}

/// A granule as it was when the commit began.
struct SectorSnapshot {
    granule: usize,
    bytes: [u8; SECTOR_BYTES],
}

/// One commit under way. At most one an image at a time (`disk/group_commit` sees to it).
pub struct Commit {
    image: Arc<Writable>,
    slot: FileSlot,
    phase: CommitPhase,
    snapshots: Vec<SectorSnapshot>,
    barriers: u32,
    /// Of the live journal.
    epoch: u64,
}

impl Commit {
    /// A commit of all writes that are complete when `next` is first called. `slot` is the image's file.
    pub fn new(image: Arc<Writable>, slot: FileSlot) -> Commit {
        Commit { image, slot, phase: CommitPhase::Start, snapshots: Vec::new(), barriers: 0, epoch: 0 }
    }

    /// Syncs used so far.
    pub fn barriers(&self) -> u32 {
        self.barriers
    }

    /// The next step. `failed` is the first failure among the operations of the last one.
    ///
    /// # Errors
    /// The commit failed and is over; nothing of it may be acknowledged.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        if let Some(source) = failed {
            return Err(self.fail(source));
        }
        // In this order: growth that failed poisons the image before it says that it syncs no more.
        let growth_syncs = self.image.is_growth_syncing();
        self.image.check_poison()?;
        match self.phase {
            CommitPhase::Start => Ok(self.start(ops)),
            // The host tells of a failure once: to one of two syncs that ran side by side. While growth syncs, a yes may hide
            // its no; when it is over, the image is poisoned or the yes was one.
            CommitPhase::SyncData | CommitPhase::SyncPointers if growth_syncs => {
                self.sync(self.phase, ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::SyncData => {
                self.push_pointers(ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::WritePointers => {
                // Before the new bits are durable: a copy of the image that lacks them does not fit the journal any more.
                if let Err(e) = self.image.renew_generation() {
                    return Err(self.fail_stamp(e));
                }
                self.sync(CommitPhase::SyncPointers, ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::SyncPointers => {
                let granules: Vec<usize> = self.snapshots.iter().map(|t| t.granule).collect();
                self.image.finish_commit(self.epoch, Some(&granules));
                self.image.erase_stamp_of_lost_journal();
                self.phase = CommitPhase::Finished;
                Ok(JobStep::Done)
            }
            CommitPhase::Finished => unreachable!("a commit that is over is not asked again"),
        }
    }

    fn start(&mut self, ops: &mut Vec<Op>) -> JobStep {
        // Before the copies are made: a write that completes later owes the next commit a sync.
        let unsynced = self.image.unsynced.swap(false, Ordering::SeqCst);
        let dirty = std::mem::take(&mut *self.image.dirty());
        self.epoch = self.image.begin_commit(&dirty);
        let mut ordered = false;
        for granule in dirty {
            let mut g = self.image.lock_dirty(granule);
            ordered |= g.is_ordered() && !mutant::enabled(Mutant::OneBarrier);
            self.snapshots.push(SectorSnapshot { granule, bytes: g.snapshot() });
        }
        if self.snapshots.is_empty() && !unsynced {
            self.phase = CommitPhase::Finished;
            return JobStep::Done;
        }
        if self.snapshots.is_empty() {
            self.sync(CommitPhase::SyncPointers, ops);
        } else if ordered {
            self.sync(CommitPhase::SyncData, ops);
        } else {
            self.push_pointers(ops);
        }
        JobStep::Wait
    }

    fn sync(&mut self, phase: CommitPhase, ops: &mut Vec<Op>) {
        let missing =
            phase == CommitPhase::SyncPointers && !self.snapshots.is_empty() && mutant::enabled(Mutant::NoLastSync);
        let nothing = Op::range(0, self.slot, Action::Allocate, 0, SECTOR);
        ops.push(if missing { nothing } else { Op::sync(0, self.slot) });
        self.barriers += 1;
        self.phase = phase;
    }

    /// C2: the bitmap sectors as they were at the start, and the BAT sectors with the places of their blocks.
    fn push_pointers(&mut self, ops: &mut Vec<Op>) {
        let mut placing: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for taken in &self.snapshots {
            let (block, place, at) = self.image.bitmap_sector_place(taken.granule);
            let current = mutant::enabled(Mutant::CurrentBits).then(|| self.image.lock_dirty(taken.granule).to_bytes());
            let bytes = current.as_ref().unwrap_or(&taken.bytes);
            ops.push(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(bytes))));
            debug_assert_ne!(place, bat::UNUSED);
            placing.entry(block / bat::ENTRIES_PER_SECTOR).or_default().push(block);
        }
        for (sector, blocks) in placing {
            if let Some((at, bytes)) = self.image.bat_sector(sector, &blocks) {
                ops.push(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(&bytes))));
            }
        }
        self.phase = CommitPhase::WritePointers;
    }

    /// Notes that the commit is over and nothing of it counts. Returns the phase in which it failed.
    fn return_snapshots(&mut self) -> CommitPhase {
        let phase = std::mem::replace(&mut self.phase, CommitPhase::Finished);
        self.image.unsynced.store(true, Ordering::SeqCst);
        self.image.finish_commit(self.epoch, None);
        for taken in self.snapshots.drain(..) {
            self.image.note_dirty_again(taken.granule);
        }
        phase
    }

    /// The stamp could not be written. As after a failed write of C2, the next commit starts at C1.
    fn fail_stamp(&mut self, e: Error) -> Error {
        self.return_snapshots();
        e
    }

    fn fail(&mut self, source: io::Error) -> Error {
        match self.return_snapshots() {
            CommitPhase::WritePointers => {
                Error::io("cannot write bitmaps and block table", source).at_path(self.image.path())
            }
            _ if mutant::enabled(Mutant::RetrySync) => Error::io("a sync failed", source).at_path(self.image.path()),
            _ => {
                let why = format!("a sync failed ({source}): what was written since the last flush may be lost");
                self.image.poison(&why);
                Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(source)
            }
        }
    }
}

impl Writable {
    /// A granule that is dirty, or that a commit has taken.
    pub(super) fn lock_dirty(&self, granule: usize) -> LockedFrame<'_> {
        self.sparse().bitmaps.lock_resident(granule)
    }

    /// Notes a granule that a commit has taken in vain as dirty again.
    pub(super) fn note_dirty_again(&self, granule: usize) {
        let mut taken = self.lock_dirty(granule);
        taken.state.in_commit = false;
        self.note_dirty(granule, &mut taken.state);
    }

    /// Sector `sector` of the block table with what the file knows and the places of `blocks`, and where it goes.
    /// `None` where the file knows the places of all `blocks`.
    pub(super) fn bat_sector(&self, sector: u32, blocks: &[u32]) -> Option<(u64, [u8; SECTOR_BYTES])> {
        let (table, room) = (self.image().bat()?, self.free_tail());
        if !blocks.iter().any(|b| room.fresh.contains(b)) {
            return None;
        }
        let first = sector * bat::ENTRIES_PER_SECTOR;
        let mut bytes = [0; SECTOR_BYTES];
        for (n, to) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let block = first + u32::try_from(n).expect("below 128");
            let entry = match table.len().checked_sub(block) {
                None | Some(0) => self.image().table_padding(),
                Some(_) if room.fresh.contains(&block) && !blocks.contains(&block) => bat::UNUSED,
                Some(_) => table.place(block).unwrap_or(bat::UNUSED),
            };
            *to = entry.to_be_bytes();
        }
        Some((self.image().table_offset()? + u64::from(sector) * SECTOR, bytes))
    }

    /// A commit begins that takes these granules: their blocks are going to be placed. Its epoch.
    pub(super) fn begin_commit(&self, granules: &[usize]) -> u64 {
        let (Some(sparse), Some(journal)) = (&self.sparse, self.journal()) else { return 0 };
        let room = self.free_tail();
        let blocks = granules.iter().map(|g| sparse.bitmaps.block_of(*g).0);
        let blocks: BTreeSet<u32> = blocks.filter(|b| room.fresh.contains(b)).collect();
        // A block has a slot from its reservation on, unless all were taken then.
        let slotless =
            |b: &u32| sparse.bitmaps.lock_resident(sparse.bitmaps.first_sector_of(*b)).state.journal_slot.is_none();
        let unaccounted = blocks.iter().any(slotless);
        journal.begin_commit(blocks, unaccounted)
    }

    /// The commit of `epoch` is over, well or not: in the first case the file knows what it took.
    pub(super) fn finish_commit(&self, epoch: u64, granules: Option<&[usize]>) {
        let Some(sparse) = &self.sparse else { return };
        let Some(granules) = granules else {
            self.journal().into_iter().for_each(Journal::fail_commit);
            return;
        };
        let mut places = Vec::new();
        {
            let mut room = self.free_tail();
            for granule in granules {
                let (block, place, _) = self.bitmap_sector_place(*granule);
                if room.fresh.remove(&block) {
                    places.push((block, place));
                }
            }
        }
        #[cfg(feature = "mutants")]
        self.mutate_places();
        for (block, _) in &places {
            sparse.bitmaps.set_placed(*block);
        }
        granules.iter().for_each(|granule| sparse.bitmaps.set_written(*granule));
        if let Some(journal) = self.journal() {
            journal.finish_commit(epoch, &places, |slot, granule, renew| {
                let Residence::Resident(here) = sparse.bitmaps.lock(granule) else { return false };
                let used = here.state.journal_slot == Some(slot);
                if used {
                    renew();
                }
                used
            });
        }
    }
}

impl Drop for Commit {
    /// What an abandoned commit covered would never be written: nothing more may be acknowledged.
    fn drop(&mut self) {
        if !matches!(self.phase, CommitPhase::Start | CommitPhase::Finished) {
            self.image.poison("a commit was abandoned");
        }
    }
}

#[cfg(test)]
#[path = "commit_tests.rs"]
mod tests;
