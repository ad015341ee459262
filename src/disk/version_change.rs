//! Changes of the version of a disk: the right to change the version, and the change that moves the top to another
//! slot. `version_swap` has the steps.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::shared::Disk;
use super::version_swap::{ChangeStep, LANE_TIMEOUT, SwapPhase, VersionSwap};
use crate::error::{Error, ErrorKind, Result};

/// A change that moves the top to another file slot. Neither the contents nor the files of the disk change. Only tests
/// use this change.
pub struct VersionChange {
    swap: VersionSwap,
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
        // `is_closed` is checked after the turn is taken: `Disk::close` sets `is_closed`, and then waits for the end of
        // the turn.
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
    /// Begins to move the top to another file slot.
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
        let slot = disk.take_slot_for(top.image.path())?;
        let swap = VersionSwap::new(disk, current.with_top_slot(slot), slot, Some(top.slot));
        Ok(VersionChange { swap, _turn: turn })
    }

    /// Takes the next step, unless the current phase waits for lanes or for a commit round.
    ///
    /// # Errors
    /// `Io` if a lane cannot register the new file. The disk is unchanged, and the change must be dropped.
    pub fn step(&mut self) -> Result<ChangeStep> {
        if self.swap.phase() == SwapPhase::Open {
            self.swap.release_rounds();
        }
        self.swap.step()
    }

    /// Carries out the change. Returns the pause: how long writes were held. If operations of an older version take
    /// longer than two seconds, returns before the old slot is free.
    ///
    /// # Errors
    /// - `Busy` if a lane or a commit takes longer than two seconds. The disk is unchanged, unless the lanes had been
    ///   asked to adopt the new version.
    /// - Those of [`VersionChange::step`].
    pub fn run(mut self) -> Result<Duration> {
        let mut deadline = Instant::now() + LANE_TIMEOUT;
        loop {
            match self.step()? {
                ChangeStep::Done => return Ok(self.swap.pause()),
                ChangeStep::Again => deadline = Instant::now() + LANE_TIMEOUT,
                ChangeStep::Wait => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match self.swap.phase() {
                        SwapPhase::Open if left.is_zero() => return Ok(self.swap.pause()),
                        _ if left.is_zero() => return Err(self.swap.late_error()),
                        _ => self.swap.wait(left),
                    }
                }
            }
        }
    }
}
