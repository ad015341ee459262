//! Commit: writes marks and places to the file, in the order that makes them safe.
//!
//! ```text
//!   S = dirty bitmap sectors of completed writes, and those BAT entries of their blocks that are not in the file
//!   C1  sync             only if S has an ordered bitmap sector, whose bits must not be written before their data
//!   C2  write the bitmap sectors and the BAT sectors of S, all at once, in any order
//!       renew the generation of the stamp, if there is a live journal (session.rs)
//!   C3  sync             also makes overwrites durable, which are not in S
//! ```
//!
//! Why this order is safe (crash-safety 5):
//!
//! - Before C1 no pointer in the file refers to new data.
//! - Between C1 and C3 a crash may leave any subset of the pointers. A bit without its BAT entry cannot be reached. A
//!   BAT entry without its bits means that the sectors are absent, as the space was durably zero before the block got
//!   it. Both together refer to data that is durable since C1 or, in a new block of a dynamic root, to data or zeros.
//! - Pointers change only from unused to used, and from clear to set. So each sector of a torn page is valid.
//! - S is copied *before* C1, so a bit that is set during C1 is not written in C2.
//! - The journal slots of S are ended after C3, by one store.
//!
//! Number of syncs: 0 if nothing was written, 1 for overwrites and for new blocks of a dynamic root, 2 for all other
//! new bits. The first commit after an open syncs in any case. A sync is repeated if growth syncs at the same time.
//!
//! A failed sync poisons the image: the kernel may have dropped the pages, and the next sync would succeed without
//! them. After a failed write in C2, S is dirty again, and the next commit starts at C1.

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
use crate::format::bat::{self, BlockPlace};
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, FileSlot, Op, Payload};
use crate::units::{BitmapSectorIndex, BlockIndex, SECTOR, SECTOR_BYTES};

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

/// A copy of a bitmap sector from the start of the commit.
struct SectorSnapshot {
    index: BitmapSectorIndex,
    bytes: [u8; SECTOR_BYTES],
}

/// A commit in progress. An image has at most one at a time (`disk/group_commit`).
pub struct Commit {
    image: Arc<Writable>,
    slot: FileSlot,
    phase: CommitPhase,
    snapshots: Vec<SectorSnapshot>,
    barriers: u32,
    /// Journal epoch of this commit. If the commit succeeds, the journal slots of this epoch and of earlier epochs end,
    /// except slots whose bitmap sector is not in the snapshot. 0 without a live journal.
    epoch: u64,
}

impl Commit {
    /// Creates a commit of all writes that have completed when `next` is first called. `slot` is the image's file.
    pub fn new(image: Arc<Writable>, slot: FileSlot) -> Commit {
        Commit { image, slot, phase: CommitPhase::Start, snapshots: Vec::new(), barriers: 0, epoch: 0 }
    }

    /// Number of syncs so far.
    pub fn barriers(&self) -> u32 {
        self.barriers
    }

    /// Runs the next step. `failed` is the first failure among the operations of the previous step.
    ///
    /// # Errors
    /// The commit has failed, and no flush that waits for it may be acknowledged:
    ///
    /// - `Poisoned` if a sync failed, now or before;
    /// - `NoSpace`, `Io`: the next commit writes everything again.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        if let Some(source) = failed {
            return Err(self.fail(source));
        }
        // `syncing` is read before the poison, as growth whose sync fails poisons the image before it clears `syncing`.
        let growth_syncs = self.image.is_growth_syncing();
        self.image.check_poison()?;
        match self.phase {
            CommitPhase::Start => Ok(self.start(ops)),
            // The kernel reports a write-back failure to only one of two concurrent syncs of a file. While growth
            // syncs, the success of this sync proves nothing, so it is repeated. Once growth has ended, either the
            // image is poisoned or the sync of growth has succeeded.
            CommitPhase::SyncData | CommitPhase::SyncPointers if growth_syncs => {
                self.sync(self.phase, ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::SyncData => {
                self.push_pointers(ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::WritePointers => {
                // The generation is renewed before the new bits are durable, so that the journal does not fit a copy of
                // the image that lacks these bits.
                if let Err(e) = self.image.renew_generation() {
                    return Err(self.fail_stamp(e));
                }
                self.sync(CommitPhase::SyncPointers, ops);
                Ok(JobStep::Wait)
            }
            CommitPhase::SyncPointers => {
                let indices: Vec<_> = self.snapshots.iter().map(|snapshot| snapshot.index).collect();
                self.image.finish_commit(self.epoch, Some(&indices));
                self.image.erase_stamp_of_lost_journal();
                self.phase = CommitPhase::Finished;
                Ok(JobStep::Done)
            }
            CommitPhase::Finished => unreachable!("a finished commit is not called again"),
        }
    }

    /// Takes the snapshot S, and begins with C1, C2 or C3.
    fn start(&mut self, ops: &mut Vec<Op>) -> JobStep {
        // `unsynced` is cleared before the copies are made, since a write that completes later needs a sync in the next
        // commit.
        let unsynced = self.image.unsynced.swap(false, Ordering::SeqCst);
        let dirty = std::mem::take(&mut *self.image.dirty());
        self.epoch = self.image.begin_commit(&dirty);
        let mut ordered = false;
        for index in dirty {
            let mut frame = self.image.lock_dirty(index);
            ordered |= frame.is_ordered() && !mutant::enabled(Mutant::OneBarrier);
            self.snapshots.push(SectorSnapshot { index, bytes: frame.snapshot() });
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

    /// Pushes the sync of C1 or C3.
    fn sync(&mut self, phase: CommitPhase, ops: &mut Vec<Op>) {
        let missing =
            phase == CommitPhase::SyncPointers && !self.snapshots.is_empty() && mutant::enabled(Mutant::NoLastSync);
        let nothing = Op::range(0, self.slot, Action::Allocate, 0, SECTOR);
        ops.push(if missing { nothing } else { Op::sync(0, self.slot) });
        self.barriers += 1;
        self.phase = phase;
    }

    /// C2: pushes the writes of the copied bitmap sectors, and of the BAT sectors with the places of their blocks.
    fn push_pointers(&mut self, ops: &mut Vec<Op>) {
        let mut placing: BTreeMap<u32, Vec<BlockIndex>> = BTreeMap::new();
        for snapshot in &self.snapshots {
            let (block, _, at) = self.image.bitmap_sector_place(snapshot.index);
            let current =
                mutant::enabled(Mutant::CurrentBits).then(|| self.image.lock_dirty(snapshot.index).to_bytes());
            let bytes = current.as_ref().unwrap_or(&snapshot.bytes);
            ops.push(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(bytes))));
            placing.entry(bat::sector_of(block)).or_default().push(block);
        }
        for (sector, blocks) in placing {
            if let Some((at, bytes)) = self.image.bat_sector(sector, &blocks) {
                ops.push(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(&bytes))));
            }
        }
        self.phase = CommitPhase::WritePointers;
    }

    /// Ends a failed commit: its bitmap sectors become dirty again. Returns the phase in which it failed.
    fn return_snapshots(&mut self) -> CommitPhase {
        let phase = std::mem::replace(&mut self.phase, CommitPhase::Finished);
        self.image.unsynced.store(true, Ordering::SeqCst);
        self.image.finish_commit(self.epoch, None);
        for snapshot in self.snapshots.drain(..) {
            self.image.note_dirty_again(snapshot.index);
        }
        phase
    }

    /// Ends a commit whose stamp could not be written. The image is not poisoned: the next commit starts at C1.
    fn fail_stamp(&mut self, e: Error) -> Error {
        self.return_snapshots();
        e
    }

    /// Ends a commit after an operation failed. Poisons the image if the operation was a sync.
    fn fail(&mut self, source: io::Error) -> Error {
        match self.return_snapshots() {
            CommitPhase::WritePointers => {
                Error::io("cannot write bitmaps and block table", source).at_path(self.image.path())
            }
            _ if mutant::enabled(Mutant::RetrySync) => Error::io("a sync failed", source).at_path(self.image.path()),
            _ => {
                let why = format!("a sync failed ({source}): writes since the last flush may be lost");
                self.image.poison(&why);
                Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(source)
            }
        }
    }
}

impl Writable {
    /// Clears the flag that a commit should begin, and returns whether it was set. The flag is set when the journal is
    /// nearly full or too many bitmap sectors are dirty.
    #[inline]
    pub fn take_commit_due(&self) -> bool {
        self.commit_due.load(Ordering::Relaxed) && self.commit_due.swap(false, Ordering::Relaxed)
    }

    /// Whether a commit would have to write or sync.
    pub fn is_dirty(&self) -> bool {
        self.unsynced.load(Ordering::SeqCst) || !self.dirty().is_empty()
    }

    /// Locks a bitmap sector that is dirty or in the running commit.
    pub(super) fn lock_dirty(&self, index: BitmapSectorIndex) -> LockedFrame<'_> {
        self.sparse().bitmaps.lock_resident(index)
    }

    /// Records a bitmap sector of a failed commit as dirty again.
    fn note_dirty_again(&self, index: BitmapSectorIndex) {
        let mut frame = self.lock_dirty(index);
        frame.state.in_commit = false;
        self.note_dirty(index, &mut frame.state);
    }

    /// Returns sector `sector` of the BAT with the entries that are in the file and those of `blocks`, and its byte
    /// offset. Returns `None` if the entries of all `blocks` are in the file.
    pub(super) fn bat_sector(&self, sector: u32, blocks: &[BlockIndex]) -> Option<(u64, [u8; SECTOR_BYTES])> {
        let (table, tail) = (self.image().bat()?, self.free_tail());
        if !blocks.iter().any(|block| tail.fresh.contains(block)) {
            return None;
        }
        let mut bytes = [0; SECTOR_BYTES];
        for (block, to) in bat::blocks_of(sector).zip(bytes.as_chunks_mut::<4>().0) {
            let entry = match block.get() < table.len() {
                false => self.image().table_padding(),
                true if tail.fresh.contains(&block) && !blocks.contains(&block) => bat::UNUSED,
                true => table.place(block).map_or(bat::UNUSED, BlockPlace::entry),
            };
            *to = entry.to_be_bytes();
        }
        Some((self.image().table_offset()? + u64::from(sector) * SECTOR, bytes))
    }

    /// Begins a commit of bitmap sectors in the live journal, and returns the journal epoch of the commit; 0 without a
    /// live journal.
    fn begin_commit(&self, indices: &[BitmapSectorIndex]) -> u64 {
        let (Some(sparse), Some(journal)) = (&self.sparse, self.journal()) else { return 0 };
        let tail = self.free_tail();
        let blocks = indices.iter().map(|index| sparse.bitmaps.block_of(*index).0);
        let blocks: BTreeSet<BlockIndex> = blocks.filter(|block| tail.fresh.contains(block)).collect();
        // `reserve` claims a journal slot for each block. So a block has none only if all slots were in use, or if a
        // commit with the block failed.
        let has_no_slot = |block: &BlockIndex| {
            let first = sparse.bitmaps.first_sector_of(*block);
            sparse.bitmaps.lock_resident(first).state.journal_slot.is_none()
        };
        let unaccounted = blocks.iter().any(has_no_slot);
        journal.begin_commit(blocks, unaccounted)
    }

    /// Records the end of the commit of `epoch`. `indices` are the bitmap sectors that it wrote; `None` if it failed.
    fn finish_commit(&self, epoch: u64, indices: Option<&[BitmapSectorIndex]>) {
        let Some(sparse) = &self.sparse else { return };
        let Some(indices) = indices else {
            self.journal().into_iter().for_each(Journal::fail_commit);
            return;
        };
        let mut places = Vec::new();
        {
            let mut tail = self.free_tail();
            for index in indices {
                let (block, place, _) = self.bitmap_sector_place(*index);
                if tail.fresh.remove(&block) {
                    places.push((block, place));
                }
            }
        }
        #[cfg(feature = "mutants")]
        self.mutate_places();
        for (block, _) in &places {
            sparse.bitmaps.set_placed(*block);
        }
        indices.iter().for_each(|index| sparse.bitmaps.set_written(*index));
        if let Some(journal) = self.journal() {
            journal.finish_commit(epoch, &places, |slot, index, renew| {
                let Residence::Resident(frame) = sparse.bitmaps.lock(index) else { return false };
                let is_used = frame.state.journal_slot == Some(slot);
                if is_used {
                    renew();
                }
                is_used
            });
        }
    }
}

impl Drop for Commit {
    /// Poisons the image if the commit is abandoned in the middle: its bitmap sectors would never be written.
    fn drop(&mut self) {
        if !matches!(self.phase, CommitPhase::Start | CommitPhase::Finished) {
            self.image.poison("a commit was abandoned");
        }
    }
}

#[cfg(test)]
#[path = "commit_tests.rs"]
mod tests;
