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
//! 1. reserve room on the host; where that fails for want of space, give back what it got and halve the step;
//! 2. write stamp and footer at the new end (this extends the file), in one call within one page: no kill comes between;
//! 3. make the footer durable: from here it is the trailing one;
//! 4. write zeros over the old stamp and footer;
//! 5. make them durable: from here their places are as zero as the rest;
//! 6. hand out the room.
//!
//! A step that fails before 3 is undone. One that fails later is not, as the old stamp is out of date by then: the file keeps
//! its new end, and the next step wipes what is left of the old one.
//!
//! 3 and 5 write the same sector again, through to the medium, instead of a sync: that would wait for all that the guest
//! has written meanwhile, and the guest for it (1 MiB writes in order into a fresh child: p99 of 68 ms by syncs). The room
//! between needs none: it was never written, so it reads as zeros whatever becomes of its reservation.
//!
//! Between 2 and 5 a crash leaves one footer at the end or both; on ext4, rarely, a length without the new one (it notes how
//! far its write-back has come as the file's length): then the footer at the start counts, and recovery writes the other.
//! Room is handed out only after 5, since a dynamic root trusts it to be zero without a further barrier.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use super::commit::Step;
use super::stamping::pair_place;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, Op, Payload, Slot};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Blocks by which a file grows at least, room permitting.
const MIN_STEP_BLOCKS: u64 = 16;
/// Bytes by which a file grows at first, where that is no more than an eighth of the disk.
const FIRST_STEP_BYTES: u64 = 256 << 20;
/// Bytes by which a file grows at most, unless sixteen blocks are more.
const MAX_STEP_BYTES: u64 = 1 << 30;

/// Where the next block goes.
#[derive(Debug)]
pub struct Room {
    /// First file sector after all that is in use.
    pub next: u64,
    /// The end of what is durably zero and may be given out.
    pub end: u64,
    /// File sector of the trailing footer.
    pub footer: u64,
    /// File sectors before it that are to be wiped before room behind `end` is given out: older footers and stamps.
    pub stale: Vec<u64>,
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

/// One step of growth under way.
pub struct Growth {
    image: Arc<Writable>,
    slot: Slot,
    phase: Phase,
    /// Where the room ended before.
    old: u64,
    /// Blocks that the step makes room for.
    blocks: u64,
    /// And at least, where the host has no room for all.
    least: u64,
    /// Blocks without a place when it began.
    unplaced: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Start,
    /// The footer that came with the stamp when the session began becomes durable.
    SealBegun,
    Allocate,
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
        let fits = image.end_after(room.next, blocks, room.unplaced).is_some_and(|end| end <= room.end);
        if room.growing || blocks == 0 || fits {
            return None;
        }
        Some(Growth::of(image, slot, &mut room, blocks, blocks))
    }

    fn of(image: &Arc<Writable>, slot: Slot, room: &mut Room, blocks: u64, least: u64) -> Growth {
        room.growing = true;
        let (old, unplaced) = (room.end, room.unplaced);
        Growth { image: image.clone(), slot, phase: Phase::Start, old, blocks, least, unplaced }
    }

    /// The next step. `failed` is the first failure among the operations of the last one.
    ///
    /// # Errors
    /// `NoSpace` where the host has no room for even a block, `Io` where a write failed: the file is as valid as before
    /// and growth may be tried again; `Poisoned` where making it durable failed.
    pub fn next(&mut self, failed: Option<io::Error>, ops: &mut Vec<Op>) -> Result<Step> {
        let step = self.advance(failed, ops);
        let syncs =
            matches!((&step, self.phase), (Ok(Step::Wait), Phase::SealBegun | Phase::SealFooter | Phase::SealWipe));
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
        let end = |g: &Growth| g.image.end_after(g.old, g.blocks, g.unplaced);
        match (self.phase, failed) {
            (Phase::Start, _) => {
                if self.blocks == 0 || end(self).is_none() {
                    let why = "the file cannot grow: a block table names no place beyond 2 TiB";
                    return Err(Error::new(ErrorKind::Io, why).at_path(self.image.path()));
                }
                // Whatever cuts the file back to this footer must not make a length durable that has none.
                let is_sealed = self.image.room().stale.is_empty();
                match is_sealed {
                    true => self.allocate(ops),
                    false => self.write(Phase::SealBegun, ops),
                }
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
            (Phase::Allocate, Some(e)) if e.kind() != io::ErrorKind::Unsupported => {
                return Err(Error::io("cannot reserve room", e).at_path(self.image.path()));
            }
            (Phase::Allocate, _) => {
                if mutant::is(Mutant::LengthFirst) {
                    let at = end(self).expect("checked at the start") * SECTOR;
                    self.image.file().set_len(at + SECTOR)?;
                }
                match self.move_end() {
                    Ok(()) => self.write(Phase::SealFooter, ops),
                    // A file system takes a reservation beyond the limit of a file's size, and then refuses the write.
                    Err(e) if e.raw_os_error() == Some(libc::EFBIG) && self.may_halve() => {
                        self.blocks /= 2;
                        self.allocate(ops);
                    }
                    Err(e) => return Err(e),
                }
            }
            // A commit's sync may have been told of a failure that concerns ours, too.
            (Phase::SealBegun | Phase::SealFooter | Phase::SealWipe, None) if self.image.is_poisoned() => {
                self.image.check_poison()?;
            }
            (Phase::SealBegun, None) => self.allocate(ops),
            (Phase::SealFooter, None) => self.write(Phase::Wipe, ops),
            (Phase::Wipe, None) => self.write(Phase::SealWipe, ops),
            (Phase::SealWipe, None) => {
                let mut room = self.image.room();
                room.end = room.footer - 1;
                room.stale.clear();
                room.steps += 1;
                return Ok(Step::Done);
            }
            (Phase::SealBegun | Phase::SealFooter | Phase::SealWipe, Some(e)) => {
                let why = format!("a sync failed ({e}) while the file grew");
                self.image.poison(&why);
                return Err(Error::new(ErrorKind::Poisoned, why).at_path(self.image.path()).caused_by(e));
            }
            (Phase::Wipe, Some(e)) => {
                if mutant::is(Mutant::UndoCutsStamp) {
                    return Err(self.undo(e, self.old));
                }
                return Err(self.refused(e));
            }
            (Phase::Over, _) => unreachable!("growth that is over is not asked again"),
        }
        Ok(Step::Wait)
    }

    /// Whether a smaller step may do where this one is too large.
    fn may_halve(&self) -> bool {
        self.blocks / 2 >= self.least && !self.image.is_poisoned()
    }

    fn allocate(&mut self, ops: &mut Vec<Op>) {
        let end =
            self.image.end_after(self.old, self.blocks, self.unplaced).expect("a smaller step than one that fits");
        let (at, len) = (self.old * SECTOR, (end - self.old + 1) * SECTOR);
        ops.push(Op::range(0, self.slot, Action::Allocate, at, len));
        self.phase = Phase::Allocate;
    }

    /// Writes stamp and footer at the new end. Nothing else of this image writes either meanwhile, so this is a plain call.
    fn move_end(&mut self) -> Result<()> {
        let mut room = self.image.room();
        let end = self.image.end_after(self.old, self.blocks, self.unplaced).expect("checked at the start");
        let (at, old) = (pair_place(end, room.footer), room.footer);
        if let Err(e) = self.image.put_end(at) {
            drop(room);
            let source = e.raw_os_error().map_or_else(|| io::Error::other(e.line()), io::Error::from_raw_os_error);
            return Err(self.undo(source, old));
        }
        // A footer right behind a block has no stamp before it.
        let first = if old > room.end { old - 1 } else { old };
        room.stale.extend(first..=old);
        room.footer = at + 1;
        Ok(())
    }

    /// The new footer, or zeros over the old ends: the latter first plainly, so that a full host is no failed sync, then
    /// through.
    fn write(&mut self, phase: Phase, ops: &mut Vec<Op>) {
        let through = match phase {
            Phase::SealBegun => true,
            Phase::SealFooter => !mutant::is(Mutant::GrowUnsynced),
            Phase::SealWipe => !mutant::is(Mutant::WipeUnsynced),
            Phase::Wipe | Phase::Start | Phase::Allocate | Phase::Over => false,
        };
        let write = if through { Op::write_through } else { Op::write };
        self.phase = phase;
        let room = self.image.room();
        let footer = Buffer::copy_of(&self.image.footer_bytes());
        if matches!(phase, Phase::SealBegun | Phase::SealFooter) {
            return ops.push(write(0, self.slot, room.footer * SECTOR, Payload::Own(footer)));
        }
        for run in room.stale.chunk_by(|a, b| a + 1 == *b) {
            let bytes = match mutant::is(Mutant::NoWipe) {
                true => footer.repeat(run.len()),
                false => vec![0; run.len() * SECTOR_BYTES],
            };
            ops.push(write(0, self.slot, run[0] * SECTOR, Payload::Own(Buffer::copy_of(&bytes))));
        }
    }

    /// The new end could not be written, and may be half there: cuts the file behind the old footer, without a sync before
    /// that, which would make a length durable that has no footer. If that fails, the image takes no further writes.
    fn undo(&mut self, source: io::Error, footer: u64) -> Error {
        let file = self.image.file();
        // This sync, too, may be told of a failure that concerns a commit.
        self.image.room().syncing = true;
        let mut back = Ok(());
        if mutant::is(Mutant::UndoCutsStamp) && self.phase == Phase::Wipe {
            back = file.write_at(&self.image.footer_bytes(), footer * SECTOR);
            self.image.room().footer = footer;
        }
        let back = back.and_then(|()| file.set_len((footer + 1) * SECTOR)).and_then(|()| file.sync());
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
    /// Blocks of room that the next step of growth makes: an eighth of the disk up to 256 MiB, or 1 % of it, or sixteen;
    /// four times as many each time, as a guest that fills its disk waits some milliseconds for a step; up to 1 GiB.
    fn step_blocks(&self, room: &Room) -> u64 {
        let Some(block_size) = self.image().block_size() else { return 0 };
        let bytes = u64::from(block_size.bytes());
        let size = self.image().size();
        let least = ((size / 8).min(FIRST_STEP_BYTES).max(size / 100) / bytes).max(MIN_STEP_BLOCKS);
        let most = (MAX_STEP_BYTES / bytes).max(MIN_STEP_BLOCKS);
        (least << (2 * room.steps).min(16)).min(most)
    }

    /// Whether a step of growth is due: less than a quarter of a step is left, and blocks may still need it.
    pub fn is_short(&self, room: &Room) -> bool {
        let wanted = (self.step_blocks(room) / 4).max(1).min(room.unplaced);
        wanted > 0 && self.end_after(room.next, wanted, room.unplaced).is_none_or(|end| end > room.end)
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
            file.write_at(&self.footer_bytes(), end)?;
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
