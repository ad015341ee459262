//! Room for new blocks: the prepared tail, and how it grows.
//!
//! ```text
//!   | headers | blocks .......... | durably zero tail ............ | footer |
//!                                 ^ next                           ^ end
//! ```
//!
//! A new block's bitmap must never inherit bytes (they would be taken for set bits), and both footers must be valid at
//! every moment. So the file grows in steps, away from the guest's path (crash-safety 3.5):
//!
//! 1. reserve room on the host ([`Allocation`] says how much); where that fails for want of space, give back
//!    what it got and halve the step;
//! 2. write the footer at the new end (this extends the file);
//! 3. make it durable: from here the new footer is the trailing one;
//! 4. write zeros over the old footer;
//! 5. make them durable: from here the old footer's place is as zero as the rest;
//! 6. hand out the room.
//!
//! 3 and 5 write the same sector again, through to the medium, instead of a sync: that would wait for all that the guest
//! has written meanwhile, and the guest for it (1 MiB writes in order into a fresh child: p99 of 68 ms by syncs). The room
//! between needs none: it was never written, so it reads as zeros whatever becomes of its reservation.
//!
//! Between 2 and 5 a crash leaves one footer at the end or both; on ext4, rarely, a length without the new one (it notes how
//! far its write-back has come as the file's length): then the footer at the start counts, and recovery writes the other.
//! Room is handed out only after 5, since a dynamic root trusts it to be zero without a further barrier.
//!
//! Nothing is reserved before the first block needs a place. A tail that recovery has emptied is zero but not reserved: a
//! step that finds one only reserves in it. On a file system that copies on write, 3 and 5 are syncs: a write through that
//! fails for want of room could not be told from a failed sync, which poisons.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::allocation::{Allocation, Reservation, places};
use super::commit::Step;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::PAGE;
use crate::mutant::{self, Mutant};
use crate::storage::{Buffer, Op, Payload, RoomRule, Slot};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Where the next block goes.
#[derive(Debug)]
pub struct Room {
    /// First file sector after all that is in use.
    pub next: u64,
    /// File sector of the footer: the end of what is durably zero.
    pub end: u64,
    /// File sector before which the host has the room that blocks must find.
    pub reserved: u64,
    /// Blocks that have no place yet.
    pub unplaced: u64,
    /// Blocks whose place the file does not know yet.
    pub fresh: BTreeSet<u32>,
    /// A step is under way.
    pub growing: bool,
    /// A sync of a step is under way.
    pub syncing: bool,
    /// Steps since the image was opened, or since the host was full.
    pub steps: u32,
}

impl Room {
    /// File sector before which a block may go.
    pub fn usable(&self) -> u64 {
        self.end.min(self.reserved)
    }
}

/// One step of growth under way.
pub struct Growth {
    image: Arc<Writable>,
    slot: Slot,
    phase: Phase,
    /// File sector of the footer before.
    old: u64,
    /// Blocks that the step makes room for.
    blocks: u64,
    /// And at least, where the host has no room for all.
    least: u64,
    /// Blocks without a place when it began.
    unplaced: u64,
    /// Where the next block goes, and before which sector room was reserved, when it began.
    next: u64,
    reserved: u64,
    /// What is being reserved.
    reservation: Option<Reservation>,
    /// Only room before the footer is reserved: up to this file sector.
    within: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Start,
    Allocate,
    Footer,
    SealFooter,
    Wipe,
    SealWipe,
    Over,
}

impl Growth {
    /// Begins a step if room is short and none is under way. `slot` is the image's file.
    pub fn begin(image: &Arc<Writable>, slot: Slot) -> Option<Growth> {
        let mut room = image.room();
        if room.growing || !image.is_short(&room) {
            return None;
        }
        let blocks = image.step_blocks(&room).min(room.unplaced);
        Some(Growth::of(image, slot, &mut room, blocks, 1))
    }

    /// Begins a step that makes room for so many more blocks, or fails; `None` where there is room for them, or a step is
    /// under way.
    pub fn begin_for(image: &Arc<Writable>, slot: Slot, blocks: u64) -> Option<Growth> {
        image.bitmaps()?; // a fixed image has all its room
        let mut room = image.room();
        let blocks = blocks.min(room.unplaced);
        let fits = image.end_after(room.next, blocks, room.unplaced).is_some_and(|end| end <= room.usable());
        if room.growing || blocks == 0 || fits {
            return None;
        }
        Some(Growth::of(image, slot, &mut room, blocks, blocks))
    }

    fn of(image: &Arc<Writable>, slot: Slot, room: &mut Room, blocks: u64, least: u64) -> Growth {
        room.growing = true;
        let Room { end: old, unplaced, next, reserved, .. } = *room;
        let (image, phase, reservation) = (image.clone(), Phase::Start, None);
        let mut growth =
            Growth { image, slot, phase, old, blocks, least, unplaced, next, reserved, reservation, within: None };
        let least = usize::try_from(least).unwrap_or(usize::MAX);
        let is_inside = least > 0 && growth.unreserved(old).take(least).count() == least;
        growth.within = is_inside.then_some(old);
        growth
    }

    /// The places of the next blocks, before file sector `end`, that lack room on the host.
    fn unreserved(&self, end: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (reserved, block_size) = (self.reserved, self.image.image().block_size().expect("it has blocks"));
        let all = places(self.next, block_size, self.unplaced).take_while(move |place| place.end <= end);
        all.skip_while(move |place| place.end <= reserved)
    }

    /// The next step. `failed` is the first failure among the operations of the last one.
    ///
    /// # Errors
    /// `NoSpace` where the host has no room for even a block, `Io` where a write failed: the file is as valid as before
    /// and growth may be tried again; `Poisoned` where making it durable failed.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<Step> {
        let step = self.advance(failed, ops);
        let syncs = matches!((&step, self.phase), (Ok(Step::Wait), Phase::SealFooter | Phase::SealWipe));
        // After a failure has poisoned the image: a commit that sees no sync any more must see that.
        self.image.room().syncing = syncs;
        match step {
            Ok(Step::Wait) => Ok(Step::Wait),
            over => {
                self.phase = Phase::Over;
                self.image.room().growing = false;
                over
            }
        }
    }

    fn advance(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<Step> {
        match (self.phase, failed) {
            (Phase::Start, _) => {
                if self.blocks == 0 || (self.within.is_none() && self.end().is_none()) {
                    let why = "the file cannot grow: a block table names no place beyond 2 TiB";
                    return Err(Error::new(ErrorKind::Io, why).at_path(self.image.path()));
                }
                self.allocate(ops);
            }
            (Phase::Allocate, Some(e)) if is_full(&e) || is_too_large(&e) => {
                // ext4 keeps what a failed fallocate got; cutting to the present length gives it back.
                self.image.file().set_len(self.image.file().stat()?.len)?;
                self.blocks /= 2;
                if self.blocks < self.least {
                    return Err(self.refused(e));
                }
                self.allocate(ops);
            }
            // A file system takes a reservation beyond the limit of a file's size, and then refuses the write.
            (Phase::Footer, Some(e)) if is_too_large(&e) && self.blocks / 2 >= self.least => {
                let error = self.undo(e);
                if self.image.is_poisoned() {
                    return Err(error);
                }
                self.blocks /= 2;
                self.allocate(ops);
            }
            (Phase::Allocate, Some(e)) if e.kind() != io::ErrorKind::Unsupported => {
                return Err(Error::io("cannot reserve room", e).at_path(self.image.path()));
            }
            (Phase::Allocate, None) if self.reservation.as_mut().is_some_and(|r| r.push(self.slot, ops)) => {}
            (Phase::Allocate, _) if self.within.is_some() => return Ok(self.over()),
            (Phase::Allocate, _) => {
                if mutant::is(Mutant::LengthFirst) {
                    let at = self.end().expect("checked at the start") * SECTOR;
                    self.image.file().set_len(at + SECTOR)?;
                }
                self.write(Phase::Footer, ops);
            }
            (Phase::Footer, None) => self.write(Phase::SealFooter, ops),
            // A commit's sync may have been told of a failure that concerns ours, too.
            (Phase::SealFooter | Phase::SealWipe, None) if self.image.is_poisoned() => self.image.check_poison()?,
            (Phase::SealFooter, None) => self.write(Phase::Wipe, ops),
            (Phase::Wipe, None) => self.write(Phase::SealWipe, ops),
            (Phase::SealWipe, None) => return Ok(self.over()),
            (Phase::SealFooter | Phase::SealWipe, Some(e)) => {
                let why = format!("a sync failed ({e}) while the file grew");
                self.image.poison(&why);
                return Err(Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(e));
            }
            (Phase::Footer | Phase::Wipe, Some(e)) => return Err(self.undo(e)),
            (Phase::Over, _) => unreachable!("growth that is over is not asked again"),
        }
        Ok(Step::Wait)
    }

    fn allocate(&mut self, ops: &mut Vec<Op>) {
        let block_size = self.image.image().block_size().expect("it has blocks");
        let some = usize::try_from(self.blocks).unwrap_or(usize::MAX);
        self.within = self.within.map(|_| self.unreserved(self.old).take(some).last().expect("counted").end);
        let until = self.within.or_else(|| self.end()).expect("checked at the start");
        let mut reservation = match self.image.allocation() {
            Allocation::Block => Reservation::whole(self.reserved, until),
            Allocation::Sparse => {
                let footer = if self.within.is_none() { Some(until) } else { None };
                Reservation::bitmaps(self.unreserved(until), block_size, footer)
            }
        };
        reservation.push(self.slot, ops);
        self.reservation = Some(reservation);
        self.phase = Phase::Allocate;
    }

    /// File sector of the footer that the step writes.
    fn end(&self) -> Option<u64> {
        self.image.end_after(self.old, self.blocks, self.unplaced)
    }

    /// The room is there.
    fn over(&self) -> Step {
        let mut room = self.image.room();
        room.reserved = self.within.or_else(|| self.end()).expect("checked at the start");
        room.end = room.end.max(room.reserved);
        room.steps += 1;
        Step::Done
    }

    /// The new footer, or zeros over the old one: first plainly, so that what fails there can be undone, then through.
    fn write(&mut self, phase: Phase, ops: &mut Vec<Op>) {
        let at = match phase {
            Phase::Footer | Phase::SealFooter => self.end(),
            _ => Some(self.old),
        };
        let at = at.expect("checked at the start") * SECTOR;
        let bytes = match phase {
            Phase::Wipe | Phase::SealWipe if !mutant::is(Mutant::NoWipe) => Buffer::zeroed(SECTOR_BYTES),
            _ => Buffer::copy_of(&self.image.footer_bytes()),
        };
        let through = match phase {
            Phase::SealFooter => !mutant::is(Mutant::GrowUnsynced),
            Phase::SealWipe => !mutant::is(Mutant::WipeUnsynced),
            _ => false,
        };
        ops.push(match (through, self.image.room_rule) {
            (true, RoomRule::CopyOnWrite) => Op::sync(0, self.slot),
            (true, _) => Op::write_through(0, self.slot, at, Payload::Own(bytes)),
            (false, _) => Op::write(0, self.slot, at, Payload::Own(bytes)),
        });
        self.phase = phase;
    }

    /// A write failed. The new footer may be half there, or the old one half wiped while the new one is durable: see to it
    /// that the old one is whole, and cut the file behind it; in the first case without a sync before that, which would make
    /// a length durable that has no footer. Where even that fails, the image takes no further writes.
    fn undo(&mut self, source: io::Error) -> Error {
        let (file, at) = (self.image.file(), self.old * SECTOR);
        // These syncs, too, may be told of a failure that concerns a commit.
        self.image.room().syncing = true;
        let mut there = [0; SECTOR_BYTES];
        let footer = self.image.footer_bytes();
        let whole = match self.phase {
            // A write that was refused has changed nothing, and another one would be refused, too.
            Phase::Wipe if file.read_at(&mut there, at).is_ok() && there == footer => file.sync(),
            Phase::Wipe => file.write_at(&footer, at).and_then(|()| file.sync()),
            _ => Ok(()),
        };
        let back = whole.and_then(|()| file.set_len(at + SECTOR)).and_then(|()| file.sync());
        if let Err(e) = back {
            self.image.poison(&format!("growth failed ({source}) and could not be undone ({})", e.line()));
        }
        self.refused(source)
    }

    /// The error of a step for which there is no room, or that failed.
    fn refused(&self, source: io::Error) -> Error {
        if is_too_large(&source) {
            let why = "the file cannot grow beyond the limit of the process (ulimit -f) or of the file system";
            return Error::io(why, source).at_path(self.image.path());
        }
        if !is_full(&source) {
            return Error::io("cannot grow", source).at_path(self.image.path());
        }
        self.image.room().steps = 0;
        Error::new(ErrorKind::NoSpace, "no room for another block; free space on the host's file system")
            .at_path(self.image.path())
            .caused_by(source)
    }
}

impl Drop for Growth {
    /// Where the file stands is unknown if a step is abandoned: nothing may be written behind it.
    fn drop(&mut self) {
        if self.phase != Phase::Over {
            self.image.poison("growth of the file was abandoned");
        }
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether a file may not become that large. Waiting does not help, as it does on a full host.
fn is_too_large(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::FileTooLarge
}

impl Writable {
    /// Whether a step of growth is due: less than a quarter of a step is left, and blocks may still need it.
    pub fn is_short(&self, room: &Room) -> bool {
        let wanted = (self.step_blocks(room) / 4).max(1).min(room.unplaced);
        wanted > 0 && self.end_after(room.next, wanted, room.unplaced).is_none_or(|end| end > room.usable())
    }

    /// Whether a step of growth waits for a sync.
    pub(super) fn is_growth_syncing(&self) -> bool {
        self.image().block_size().is_some() && self.room().syncing
    }

    /// Whether a step of growth is under way.
    pub fn is_growing(&self) -> bool {
        self.room().growing
    }

    /// Makes the file end right behind its last block, durably: the last act on an image that was committed.
    /// The new footer is durable before the file is cut, so that there is always one. Settles the file's time, too.
    pub fn trim(&self) -> Result<()> {
        self.check_poison()?;
        let end = self.used_end() * SECTOR;
        let file = self.file();
        if file.stat()?.len != end + SECTOR {
            if let Err(e) = file.write_at(&self.footer_bytes(), end) {
                // What is reserved behind the last block reads as zeros anyway: perhaps it is room enough.
                let tail = end.next_multiple_of(PAGE)..self.room().end * SECTOR / PAGE * PAGE;
                if e.kind() != ErrorKind::NoSpace {
                    return Err(e);
                }
                file.punch(tail.start, tail.end.saturating_sub(tail.start))?;
                if let Err(e) = file.write_at(&self.footer_bytes(), end) {
                    log::warn!("{}; the file keeps its length until it is next closed", e.line());
                    return self.settle_time();
                }
            }
            if !mutant::is(Mutant::TrimUnsynced) {
                file.sync()?;
            }
            file.set_len(end + SECTOR)?;
            file.sync()?;
        }
        self.settle_time()
    }
}

#[cfg(all(test, feature = "sim"))]
#[path = "tail_tests.rs"]
mod tests;
