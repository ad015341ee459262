//! Room for new blocks: the prepared tail, and how it grows.
//!
//! ```text
//!   | headers | blocks .......... | durably zero tail ............ | stamp | footer |
//!                                 ^ next                           ^ end   ^ end + 1
//! ```
//!
//! The sector before the footer is never given out: the stamp of a session goes there (session.rs).
//!
//! A new block's bitmap must never inherit bytes (they would be taken for set bits), and both footers must be valid at
//! every moment. So the file grows in steps, away from the guest's path (crash-safety 3.5):
//!
//! 1. reserve room on the host for some of the blocks ([`Allocation`]); if that fails for want of space, give back what it
//!    got and halve the reservation;
//! 2. write stamp and footer at the new end (this extends the file), in one call within one page: no kill comes between;
//! 3. make the footer durable: from here it is the trailing one;
//! 4. write zeros over the old stamp and footer;
//! 5. make them durable: from here their places are as zero as the rest;
//! 6. hand out the room.
//!
//! A step that fails before 3 is undone. One that fails later is not, as the old stamp is out of date by then: the file keeps
//! its new end, and the next step only wipes what is left of the old one.
//!
//! 3 and 5 write the same sector again, through to the medium, instead of a sync: that would wait for all that the guest
//! has written meanwhile, and the guest for it (1 MiB writes in order into a fresh child: p99 of 68 ms by syncs). The room
//! between needs none: it was never written, so it reads as zeros.
//!
//! Between 2 and 5 a crash leaves one footer at the end or both; on ext4, sometimes, a length without the new one (it notes how
//! far its write-back has come as the file's length): then the footer at the start counts, and recovery writes the other.
//! Room is handed out only after 5, since a dynamic root trusts it to be zero without a further barrier.
//!
//! Nothing is reserved before the first block needs a place. Most steps only reserve, in a tail that is long enough, and
//! need no sync. On a file system that copies on write, 3 and 5 are syncs: a write through that
//! fails for want of room could not be told from a failed sync, which poisons.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::allocation::{Allocation, Reservation};
use super::free_tail::{FreeTail, stamp_sector_from};
use super::job_step::JobStep;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::image::bat::next_places;
use crate::mutant::{self, Mutant};
use crate::storage::{AllocationMode, Buffer, FileSlot, Op, Payload};
use crate::units::{SECTOR, SECTOR_BYTES};

/// One step of growth under way.
pub struct Growth {
    image: Arc<Writable>,
    slot: FileSlot,
    phase: GrowthPhase,
    /// Where the room ended before.
    old_end: u64,
    /// Blocks by which the file becomes longer.
    blocks: u64,
    /// Blocks whose room is reserved on the host, at most.
    wanted: u64,
    /// And at least, if the host has no room for all.
    least: u64,
    /// Blocks without a place when it began.
    unplaced: u64,
    /// Where the next block goes, and before which sector room was reserved, when it began.
    next: u64,
    reserved: u64,
    reservation: Option<Reservation>,
    /// Whether a sparse file gets whole blocks.
    whole: bool,
    /// Whether the file is long enough: room is only reserved in it.
    is_within: bool,
    /// The end that an earlier step has written, which could not wipe the one before.
    moved_end: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum GrowthPhase {
    Start,
    /// The footer that came with the stamp when the session began becomes durable.
    SyncSessionFooter,
    Allocate,
    SyncFooter,
    Wipe,
    SyncWipe,
    Done,
}

impl Growth {
    /// Begins a step if room is short and none is under way. `slot` is the image's file.
    pub fn begin(image: &Arc<Writable>, slot: FileSlot) -> Option<Growth> {
        let mut room = image.free_tail();
        if room.growing || !image.is_short(&room) {
            return None;
        }
        Some(Growth::of(image, slot, &mut room, 1))
    }

    /// Begins a step that makes room for so many more blocks, or fails; `None` where there is room for them, or a step is
    /// under way.
    pub fn begin_for(image: &Arc<Writable>, slot: FileSlot, blocks: u64) -> Option<Growth> {
        let block_size = image.image().block_size()?; // a fixed image has all its room
        let mut room = image.free_tail();
        let blocks = blocks.min(room.unplaced);
        let fits = next_places(room.next, block_size, room.unplaced)
            .zip(0..blocks)
            .all(|(place, _)| place.end <= room.usable_end());
        if room.growing || blocks == 0 || fits {
            return None;
        }
        Some(Growth::of(image, slot, &mut room, blocks))
    }

    fn of(image: &Arc<Writable>, slot: FileSlot, room: &mut FreeTail, least: u64) -> Growth {
        room.growing = true;
        let FreeTail { end: old, unplaced, next, reserved, .. } = *room;
        let blocks = image.step_blocks(room).max(least).min(unplaced);
        let wanted = image.reserved_blocks(room).max(least).min(unplaced);
        let end = image.end_after(old, least, unplaced);
        let moved = Some(room.footer.saturating_sub(1)).filter(|moved| end.is_some_and(|end| *moved >= end));
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
            whole: image.writes_whole_blocks(room),
            is_within: false,
            moved_end: moved,
        };
        growth.is_within = least > 0 && growth.unreserved(old, least).count() as u64 == least;
        growth
    }

    /// The places of the next blocks, before file sector `end`, that lack room on the host; at most so many.
    fn unreserved(&self, end: u64, most: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (reserved, block_size) = (self.reserved, self.image.image().block_size().expect("it has blocks"));
        let all = next_places(self.next, block_size, self.unplaced).take_while(move |place| place.end <= end);
        all.skip_while(move |place| place.end <= reserved).zip(0..most).map(|(place, _)| place)
    }

    /// The next step. `failed` is the first failure among the operations of the last one.
    ///
    /// # Errors
    /// `NoSpace` where the host has no room for even a block, `Io` where a write failed: the file is as valid as before
    /// and growth may be tried again; `Poisoned` where making it durable failed.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        let step = self.advance(failed, ops);
        let syncs = matches!(
            (&step, self.phase),
            (Ok(JobStep::Wait), GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter | GrowthPhase::SyncWipe)
        );
        // After a failure has poisoned the image: a commit that sees no sync any more must see that.
        self.image.free_tail().syncing = syncs;
        match step {
            Ok(JobStep::Wait) => Ok(JobStep::Wait),
            over => {
                self.phase = GrowthPhase::Done;
                self.image.free_tail().growing = false;
                over
            }
        }
    }

    fn advance(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<JobStep> {
        match (self.phase, failed) {
            (GrowthPhase::Start, _) => {
                if self.blocks == 0 || (!self.is_within && self.end().is_none()) {
                    let why = "the file cannot grow: a block table names no place beyond 2 TiB";
                    return Err(Error::new(ErrorKind::Io, why).at_path(self.image.path()));
                }
                // Whatever cuts the file back to this footer must not make a length durable that has none.
                let is_sealed = self.image.free_tail().stale.is_empty();
                match is_sealed {
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
                return Err(Error::io("cannot reserve room", e).at_path(self.image.path()));
            }
            (GrowthPhase::Allocate, None) if self.reservation.as_mut().is_some_and(|r| r.push_next(self.slot, ops)) => {
            }
            (GrowthPhase::Allocate, _) if self.is_within => return Ok(self.finish()),
            (GrowthPhase::Allocate, _) if self.moved_end.is_some() => self.push_writes(GrowthPhase::Wipe, ops),
            (GrowthPhase::Allocate, _) => {
                if mutant::enabled(Mutant::LengthFirst) {
                    let at = self.end().expect("checked at the start") * SECTOR;
                    self.image.file().set_len(at + SECTOR)?;
                }
                match self.write_new_end() {
                    Ok(()) => self.push_writes(GrowthPhase::SyncFooter, ops),
                    // A file system takes a reservation beyond the limit of a file's size, and then refuses the write.
                    Err(e)
                        if e.raw_os_error() == Some(libc::EFBIG) && !self.image.is_poisoned() && self.halve(true) =>
                    {
                        self.allocate(ops);
                    }
                    Err(e) => return Err(e),
                }
            }
            // A commit's sync may have been told of a failure that concerns ours, too.
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
            (GrowthPhase::Done, _) => unreachable!("growth that is over is not asked again"),
        }
        Ok(JobStep::Wait)
    }

    /// Makes the step smaller: what it reserves, or also the file. Whether that is still enough.
    fn halve(&mut self, file: bool) -> bool {
        if !file && std::mem::take(&mut self.whole) {
            return true;
        }
        if file || self.image.allocation() == Allocation::Block {
            self.blocks /= 2;
            self.wanted = self.wanted.min(self.blocks);
        } else {
            self.wanted /= 2;
        }
        self.wanted >= self.least.max(1)
    }

    fn allocate(&mut self, ops: &mut Vec<Op>) {
        let block_size = self.image.image().block_size().expect("it has blocks");
        // Stamp and footer at the new end, if there is one.
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

    /// The end of the room that the step makes.
    fn end(&self) -> Option<u64> {
        self.moved_end.or_else(|| self.image.end_after(self.old_end, self.blocks, self.unplaced))
    }

    /// The room is there.
    fn finish(&self) -> JobStep {
        let mut room = self.image.free_tail();
        if !self.is_within {
            room.end = room.footer - 1;
            room.stale.clear();
            room.steps += 1;
        }
        room.reserved = self.unreserved(room.end, self.wanted).last().map_or(self.reserved, |place| place.end);
        room.reservations += 1;
        JobStep::Done
    }

    /// Writes stamp and footer at the new end. Nothing else of this image writes either meanwhile, so this is a plain call.
    fn write_new_end(&mut self) -> Result<()> {
        let mut room = self.image.free_tail();
        let end = self.end().expect("checked at the start");
        let (at, old) = (stamp_sector_from(end, room.footer), room.footer);
        if let Err(e) = self.image.write_new_end(at) {
            drop(room);
            let source = e.raw_os_error().map_or_else(|| io::Error::other(e.line()), io::Error::from_raw_os_error);
            return Err(self.undo(source));
        }
        // A footer right behind a block has no stamp before it.
        let first = if old > room.end { old - 1 } else { old };
        room.stale.extend(first..=old);
        room.footer = at + 1;
        Ok(())
    }

    /// The new footer, or zeros over the old ends: the latter first plainly, so that a full host is no failed sync, then
    /// through.
    fn push_writes(&mut self, phase: GrowthPhase, ops: &mut Vec<Op>) {
        let through = match phase {
            GrowthPhase::SyncSessionFooter => true,
            GrowthPhase::SyncFooter => !mutant::enabled(Mutant::GrowUnsynced),
            GrowthPhase::SyncWipe => !mutant::enabled(Mutant::WipeUnsynced),
            GrowthPhase::Wipe | GrowthPhase::Start | GrowthPhase::Allocate | GrowthPhase::Done => false,
        };
        self.phase = phase;
        if through && self.image.room_rule == AllocationMode::CopyOnWrite {
            return ops.push(Op::sync(0, self.slot));
        }
        let write = if through { Op::write_through } else { Op::write };
        let room = self.image.free_tail();
        let footer = Buffer::copy_of(&self.image.footer_bytes());
        if matches!(phase, GrowthPhase::SyncSessionFooter | GrowthPhase::SyncFooter) {
            return ops.push(write(0, self.slot, room.footer * SECTOR, Payload::Own(footer)));
        }
        for run in room.stale.chunk_by(|a, b| a + 1 == *b) {
            let bytes = match mutant::enabled(Mutant::NoWipe) {
                true => footer.repeat(run.len()),
                false => vec![0; run.len() * SECTOR_BYTES],
            };
            ops.push(write(0, self.slot, run[0] * SECTOR, Payload::Own(Buffer::copy_of(&bytes))));
        }
    }

    /// Gives back what a failed fallocate got and ext4 keeps, by cutting the file to its present length.
    fn release_reserved(&self) -> Result<()> {
        // Under the lock: a session that begins on another queue makes the file longer.
        let _room = self.image.free_tail();
        self.image.file().set_len(self.image.file().stat()?.len)
    }

    /// The new end could not be written, and may be half there: cuts the file behind the old footer, without a sync before
    /// that, which would make a length durable that has no footer. If that fails, the image takes no further writes.
    fn undo(&mut self, source: io::Error) -> Error {
        let file = self.image.file();
        let mut room = self.image.free_tail();
        // This sync, too, may be told of a failure that concerns a commit.
        room.syncing = true;
        let mut back = Ok(());
        if mutant::enabled(Mutant::UndoCutsStamp) && self.phase == GrowthPhase::Wipe {
            room.footer = self.old_end;
            back = file.write_at(&self.image.footer_bytes(), room.footer * SECTOR);
        }
        // Under the lock: a session that began meanwhile has moved the footer.
        let back = back.and_then(|()| file.set_len((room.footer + 1) * SECTOR));
        drop(room);
        if let Err(e) = back.and_then(|()| file.sync()) {
            self.image.poison(&format!("growth failed ({source}) and could not be undone ({})", e.line()));
        }
        self.failure(source)
    }

    /// The error of a step for which there is no room, or that failed.
    fn failure(&self, source: io::Error) -> Error {
        if is_too_large(&source) {
            let why = "the file cannot grow beyond the limit of the process (ulimit -f) or of the file system";
            return Error::io(why, source).at_path(self.image.path());
        }
        if !is_no_space(&source) {
            return Error::io("cannot grow", source).at_path(self.image.path());
        }
        let mut room = self.image.free_tail();
        (room.steps, room.reservations) = (0, 0);
        drop(room);
        Error::new(ErrorKind::NoSpace, "no room for another block; free space on the host's file system")
            .at_path(self.image.path())
            .caused_by(source)
    }
}

impl Drop for Growth {
    /// Where the file stands is unknown if a step is abandoned: nothing may be written behind it.
    fn drop(&mut self) {
        if self.phase != GrowthPhase::Done {
            self.image.poison("growth of the file was abandoned");
        }
    }
}

fn is_no_space(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether a file may not become that large. Waiting does not help, as it does on a full host.
fn is_too_large(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::FileTooLarge
}

#[cfg(all(test, feature = "sim"))]
#[path = "growth_tests.rs"]
mod tests;
