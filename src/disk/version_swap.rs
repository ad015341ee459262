//! Replaces the version that lanes serve, while requests run.
//!
//! ```text
//!   this swap                          each lane
//!   Register ────────────────────────> adds the new file to its engine
//!   hold the commit rounds             (waits until the running round has ended)
//!   Hold ────────────────────────────> new writes wait; reports when those under way have ended
//!   publish the version, Adopt ──────> plans with it from now on, and reports that
//!   Open ────────────────────────────> plans the held writes
//!   release the commit rounds
//!   (waits) <───────────────────────── reports when no operation uses an older version
//!   Unregister ──────────────────────> removes the old file from its engine
//! ```
//!
//! A swap answers no request with an error. Writes wait from `Hold` to `Open`: this time is the *pause*. Flushes wait
//! while the rounds are held, so a flush is never answered by a commit of another file, and one image is never
//! committed twice at a time. A snapshot holds the rounds longer than the pause. Reads never wait.
//!
//! A swap in place keeps the file and its slot. It registers and unregisters nothing.
//!
//! A file keeps its slot until no lane has an operation of an older version: the slot of an operation in flight must
//! not name another file. If such operations take long, the owner drops the swap, and a later change frees the slot.
//! Each lane takes its events in order, so a slot may be used again as soon as `Unregister` is posted.
//!
//! Each step is short and never waits, so tests can put a crash, a kill or a request between any two steps. When the
//! swap is dropped, the gates open and the rounds are released.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lane_table::LaneStatus;
use super::served_version::ServedVersion;
use super::shared::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::FileSlot;
use crate::units::SectorRange;

/// Time that the lanes have for each step.
pub(super) const LANE_TIMEOUT: Duration = Duration::from_secs(2);

/// Result of a step of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeStep {
    /// A lane, a commit or a step of growth has not ended yet. Take the step again later.
    Wait,
    /// The next step can be taken.
    Again,
    /// The change has ended.
    Done,
}

/// The phase of a swap: what has been done. Phases are in the order of the drawing above.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum SwapPhase {
    /// Nothing.
    New,
    /// Lanes are asked to register the new file.
    Registering,
    /// All lanes have registered the new file.
    Registered,
    /// No commit round begins.
    HoldingRounds,
    /// No commit round runs.
    RoundsHeld,
    /// Lanes are asked to hold writes.
    Holding,
    /// No write is under way.
    Held,
    /// The new version is published.
    Published,
    /// The gates are open.
    Open,
    /// The rounds are released, and the slot that the new version does not use is free.
    Done,
}

/// The replacement of a version by another one that takes the writes in another file, or in the same file with another
/// structure.
pub(super) struct VersionSwap {
    disk: Arc<Disk>,
    phase: SwapPhase,
    /// The new version. It is set before the step that publishes it.
    new: Option<Arc<ServedVersion>>,
    /// Number of the new version.
    epoch: u32,
    /// The slot of the new file, which takes the writes; `None` if the top stays in its file.
    new_slot: Option<FileSlot>,
    /// The slot that the new version does not use any more.
    retired_slot: Option<FileSlot>,
    /// When the gates were closed; `None` while they are open.
    held_at: Option<Instant>,
    /// Since when the rounds are held; `None` if they are not held.
    rounds_held_at: Option<Instant>,
    pause: Duration,
}

impl VersionSwap {
    /// Begins to replace the current version of `disk` by `new`, whose top is in `new_slot`. The caller has the right
    /// to change the version, and has taken the slot. The swap frees `new_slot` if it is dropped before it publishes
    /// `new`, and frees `retired_slot` after all lanes have stopped using it.
    pub(super) fn new(
        disk: &Arc<Disk>,
        new: ServedVersion,
        new_slot: FileSlot,
        retired_slot: Option<FileSlot>,
    ) -> VersionSwap {
        VersionSwap {
            disk: disk.clone(),
            phase: SwapPhase::New,
            epoch: new.epoch(),
            new: Some(Arc::new(new)),
            new_slot: Some(new_slot),
            retired_slot,
            held_at: None,
            rounds_held_at: None,
            pause: Duration::ZERO,
        }
    }

    /// Begins to replace the current version by one whose top is in the same slot and file. The caller has the right to
    /// change the version, and calls [`VersionSwap::set_version`] before the step that publishes the version.
    pub(super) fn in_place(disk: &Arc<Disk>) -> VersionSwap {
        VersionSwap {
            disk: disk.clone(),
            phase: SwapPhase::New,
            epoch: disk.version().epoch() + 1,
            new: None,
            new_slot: None,
            retired_slot: None,
            held_at: None,
            rounds_held_at: None,
            pause: Duration::ZERO,
        }
    }

    pub(super) fn phase(&self) -> SwapPhase {
        self.phase
    }

    /// How long writes were held; zero until the gates have opened.
    pub(super) fn pause(&self) -> Duration {
        self.pause
    }

    /// Takes the next step, unless the current phase waits for lanes or for a commit round. The step after `Open` ends
    /// the swap.
    ///
    /// # Errors
    /// `Io` if a lane cannot register the new file. The disk is unchanged, and the swap must be dropped.
    pub(super) fn step(&mut self) -> Result<ChangeStep> {
        if self.must_wait() {
            return Ok(ChangeStep::Wait);
        }
        self.phase = match self.phase {
            SwapPhase::New => {
                if let (Some(slot), Some(new)) = (self.new_slot, &self.new) {
                    self.disk.lanes.register(slot, new.writable_top().image.file());
                }
                SwapPhase::Registering
            }
            SwapPhase::Registering => {
                self.check_registered()?;
                SwapPhase::Registered
            }
            SwapPhase::Registered => {
                if !mutant::enabled(Mutant::RoundsNotHeld) {
                    self.disk.group_commit.hold();
                }
                self.rounds_held_at = Some(Instant::now());
                SwapPhase::HoldingRounds
            }
            SwapPhase::HoldingRounds => SwapPhase::RoundsHeld,
            SwapPhase::RoundsHeld => {
                self.held_at = Some(Instant::now());
                self.disk.lanes.hold(SectorRange::between(0, self.disk.capacity()));
                SwapPhase::Holding
            }
            SwapPhase::Holding => SwapPhase::Held,
            SwapPhase::Held => {
                if let (Some(old), Some(new)) = (self.retired_slot, self.new_slot) {
                    // The statistics of the top continue in the new slot.
                    self.disk.lane_counters.file_moves(old, new);
                }
                self.disk.publish(self.new.clone().expect("the owner has set the new version"));
                SwapPhase::Published
            }
            SwapPhase::Published => {
                self.open_gates();
                SwapPhase::Open
            }
            SwapPhase::Open => {
                self.release_rounds();
                self.retired_slot.take().into_iter().for_each(|slot| self.disk.free_slot(slot));
                SwapPhase::Done
            }
            SwapPhase::Done => return Ok(ChangeStep::Done),
        };
        Ok(ChangeStep::Again)
    }

    /// Whether the current phase waits for lanes or for a commit round.
    fn must_wait(&self) -> bool {
        match self.phase {
            SwapPhase::HoldingRounds => !self.disk.group_commit.is_at_rest() && !mutant::enabled(Mutant::RoundsNotHeld),
            _ => self.disk.lanes.first(self.is_late()).is_some(),
        }
    }

    /// Waits until the next step can be taken, at most for `at_most`.
    pub(super) fn wait(&self, at_most: Duration) {
        match self.phase {
            SwapPhase::HoldingRounds => self.disk.group_commit.wait_at_rest(at_most),
            _ => self.disk.lanes.wait(at_most, self.is_late()),
        }
    }

    /// Returns the predicate of lanes for which the current phase waits.
    fn is_late(&self) -> impl Fn(&LaneStatus) -> bool + use<> {
        let (phase, epoch, retires) = (self.phase, self.epoch, self.retired_slot.is_some());
        let registers = self.new_slot.is_some();
        move |status| match phase {
            SwapPhase::Registering => registers && status.registered.is_none(),
            SwapPhase::Holding => !status.is_held && !mutant::enabled(Mutant::WritesNotAwaited),
            SwapPhase::Published => status.adopted < epoch,
            SwapPhase::Open => retires && status.oldest < epoch && !mutant::enabled(Mutant::SlotFreedEarly),
            _ => false,
        }
    }

    /// Sets the new version of a swap in place.
    ///
    /// # Panics
    /// If `new` does not have the next number, or the swap has already published its version.
    pub(super) fn set_version(&mut self, new: ServedVersion) {
        assert!(new.epoch() == self.epoch && self.phase < SwapPhase::Published, "changes are serial");
        self.new = Some(Arc::new(new));
    }

    /// Checks that no lane has failed to register the new file.
    ///
    /// # Errors
    /// `Io`.
    fn check_registered(&self) -> Result<()> {
        let failed = self.disk.lanes.first(|status| matches!(status.registered, Some(Err(_))));
        let Some((_, LaneStatus { registered: Some(Err(why)), .. })) = failed else { return Ok(()) };
        let what = format!("a queue cannot register the file with its I/O engine ({why})");
        Err(Error::new(ErrorKind::Io, what).at_path(self.disk.version().top_path()))
    }

    /// Returns the `Busy` error for a phase that takes too long.
    pub(super) fn late_error(&self) -> Error {
        let what = match (self.phase, self.disk.lanes.first(self.is_late())) {
            (SwapPhase::HoldingRounds, _) => "a commit takes longer than two seconds; try again later".to_owned(),
            (_, Some((id, _))) => format!("queue thread {id} of the disk does not respond"),
            (_, None) => "the queues of the disk do not respond".to_owned(),
        };
        Error::new(ErrorKind::Busy, what).at_path(self.disk.version().top_path())
    }

    /// Opens the gates without waiting until all lanes have adopted the new version, for a change that has failed. A
    /// lane adopts the new version before it plans another write, since it takes its events in order, and before it
    /// leads a commit. Until then, the lane may plan a read with the old version, and this read may miss a write that
    /// another lane has made since.
    ///
    /// # Panics
    /// If the swap is not in the phase `Published`.
    pub(super) fn open_without_reports(&mut self) {
        assert!(self.phase == SwapPhase::Published, "only a published version can be adopted");
        self.open_gates();
        self.phase = SwapPhase::Open;
    }

    fn open_gates(&mut self) {
        self.disk.lanes.open();
        self.pause = self.held_at.take().map_or(Duration::ZERO, |at| at.elapsed());
    }

    /// Releases the commit rounds if they are held. Returns how long they were held; zero if they were not held.
    pub(super) fn release_rounds(&mut self) -> Duration {
        let Some(at) = self.rounds_held_at.take() else { return Duration::ZERO };
        let held = at.elapsed();
        self.disk.group_commit.release();
        held
    }
}

impl Drop for VersionSwap {
    /// Opens the gates and releases the rounds, also in a panic. Before the version is published, frees the new slot.
    /// After that, retires the old slot if it is not free yet.
    fn drop(&mut self) {
        if self.held_at.is_some() {
            self.open_gates();
        }
        self.release_rounds();
        if self.phase < SwapPhase::Published {
            self.disk.lanes.end_registration();
            // No operation uses the new slot.
            self.new_slot.into_iter().for_each(|slot| self.disk.free_slot(slot));
        } else if let Some(slot) = self.retired_slot {
            self.disk.retire_slot(slot, self.epoch);
        }
    }
}
