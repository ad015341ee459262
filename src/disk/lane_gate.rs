//! The gate of a lane: while it is closed, requests that change a range of the disk wait. A live operation closes the
//! gates of all lanes to change which file takes the writes.
//!
//! Reads, prefetches and flushes pass. A write is *under way* from its first operation on a file to its mark. A write
//! that waits for space or for the bitmaps of its plan is not under way: it will be planned again. Nor is a write that
//! waits for a commit: a commit uses the version that is current when its round begins.

use super::task::{Task, TaskStage};
use super::task_table::TaskTable;
use crate::units::SectorRange;

/// The gate of a lane.
#[derive(Default)]
pub(super) struct LaneGate {
    /// The range of the disk that is held, if the gate is closed.
    held: Option<SectorRange>,
    /// Whether the lane has reported that no write of the range is under way.
    reported: bool,
    /// Tasks that wait until the gate opens.
    waiting: Vec<u32>,
}

impl LaneGate {
    /// Creates the gate of a new lane, closed for `held`. No write of the lane is under way.
    pub(super) fn new(held: Option<SectorRange>) -> LaneGate {
        LaneGate { held, reported: true, waiting: Vec::new() }
    }

    /// Closes the gate for a range.
    pub(super) fn close(&mut self, range: SectorRange) {
        (self.held, self.reported) = (Some(range), false);
    }

    /// Opens the gate. Returns the tasks that waited.
    pub(super) fn open(&mut self) -> Vec<u32> {
        self.held = None;
        std::mem::take(&mut self.waiting)
    }

    /// Whether a task that is about to be planned must wait.
    #[inline]
    pub(super) fn holds(&self, task: &Task) -> bool {
        self.held.is_some_and(|held| task.changes(held))
    }

    /// Adds a task that waits.
    pub(super) fn wait(&mut self, number: u32) {
        self.waiting.push(number);
    }

    /// Whether the gate is closed, and the lane has not reported yet that no write is under way.
    #[inline]
    pub(super) fn is_closing(&self) -> bool {
        self.held.is_some() && !self.reported
    }

    /// Returns whether no write of the range is under way any more. Returns true at most once for each time that the
    /// gate is closed.
    pub(super) fn take_report(&mut self, tasks: &TaskTable) -> bool {
        let Some(held) = self.held.filter(|_| !self.reported) else { return false };
        let is_under_way =
            |task: &Task| matches!(task.stage, TaskStage::Move | TaskStage::LoadForMark) && task.changes(held);
        self.reported = !tasks.iter().any(is_under_way);
        self.reported
    }
}
