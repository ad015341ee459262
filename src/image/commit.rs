//! Commit: what was written becomes what the file says. The one place that knows the order of durable writes.
//!
//! ```text
//!   S = dirty granules of completed writes, and the places of their blocks that the file does not know
//!   C1  sync             only if S has bits that must not precede their data (an ordered granule)
//!   C2  write bitmap sectors and BAT sectors of S, all at once, in any order
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
//! C2 may go in portions ([`Commit::with_hints`]), the host being told in between to begin with what it has: it then writes the
//! first bitmaps while the last are made. A hint is no barrier and needs none: C1 is before all of C2, and C3 behind it.
//!
//! Barriers: 0 when nothing was written, 1 for overwrites and for blocks of a dynamic root, 2 for new bits of a child.
//!
//! A failed sync is final: the kernel may have dropped the pages and will say yes the next time, so the image is
//! poisoned; so it is by a hint that fails in such a way. A failed write of C2 is not final: S is dirty again, and the next
//! commit starts at C1.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat;
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, Op, Payload, Slot, op};
use crate::units::{SECTOR, SECTOR_BYTES};

/// What a job wants after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Carry out the operations it pushed, all of them, then ask again.
    Wait,
    /// It is over.
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Start,
    /// C1 runs.
    Settle,
    /// C2 runs, or a portion of it.
    Point,
    /// Between portions of C2, the host is told to begin with what was written.
    Hint,
    /// C3 runs.
    Seal,
    Over,
}

/// Writes of a portion of C2 at least, and portions at most: a hint costs as much as a few writes.
const PORTION: usize = 8;
const PORTIONS: usize = 4;

/// A granule as it was when the commit began.
struct Taken {
    granule: usize,
    bytes: [u8; SECTOR_BYTES],
}

/// One commit under way. At most one an image at a time (`disk/flush` sees to it).
pub struct Commit {
    image: Arc<Writable>,
    slot: Slot,
    phase: Phase,
    taken: Vec<Taken>,
    hints: bool,
    /// What C2 has yet to write.
    rest: VecDeque<Op>,
    barriers: u32,
    /// Of the live journal.
    epoch: u64,
}

impl Commit {
    /// A commit of all writes that are complete when `next` is first called. `slot` is the image's file.
    pub fn new(image: Arc<Writable>, slot: Slot) -> Commit {
        let (taken, rest) = (Vec::new(), VecDeque::new());
        Commit { image, slot, phase: Phase::Start, taken, hints: false, rest, barriers: 0, epoch: 0 }
    }

    /// Has C2 go in portions; for an engine and a file with which a hint makes nobody wait.
    #[must_use]
    pub fn with_hints(mut self) -> Commit {
        self.hints = true;
        self
    }

    /// Syncs used so far.
    pub fn barriers(&self) -> u32 {
        self.barriers
    }

    /// The next step. `failed` is the first failure among the operations of the last one.
    ///
    /// # Errors
    /// The commit failed and is over; nothing of it may be acknowledged.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<Step> {
        if let Some(source) = failed.filter(|e| self.phase != Phase::Hint || op::is_lost(e)) {
            return Err(self.fail(source));
        }
        // In this order: growth that failed poisons the image before it says that it syncs no more.
        let growth_syncs = self.image.is_growth_syncing();
        self.image.check_poison()?;
        match self.phase {
            Phase::Start => Ok(self.start(ops)),
            // The host tells of a failure once: to one of two syncs that ran side by side. While growth syncs, a yes may hide
            // its no; when it is over, the image is poisoned or the yes was one.
            Phase::Settle | Phase::Seal if growth_syncs => {
                self.sync(self.phase, ops);
                Ok(Step::Wait)
            }
            Phase::Settle => {
                self.point(ops);
                Ok(Step::Wait)
            }
            Phase::Point if self.rest.is_empty() => {
                self.sync(Phase::Seal, ops);
                Ok(Step::Wait)
            }
            Phase::Point => {
                ops.push(Op::write_behind(0, self.slot));
                self.phase = Phase::Hint;
                Ok(Step::Wait)
            }
            Phase::Hint => {
                self.portion(ops);
                Ok(Step::Wait)
            }
            Phase::Seal => {
                let granules: Vec<usize> = self.taken.iter().map(|t| t.granule).collect();
                self.image.committed(self.epoch, Some(&granules));
                self.phase = Phase::Over;
                Ok(Step::Done)
            }
            Phase::Over => unreachable!("a commit that is over is not asked again"),
        }
    }

    fn start(&mut self, ops: &mut Vec<Op>) -> Step {
        // Before the copies are made: a write that completes later owes the next commit a sync.
        let unsynced = self.image.unsynced.swap(false, Ordering::SeqCst);
        let dirty = std::mem::take(&mut *self.image.dirty());
        self.epoch = self.image.committing(&dirty);
        let mut ordered = false;
        for granule in dirty {
            let mut g = self.image.granule(granule);
            ordered |= g.is_ordered() && !mutant::is(Mutant::OneBarrier);
            self.taken.push(Taken { granule, bytes: g.snapshot() });
        }
        if self.taken.is_empty() && !unsynced {
            self.phase = Phase::Over;
            return Step::Done;
        }
        if self.taken.is_empty() {
            self.sync(Phase::Seal, ops);
        } else if ordered {
            self.sync(Phase::Settle, ops);
        } else {
            self.point(ops);
        }
        Step::Wait
    }

    fn sync(&mut self, phase: Phase, ops: &mut Vec<Op>) {
        let missing = phase == Phase::Seal && !self.taken.is_empty() && mutant::is(Mutant::NoLastSync);
        let nothing = Op::range(0, self.slot, Action::Allocate, 0, SECTOR);
        ops.push(if missing { nothing } else { Op::sync(0, self.slot) });
        self.barriers += 1;
        self.phase = phase;
    }

    /// C2: the bitmap sectors as they were at the start, and the BAT sectors with the places of their blocks.
    fn point(&mut self, ops: &mut Vec<Op>) {
        let mut placing: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for taken in &self.taken {
            let (block, place, at) = self.image.bitmap_place(taken.granule);
            let current = mutant::is(Mutant::CurrentBits).then(|| self.image.granule(taken.granule).copy());
            let bytes = current.as_ref().unwrap_or(&taken.bytes);
            self.rest.push_back(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(bytes))));
            debug_assert_ne!(place, bat::UNUSED);
            placing.entry(block / bat::ENTRIES_PER_SECTOR).or_default().push(block);
        }
        for (sector, blocks) in placing {
            if let Some((at, bytes)) = self.image.bat_sector(sector, &blocks) {
                self.rest.push_back(Op::write(0, self.slot, at, Payload::Own(Buffer::copy_of(&bytes))));
            }
        }
        self.portion(ops);
    }

    /// The next portion of C2: all of it, where the host is not told. A rest that is not worth a hint goes with the one before.
    fn portion(&mut self, ops: &mut Vec<Op>) {
        let size = PORTION.max(self.taken.len().div_ceil(PORTIONS));
        let left = self.rest.len();
        let count = if self.hints && left >= size + PORTION / 2 { size } else { left };
        ops.extend(self.rest.drain(..count));
        self.phase = Phase::Point;
    }

    fn fail(&mut self, source: io::Error) -> Error {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        self.image.unsynced.store(true, Ordering::SeqCst);
        self.image.committed(self.epoch, None);
        for taken in self.taken.drain(..) {
            self.image.dirtied(taken.granule);
        }
        match phase {
            Phase::Point => Error::io("cannot write bitmaps and block table", source).at_path(self.image.path()),
            _ if mutant::is(Mutant::RetrySync) => Error::io("a sync failed", source).at_path(self.image.path()),
            _ => {
                let what = if phase == Phase::Hint { "the host could not write" } else { "a sync failed" };
                let why = format!("{what} ({source}): what was written since the last flush may be lost");
                self.image.poison(&why);
                Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(source)
            }
        }
    }
}

impl Drop for Commit {
    /// What an abandoned commit covered would never be written: nothing more may be acknowledged.
    fn drop(&mut self) {
        if !matches!(self.phase, Phase::Start | Phase::Over) {
            self.image.poison("a commit was abandoned");
        }
    }
}

#[cfg(test)]
#[path = "commit_tests.rs"]
mod tests;
