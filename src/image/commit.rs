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

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat;
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, FileSlot, Op, Payload};
use crate::units::{SECTOR, SECTOR_BYTES};

/// What a job wants after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobStep {
    /// Carry out the operations it pushed, all of them, then ask again.
    Wait,
    /// It is over.
    Done,
}

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

impl Drop for Commit {
    /// What an abandoned commit covered would never be written: nothing more may be acknowledged.
    fn drop(&mut self) {
        if !matches!(self.phase, CommitPhase::Start | CommitPhase::Finished) {
            self.image.poison("a commit was abandoned");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::image::{Durability, Image, ImageKind, ImageSpec, ParentLink, create};
    use crate::storage::host::Host;
    use crate::storage::{Access, Env};
    use crate::units::{BlockSize, SectorRange};

    const SLOT: FileSlot = FileSlot(3);

    /// A writable image of 8 MiB with room to write, nothing written.
    fn image(folder: &Path, kind: ImageKind) -> Arc<Writable> {
        let path = folder.join("a.vhd");
        create(&Host, &path, &ImageSpec { kind, size: 8 << 20, block_size: BlockSize::DEFAULT, reserve: 0 }).unwrap();
        reopen(&path)
    }

    fn reopen(path: &Path) -> Arc<Writable> {
        let image = Image::open(Host.open(path, Access::Write).unwrap()).unwrap();
        let image = Arc::new(Writable::new(&Host, image, &Durability::FlushOnly).unwrap());
        if let Some(mut growth) = super::super::Growth::begin(&image, SLOT) {
            super::super::run_to_completion(&Host, image.file(), SLOT, |failed, ops| growth.next(failed, ops)).unwrap();
        }
        image
    }

    fn child() -> ImageKind {
        let uuid = uuid::Uuid::from_u128(7);
        ImageKind::Differencing(ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() })
    }

    /// Carries out a commit step by step; what each step did, in a letter an operation.
    fn steps(commit: &mut Commit, image: &Writable) -> Vec<String> {
        let (mut all, mut ops) = (Vec::new(), Vec::new());
        while commit.next(None, &mut ops).unwrap() == JobStep::Wait {
            all.push(ops.iter().map(|op| if op.action == Action::Sync { 'S' } else { 'W' }).collect());
            for op in ops.drain(..) {
                if let Payload::Own(bytes) = op.payload {
                    image.file().write_at(&bytes, op.offset).unwrap();
                }
            }
        }
        all
    }

    fn write(image: &Writable, from: u64, to: u64) {
        let block = BlockSize::DEFAULT.block_at(from);
        image.reserve(block).unwrap();
        assert_eq!(image.mark(SectorRange::between(from, to)), Ok(true));
    }

    fn commit(image: &Arc<Writable>) -> (Vec<String>, u32) {
        let mut commit = Commit::new(image.clone(), SLOT);
        (steps(&mut commit, image), commit.barriers())
    }

    #[test]
    fn a_child_needs_two_barriers_for_new_bits_and_one_for_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), child());
        assert_eq!(commit(&image).1, 1, "the first commit covers what a predecessor left in the page cache");
        assert_eq!(commit(&image), (vec![], 0), "nothing written");
        write(&image, 0, 8);
        write(&image, 9000, 9008);
        let want = vec!["S".to_owned(), "WWW".to_owned(), "S".to_owned()];
        assert_eq!(commit(&image), (want, 2), "two bitmaps and one sector of the table");
        write(&image, 0, 8);
        assert_eq!(commit(&image), (vec!["S".to_owned()], 1), "an overwrite");
        write(&image, 8, 16);
        assert_eq!(
            commit(&image),
            (vec!["S".into(), "W".into(), "S".into()], 2),
            "new bits in a block that has a place"
        );
    }

    #[test]
    fn a_dynamic_root_needs_one_barrier_for_new_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), ImageKind::Dynamic);
        commit(&image);
        write(&image, 5000, 5001);
        assert_eq!(commit(&image), (vec!["WW".to_owned(), "S".to_owned()], 1));
        let (path, mut bitmap) = (image.path().to_path_buf(), [0; 512]);
        let place = image.image().bat().unwrap().place(1).unwrap();
        image.file().read_at(&mut bitmap, u64::from(place) * SECTOR).unwrap();
        assert_eq!(bitmap, [0xFF; 512], "readers that ignore bitmaps see the same");
        drop(image);
        assert_eq!(reopen(&path).image().bat().unwrap().place(1), Some(place));
    }

    #[test]
    fn bits_that_come_while_the_first_sync_runs_wait_for_the_next_commit() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), child());
        commit(&image);
        write(&image, 0, 8);
        let (mut running, mut ops) = (Commit::new(image.clone(), SLOT), Vec::new());
        assert_eq!(running.next(None, &mut ops).unwrap(), JobStep::Wait);
        write(&image, 8, 16);
        write(&image, 5000, 5001);
        ops.clear();
        running.next(None, &mut ops).unwrap();
        let Payload::Own(bitmap) = &ops[0].payload else { panic!("a bitmap first") };
        assert_eq!(bitmap[..3], [0xFF, 0, 0], "only what was complete at the start");
        let Payload::Own(table) = &ops[1].payload else { panic!("then the table") };
        assert!(table[..4] != [0xFF; 4] && table[4..8] == [0xFF; 4], "block 1 has no place in the file yet");
        ops.clear();
        running.next(None, &mut ops).unwrap();
        assert_eq!(running.next(None, &mut ops).unwrap(), JobStep::Done);
        assert_eq!(commit(&image).1, 2, "the next commit has the rest");
    }

    #[test]
    fn a_failed_pointer_write_is_tried_again_and_a_failed_sync_never() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), child());
        commit(&image);
        write(&image, 0, 8);
        let (mut first, mut ops) = (Commit::new(image.clone(), SLOT), Vec::new());
        first.next(None, &mut ops).unwrap();
        first.next(None, &mut ops).unwrap();
        let eio = || io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(first.next(Some(eio()), &mut ops).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(commit(&image).1, 2, "everything again, from the first sync");
        write(&image, 0, 8);
        let mut second = Commit::new(image.clone(), SLOT);
        second.next(None, &mut ops).unwrap();
        assert_eq!(second.next(Some(eio()), &mut ops).unwrap_err().kind(), ErrorKind::Poisoned);
        let third = Commit::new(image.clone(), SLOT).next(None, &mut ops).unwrap_err();
        assert_eq!(third.kind(), ErrorKind::Poisoned, "{}", third.line());
    }
}
