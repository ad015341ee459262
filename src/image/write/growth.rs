//! Growth: extends the free tail of an image, where new blocks go.
//!
//! ```text
//!   | headers | blocks .......... | free tail, durably zero ...... | stamp | footer |
//!                                 ^ next                           ^ end   ^ end + 1
//! ```
//!
//! The sector before the footer is reserved for the stamp of a session (session.rs).
//!
//! The bitmap of a new block must not contain stale bytes, which would be set bits. And both footers must be valid at
//! every moment. So the file grows as follows, outside of guest requests (crash-safety 4):
//!
//! 1. Reserve space on the file system for some of the new blocks ([`Allocation`]). If the file system is full, free
//!    the reserved space, halve the reservation, and try again.
//! 2. Write stamp and footer at the new end, which extends the file: one write within one page, so a kill leaves both
//!    or neither.
//! 3. Make the footer durable. From now on it is the trailing footer.
//! 4. Write zeros over the old stamp and footer.
//! 5. Make the zeros durable.
//! 6. Use the new space.
//!
//! If 1 fails, the file keeps its old end. If 2 fails, the file is truncated to its old end. If 4 fails, the old stamp
//! is already out of date: the file keeps its new end, and the next step of growth skips 2 and 3. If 3 or 5 fails, the
//! image is poisoned.
//!
//! 3 and 5 repeat the write as a write-through. A sync would also wait for all data that the guest has written
//! meanwhile (p99 of 68 ms with sequential writes of 1 MiB into an empty child). The space between the two ends was
//! never written, so it reads as zeros without a sync. On two kinds of file systems, 3 and 5 are syncs. With copy on
//! write, a write-through that fails for lack of space would look like a failed sync, which poisons the image. If other
//! machines use the file system, the stamp must be durable as well, and the write-through of 3 contains only the
//! footer.
//!
//! A crash between 2 and 5 leaves the new footer, or the old one, or both. On ext4 it may also leave a length without
//! the new footer, as ext4 updates the length while it writes back. The next open then uses the footer at the start,
//! and recovery writes the trailing footer. New space is used only after 5, as a dynamic root relies on zeros there.
//!
//! No space is reserved before the first block needs a place. Most steps only reserve space, and need no sync.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::allocation::{Allocation, Reservation};
use super::free_tail::{FreeTail, stamp_sector_from};
use super::growth_error::{growth_error, is_no_space, is_too_large};
use super::job_step::JobStep;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::image::bat::next_places;
use crate::mutant::{self, Mutant};
use crate::storage::{Buffer, FileSlot, Op, Payload};
use crate::units::{FileSector, SECTOR_BYTES};

/// A step of growth in progress.
pub struct Growth {
    image: Arc<Writable>,
    slot: FileSlot,
    phase: GrowthPhase,
    /// End of the free tail before the step.
    old_end: FileSector,
    /// Number of blocks by which the step extends the file.
    blocks: u64,
    /// Maximum number of blocks whose space the step reserves.
    wanted: u64,
    /// Minimum number of blocks for which the step must make space.
    least: u64,
    /// Number of blocks without a place when the step began.
    unplaced: u64,
    /// File sector for the next block when the step began.
    next: FileSector,
    /// File sector before which space was reserved when the step began.
    reserved: FileSector,
    reservation: Option<Reservation>,
    /// Whether whole blocks are reserved although the allocation is sparse.
    whole: bool,
    /// Whether the free tail is long enough, so that the step only reserves space in it.
    is_within: bool,
    /// End of the free tail that an earlier step has written before it failed: this step skips 2 and 3.
    moved_end: Option<FileSector>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum GrowthPhase {
    Start,
    /// Makes durable the second footer, which was written with the stamp when the session began.
    SyncSessionFooter,
    Allocate,
    SyncFooter,
    Wipe,
    SyncWipe,
    Done,
}

impl Growth {
    /// Begins a step if the free tail is short and no step is in progress. `slot` is the image's file.
    pub fn begin(image: &Arc<Writable>, slot: FileSlot) -> Option<Growth> {
        let mut tail = image.free_tail();
        if tail.growing || !image.is_short(&tail) {
            return None;
        }
        Some(Growth::start(image, slot, &mut tail, 1))
    }

    /// Begins a step that fails unless it makes space for `blocks` more blocks. Returns `None` if the free tail has
    /// space for them, or if a step is in progress.
    pub fn begin_for(image: &Arc<Writable>, slot: FileSlot, blocks: u64) -> Option<Growth> {
        let block_size = image.image().block_size()?; // a fixed image does not grow
        let mut tail = image.free_tail();
        let blocks = blocks.min(tail.unplaced);
        let fits = next_places(tail.next, block_size, tail.unplaced)
            .zip(0..blocks)
            .all(|(place, _)| place.end <= tail.usable_end());
        if tail.growing || blocks == 0 || fits {
            return None;
        }
        Some(Growth::start(image, slot, &mut tail, blocks))
    }

    fn start(image: &Arc<Writable>, slot: FileSlot, tail: &mut FreeTail, least: u64) -> Growth {
        tail.growing = true;
        let FreeTail { end: old, unplaced, next, reserved, .. } = *tail;
        let blocks = image.step_blocks(tail).max(least).min(unplaced);
        let wanted = image.reserved_blocks(tail).max(least).min(unplaced);
        let moved = image.end_after(old, least, unplaced).filter(|end| tail.footer > *end).map(|_| tail.footer - 1);
        let mut growth = Growth {
            image: image.clone(),
            slot,
            phase: GrowthPhase::Start,
            old_end: old,
            blocks,
            wanted,
            least,
            unplaced,
            next,
            reserved,
            reservation: None,
            whole: image.writes_whole_blocks(tail),
            is_within: false,
            moved_end: moved,
        };
        growth.is_within = least > 0 && growth.unreserved(old, least).count() as u64 == least;
        growth
    }

    /// Returns at most `most` places of next blocks, before file sector `end`, whose space is not reserved yet.
    fn unreserved(&self, end: FileSector, most: u64) -> impl Iterator<Item = Range<FileSector>> + use<> {
        let (reserved, block_size) = (self.reserved, self.image.image().block_size().expect("it has blocks"));
        let all = next_places(self.next, block_size, self.unplaced).take_while(move |place| place.end <= end);
        all.skip_while(move |place| place.end <= reserved).zip(0..most).map(|(place, _)| place)
    }

    /// Runs the next step of the job. `failed` is the first failure among the operations of the previous step.
    ///
    /// # Errors
    /// - `NoSpace` if there is no space for the blocks that the step must place, `Io` if a write failed or no BAT entry
    ///   can refer to the new space: the file is valid, and growth may be tried again;
    /// - `Poisoned` if a sync failed.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        let step = self.advance(failed, ops);
        let syncs = matches!(
            (&step, self.phase),
            (Ok(JobStep::Wait), GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter | GrowthPhase::SyncWipe)
        );
        // `syncing` is updated after a failure has poisoned the image: a commit that reads it as false sees the poison.
        self.image.free_tail().syncing = syncs;
        match step {
            Ok(JobStep::Wait) => Ok(JobStep::Wait),
            finished => {
                self.phase = GrowthPhase::Done;
                self.image.free_tail().growing = false;
                finished
            }
        }
    }

    /// Runs the transition from the present phase.
    fn advance(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        match (self.phase, failed) {
            (GrowthPhase::Start, _) => {
                if self.blocks == 0 || (!self.is_within && self.end().is_none()) {
                    let why = "the file cannot grow: a block table cannot refer to places beyond 2 TiB";
                    return Err(Error::new(ErrorKind::Io, why).at_path(self.image.path()));
                }
                // If this step fails, it truncates the file after the session's footer. That footer must be durable
                // first, so that the truncation cannot make a length without a footer durable.
                let is_footer_durable = self.image.free_tail().stale.is_empty();
                match is_footer_durable {
                    true => self.allocate(ops),
                    false => self.push_writes(GrowthPhase::SyncSessionFooter, ops),
                }
            }
            (GrowthPhase::Allocate, Some(e)) if is_no_space(&e) || is_too_large(&e) => {
                self.release_reserved()?;
                if !self.halve(is_too_large(&e)) {
                    return Err(self.failure(e));
                }
                self.allocate(ops);
            }
            (GrowthPhase::Allocate, Some(e)) if e.kind() != io::ErrorKind::Unsupported => {
                return Err(Error::io("cannot reserve space", e).at_path(self.image.path()));
            }
            (GrowthPhase::Allocate, None) if self.reservation.as_mut().is_some_and(|r| r.push_next(self.slot, ops)) => {
            }
            (GrowthPhase::Allocate, _) if self.is_within => return Ok(self.finish()),
            (GrowthPhase::Allocate, _) if self.moved_end.is_some() => self.push_writes(GrowthPhase::Wipe, ops),
            (GrowthPhase::Allocate, _) => {
                if mutant::enabled(Mutant::LengthFirst) {
                    self.image.file().set_len((self.end().expect("checked at the start") + 1).byte_offset())?;
                }
                match self.write_new_end() {
                    Ok(()) => self.push_writes(GrowthPhase::SyncFooter, ops),
                    // A file system may accept a reservation beyond its file size limit, and refuse the write.
                    Err(e)
                        if e.raw_os_error() == Some(libc::EFBIG) && !self.image.is_poisoned() && self.halve(true) =>
                    {
                        self.allocate(ops);
                    }
                    Err(e) => return Err(e),
                }
            }
            // The kernel may report a failure of this sync to a commit's concurrent sync, which then poisons the image.
            (GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter | GrowthPhase::SyncWipe, None)
                if self.image.is_poisoned() =>
            {
                self.image.check_poison()?;
            }
            (GrowthPhase::SyncSessionFooter, None) => self.allocate(ops),
            (GrowthPhase::SyncFooter, None) => self.push_writes(GrowthPhase::Wipe, ops),
            (GrowthPhase::Wipe, None) => self.push_writes(GrowthPhase::SyncWipe, ops),
            (GrowthPhase::SyncWipe, None) => return Ok(self.finish()),
            (GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter | GrowthPhase::SyncWipe, Some(e)) => {
                let why = format!("a sync failed ({e}) while the file grew");
                self.image.poison(&why);
                return Err(Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(e));
            }
            (GrowthPhase::Wipe, Some(e)) => {
                if mutant::enabled(Mutant::UndoCutsStamp) {
                    return Err(self.undo(e));
                }
                return Err(self.failure(e));
            }
            (GrowthPhase::Done, _) => unreachable!("finished growth is not called again"),
        }
        Ok(JobStep::Wait)
    }

    /// Reduces a step that failed for lack of space. If `extension` is false, first replaces the reservation of whole
    /// blocks by one of bitmaps. Otherwise halves the number of reserved blocks, and also the extension of the file if
    /// `extension` is true or the allocation is by block. Returns whether the step is still large enough.
    fn halve(&mut self, extension: bool) -> bool {
        if !extension && std::mem::take(&mut self.whole) {
            return true;
        }
        if extension || self.image.allocation() == Allocation::Block {
            self.blocks /= 2;
            self.wanted = self.wanted.min(self.blocks);
        } else {
            self.wanted /= 2;
        }
        self.wanted >= self.least.max(1)
    }

    /// Pushes the reservations of the step.
    fn allocate(&mut self, ops: &mut Vec<Op>) {
        let block_size = self.image.image().block_size().expect("it has blocks");
        // The sectors of stamp and footer at the new end; empty if the file is not extended.
        let ends = match self.is_within {
            true => self.old_end..self.old_end,
            false => {
                let end = self.end().expect("checked at the start");
                let at = self.moved_end.unwrap_or_else(|| stamp_sector_from(end, self.image.free_tail().footer));
                at..at + 2
            }
        };
        let places = self.unreserved(ends.start, self.wanted);
        let mut reservation = match self.image.allocation() {
            Allocation::Block => Reservation::whole(self.reserved, places, ends),
            Allocation::Sparse if self.whole => Reservation::blocks(places, ends),
            Allocation::Sparse => Reservation::bitmaps(places, block_size, ends),
        };
        reservation.push_next(self.slot, ops);
        self.reservation = Some(reservation);
        self.phase = GrowthPhase::Allocate;
    }

    /// End of the free tail after the step.
    fn end(&self) -> Option<FileSector> {
        self.moved_end.or_else(|| self.image.end_after(self.old_end, self.blocks, self.unplaced))
    }

    /// Makes the new space available.
    fn finish(&self) -> JobStep {
        let mut tail = self.image.free_tail();
        if !self.is_within {
            tail.end = tail.footer - 1;
            tail.stale.clear();
            tail.steps += 1;
        }
        tail.reserved = self.unreserved(tail.end, self.wanted).last().map_or(self.reserved, |place| place.end);
        tail.reservations += 1;
        JobStep::Done
    }

    /// Writes stamp and footer at the new end, synchronously. The lock of the free tail excludes a session that begins
    /// on another queue, which also writes both.
    fn write_new_end(&mut self) -> Result<()> {
        let mut tail = self.image.free_tail();
        let end = self.end().expect("checked at the start");
        let (at, old) = (stamp_sector_from(end, tail.footer), tail.footer);
        if let Err(e) = self.image.write_new_end(at) {
            drop(tail);
            let source = e.raw_os_error().map_or_else(|| io::Error::other(e.line()), io::Error::from_raw_os_error);
            return Err(self.undo(source));
        }
        // If a block ends at the old footer, no stamp precedes that footer.
        let stamp = (old > tail.end).then(|| old - 1);
        tail.stale.extend(stamp.into_iter().chain([old]));
        tail.footer = at + 1;
        Ok(())
    }

    /// Pushes the write of the newest footer, or of zeros over the old stamps and footers. In a sync phase this is a
    /// write-through, or a sync of the file if `is_growth_by_sync` requires it. The zeros are first written without
    /// write-through, so that a full file system does not look like a failed sync.
    fn push_writes(&mut self, phase: GrowthPhase, ops: &mut Vec<Op>) {
        let through = match phase {
            GrowthPhase::SyncSessionFooter => true,
            GrowthPhase::SyncFooter => !mutant::enabled(Mutant::GrowUnsynced),
            GrowthPhase::SyncWipe => !mutant::enabled(Mutant::WipeUnsynced),
            GrowthPhase::Wipe | GrowthPhase::Start | GrowthPhase::Allocate | GrowthPhase::Done => false,
        };
        self.phase = phase;
        if through && self.image.is_growth_by_sync() {
            return ops.push(Op::sync(0, self.slot));
        }
        let write = if through { Op::write_through } else { Op::write };
        let tail = self.image.free_tail();
        let footer = Buffer::copy_of(&self.image.footer_bytes());
        if matches!(phase, GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter) {
            return ops.push(write(0, self.slot, tail.footer.byte_offset(), Payload::Own(footer)));
        }
        for run in tail.stale.chunk_by(|a, b| *a + 1 == *b) {
            let bytes = match mutant::enabled(Mutant::NoWipe) {
                true => footer.repeat(run.len()),
                false => vec![0; run.len() * SECTOR_BYTES],
            };
            ops.push(write(0, self.slot, run[0].byte_offset(), Payload::Own(Buffer::copy_of(&bytes))));
        }
    }

    /// Frees the space of a failed reservation, which ext4 keeps until the file is truncated to its present length.
    fn release_reserved(&self) -> Result<()> {
        // The length is read and set under the lock, as a session that begins on another queue extends the file.
        let _tail = self.image.free_tail();
        self.image.file().set_len(self.image.file().stat()?.len)
    }

    /// Truncates the file after the old footer, as the new end could not be written. No sync precedes that, as a sync
    /// could make a length without a footer durable. Poisons the image if the undo fails.
    fn undo(&mut self, source: io::Error) -> Error {
        let file = self.image.file();
        let mut tail = self.image.free_tail();
        // While `syncing` is set, commits repeat their syncs: a failure may be reported to the sync below alone.
        tail.syncing = true;
        let mut back = Ok(());
        if mutant::enabled(Mutant::UndoCutsStamp) && self.phase == GrowthPhase::Wipe {
            tail.footer = self.old_end;
            back = file.write_at(&self.image.footer_bytes(), tail.footer.byte_offset());
        }
        // The file is truncated under the lock, as a session that begins on another queue moves the footer.
        let back = back.and_then(|()| file.set_len((tail.footer + 1).byte_offset()));
        drop(tail);
        if let Err(e) = back.and_then(|()| file.sync()) {
            self.image.poison(&format!("growth failed ({source}) and could not be undone ({})", e.line()));
        }
        self.failure(source)
    }

    /// Returns the error of a step that failed with `source`. After a lack of space the next step is small again.
    fn failure(&self, source: io::Error) -> Error {
        if is_no_space(&source) {
            let mut tail = self.image.free_tail();
            (tail.steps, tail.reservations) = (0, 0);
        }
        growth_error(self.image.path(), source)
    }
}

impl Drop for Growth {
    /// Poisons the image if the step is abandoned in the middle: the end of the file is unknown.
    fn drop(&mut self) {
        if self.phase != GrowthPhase::Done {
            self.image.poison("growth of the file was abandoned");
        }
    }
}

#[cfg(all(test, feature = "sim"))]
#[path = "growth_tests.rs"]
mod tests;
