//! A change of the version that lanes serve, while requests run.
//!
//! ```text
//!   this change                        each lane
//!   Register ────────────────────────> adds the new file to its engine
//!   hold the commit rounds             (waits until the running round has ended)
//!   Hold ────────────────────────────> new writes wait; reports when those under way have ended
//!   publish the version, Adopt ──────> plans with it from now on
//!   Open ────────────────────────────> plans the held writes
//!   release the commit rounds
//!   (waits) <───────────────────────── reports when no operation uses an older version
//!   Unregister ──────────────────────> removes the old file from its engine
//! ```
//!
//! No request is answered with an error because of a change. Only writes wait, from `Hold` to `Open`: the *pause*.
//! Flushes wait while the rounds are held, so a flush is never answered by a commit of another file, and one image is
//! never committed twice at a time.
//!
//! A file keeps its slot until no lane has an operation of an older version: the slot of an operation in flight must
//! not name another file. If that takes long, the change ends, and a later change frees the slot. Each lane takes its
//! events in order, so a slot may be used again as soon as `Unregister` is posted.
//!
//! Each step is short and never waits, so tests can put a crash, a kill or a request between any two steps.
//! [`VersionChange::run`] takes the steps, and waits for the lanes between them. If the change is dropped, the gates
//! open and the rounds are released.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lane_table::LaneStatus;
use super::served_version::ServedVersion;
use super::shared::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::FileSlot;
use crate::units::SectorRange;

/// Time that the lanes have for each step of a change.
const LANE_TIMEOUT: Duration = Duration::from_secs(2);

/// Result of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeStep {
    /// Lanes have not reported yet. Take the step again when they have.
    Wait,
    /// The next step can be taken.
    Again,
    /// The change has ended.
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ChangePhase {
    Begin,
    Register,
    HoldRounds,
    Hold,
    Adopt,
    Retire,
    Done,
}

/// A change of the version. Changes of a disk are serial.
pub struct VersionChange {
    disk: Arc<Disk>,
    phase: ChangePhase,
    new: Arc<ServedVersion>,
    new_slot: FileSlot,
    old_slot: FileSlot,
    /// When the gates were closed.
    held_at: Option<Instant>,
    pause: Duration,
    // Dropped last: the next change may begin then.
    _turn: ChangeTurn,
}

/// The right to change the version of a disk. One change at a time has it.
pub(super) struct ChangeTurn(Arc<Disk>);

impl ChangeTurn {
    /// Takes the right.
    ///
    /// # Errors
    /// `Busy` if another change of the disk is in progress, or the disk is closed.
    pub(super) fn take(disk: &Arc<Disk>) -> Result<ChangeTurn> {
        if disk.is_changing.swap(true, Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "another change of the disk is in progress"));
        }
        // The flag is checked after the turn is taken: `Disk::close` sets it, and then waits for the turn to end.
        let turn = ChangeTurn(disk.clone());
        if disk.is_closed.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "the disk is closed"));
        }
        Ok(turn)
    }
}

impl Drop for ChangeTurn {
    fn drop(&mut self) {
        self.0.is_changing.store(false, Ordering::SeqCst);
    }
}

impl VersionChange {
    /// Begins to move the top to another file slot. The disk stays the same.
    ///
    /// # Errors
    /// - `Busy` if another change of the disk is in progress, or the disk is closed.
    /// - `Refused` if the disk is read-only, or all slots are in use.
    /// - `Poisoned` if the top is poisoned.
    pub fn move_top(disk: &Arc<Disk>) -> Result<VersionChange> {
        // Changes are serial, so the current version stays the current one from here on.
        let turn = ChangeTurn::take(disk)?;
        let current = disk.version();
        let Some(top) = current.top() else {
            return Err(Error::new(ErrorKind::Refused, "a read-only disk has no writable layer"));
        };
        top.image.check_poison()?;
        let Some(new_slot) = disk.take_slot() else {
            let what = "all file slots of the disk are in use";
            return Err(Error::new(ErrorKind::Refused, what).at_path(top.image.path()));
        };
        let new = Arc::new(current.with_top_slot(new_slot));
        let (phase, held_at, pause) = (ChangePhase::Begin, None, Duration::ZERO);
        Ok(VersionChange { disk: disk.clone(), phase, new, new_slot, old_slot: top.slot, held_at, pause, _turn: turn })
    }

    /// Takes the next step if the lanes have reported what it needs.
    ///
    /// # Errors
    /// `Io` if a lane cannot register the new file. The disk is unchanged, and the change must be dropped.
    pub fn step(&mut self) -> Result<ChangeStep> {
        if self.phase == ChangePhase::HoldRounds {
            if !self.disk.group_commit.is_at_rest() {
                return Ok(ChangeStep::Wait);
            }
        } else if self.disk.lanes.first(self.is_late()).is_some() {
            return Ok(ChangeStep::Wait);
        }
        self.phase = match self.phase {
            ChangePhase::Begin => {
                self.disk.lanes.register(self.new_slot, self.new.writable_top().image.file());
                ChangePhase::Register
            }
            ChangePhase::Register => {
                self.check_registered()?;
                self.disk.group_commit.hold();
                ChangePhase::HoldRounds
            }
            ChangePhase::HoldRounds => {
                self.held_at = Some(Instant::now());
                self.disk.lanes.hold(SectorRange::between(0, self.disk.capacity()));
                ChangePhase::Hold
            }
            ChangePhase::Hold => {
                // The statistics of the top continue in the new slot.
                self.disk.lane_counters.file_moves(self.old_slot, self.new_slot);
                self.disk.publish(self.new.clone());
                ChangePhase::Adopt
            }
            ChangePhase::Adopt => {
                self.release();
                ChangePhase::Retire
            }
            ChangePhase::Retire => {
                self.disk.free_slot(self.old_slot);
                ChangePhase::Done
            }
            ChangePhase::Done => return Ok(ChangeStep::Done),
        };
        Ok(ChangeStep::Again)
    }

    /// Carries out the change. Returns the pause: how long writes were held.
    ///
    /// # Errors
    /// - `Busy` if a lane or a commit does not answer within two seconds. If the lanes had not been asked to adopt the
    ///   new version, the disk is unchanged. Operations of an older version are no error, however long they take.
    /// - Those of [`VersionChange::step`].
    pub fn run(mut self) -> Result<Duration> {
        let mut deadline = Instant::now() + LANE_TIMEOUT;
        loop {
            match self.step()? {
                ChangeStep::Done => return Ok(self.pause),
                ChangeStep::Again => deadline = Instant::now() + LANE_TIMEOUT,
                ChangeStep::Wait => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() && self.phase == ChangePhase::Retire {
                        return Ok(self.pause);
                    }
                    if left.is_zero() {
                        return Err(self.late_error());
                    }
                    match self.phase {
                        ChangePhase::HoldRounds => self.disk.group_commit.wait_at_rest(left),
                        _ => self.disk.lanes.wait(left, self.is_late()),
                    }
                }
            }
        }
    }

    /// Returns the predicate of lanes for which the current phase waits.
    fn is_late(&self) -> impl Fn(&LaneStatus) -> bool + use<> {
        let (phase, epoch) = (self.phase, self.new.epoch());
        move |status| match phase {
            ChangePhase::Begin | ChangePhase::HoldRounds | ChangePhase::Done => false,
            ChangePhase::Register => status.registered.is_none(),
            ChangePhase::Hold => !status.is_held,
            ChangePhase::Adopt => status.adopted < epoch,
            ChangePhase::Retire => status.oldest < epoch && !mutant::enabled(Mutant::SlotFreedEarly),
        }
    }

    /// Checks that all lanes have registered the new file.
    fn check_registered(&self) -> Result<()> {
        let failed = self.disk.lanes.first(|status| matches!(status.registered, Some(Err(_))));
        let Some((_, LaneStatus { registered: Some(Err(why)), .. })) = failed else { return Ok(()) };
        let what = format!("a queue cannot register the file with its I/O engine ({why})");
        Err(Error::new(ErrorKind::Io, what).at_path(self.new.top_path()))
    }

    fn late_error(&self) -> Error {
        let what = match (self.phase, self.disk.lanes.first(self.is_late())) {
            (ChangePhase::HoldRounds, _) => "a commit takes longer than two seconds; try again later".to_owned(),
            (_, Some((id, _))) => format!("queue thread {id} of the disk does not respond"),
            (_, None) => "the queues of the disk do not respond".to_owned(),
        };
        Error::new(ErrorKind::Busy, what).at_path(self.new.top_path())
    }

    /// Opens the gates and releases the commit rounds.
    fn release(&mut self) {
        self.disk.lanes.open();
        self.pause = self.held_at.take().map_or(Duration::ZERO, |at| at.elapsed());
        self.disk.group_commit.release();
    }
}

impl Drop for VersionChange {
    /// Ends a change that is not done. The gates open and the rounds are released on every way out, a panic included.
    fn drop(&mut self) {
        match self.phase {
            ChangePhase::Begin | ChangePhase::Register | ChangePhase::HoldRounds | ChangePhase::Hold => {
                if matches!(self.phase, ChangePhase::HoldRounds | ChangePhase::Hold) {
                    self.release();
                }
                self.disk.lanes.end_registration();
                // No operation uses the new slot.
                self.disk.free_slot(self.new_slot);
            }
            // A lane adopts the new version before it plans another write, since it takes its events in order, and
            // before it leads a commit.
            ChangePhase::Adopt => {
                self.release();
                self.disk.retire_slot(self.old_slot, self.new.epoch());
            }
            ChangePhase::Retire => self.disk.retire_slot(self.old_slot, self.new.epoch()),
            ChangePhase::Done => {}
        }
    }
}
