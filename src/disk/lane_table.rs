//! The lanes of a disk: the events that are posted to all of them, and what each of them reports during a change.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::cached_reads::CachedReads;
use super::mailbox::{LaneEvent, Mailbox};
use super::op_queue::OpQueue;
use crate::storage::{File, FileSlot};
use crate::units::SectorRange;

/// Number of a lane, unique in its disk.
pub(super) type LaneId = u64;

/// The lanes of a disk.
#[derive(Default)]
pub(super) struct LaneTable {
    state: Mutex<LaneTableState>,
    /// Notified when a lane reports or is removed.
    reported: Condvar,
}

#[derive(Default)]
struct LaneTableState {
    lanes: Vec<LaneEntry>,
    next_id: LaneId,
    /// Number of changes that have begun to register a file.
    changes: u64,
    /// The file that a change is adding to the engines. Lanes that start now register it, too.
    new_file: Option<(FileSlot, File)>,
    /// The range that a change holds. The gates of lanes that start now are closed for it.
    held: Option<SectorRange>,
}

struct LaneEntry {
    id: LaneId,
    mailbox: Arc<Mailbox>,
    status: LaneStatus,
}

/// What a lane has reported during a change.
#[derive(Clone, Debug)]
pub(super) struct LaneStatus {
    /// Whether the engine of the lane has registered the new file, or why it has not. `None` if the lane has not
    /// reported that.
    pub(super) registered: Option<Result<(), String>>,
    /// Whether no write of the range is under way: the lane has reported that since its gate was closed last, or it
    /// started with a closed gate.
    pub(super) is_held: bool,
    /// The version with which the lane plans.
    pub(super) adopted: u32,
    /// The oldest version that operations in flight use, or `adopted` if they use no older one.
    pub(super) oldest: u32,
}

impl LaneTable {
    /// Adds a lane that plans with the version `epoch`, and registers the new file of a change with the engine and the
    /// page cache of the lane. The events of the change that are posted from now on reach the lane. Returns the number
    /// of the lane and the range for which its gate must be closed.
    ///
    /// # Errors
    /// Those of [`OpQueue::register`]; the lane is not added then.
    pub(super) fn add(
        &self,
        mailbox: &Arc<Mailbox>,
        epoch: u32,
        ops: &mut OpQueue,
        cached_reads: &mut CachedReads,
    ) -> io::Result<(LaneId, Option<SectorRange>)> {
        let mut state = self.lock();
        if let Some((slot, file)) = &state.new_file {
            ops.register(cached_reads, *slot, file)?;
        }
        let id = state.next_id;
        state.next_id += 1;
        let (registered, is_held) = (state.new_file.as_ref().map(|_| Ok(())), state.held.is_some());
        let status = LaneStatus { registered, is_held, adopted: epoch, oldest: epoch };
        state.lanes.push(LaneEntry { id, mailbox: mailbox.clone(), status });
        Ok((id, state.held))
    }

    /// Removes a lane. A change waits for it no longer.
    pub(super) fn remove(&self, id: LaneId) {
        self.lock().lanes.retain(|lane| lane.id != id);
        self.reported.notify_all();
    }

    /// Posts an event to all lanes.
    pub(super) fn broadcast(&self, event: LaneEvent) {
        self.lock().lanes.iter().for_each(|lane| lane.mailbox.post(event));
    }

    /// Begins to add a file to the engines of all lanes.
    pub(super) fn register(&self, slot: FileSlot, file: &File) {
        let mut state = self.lock();
        state.new_file = Some((slot, file.clone()));
        state.changes += 1;
        let event = LaneEvent::Register(state.changes);
        state.post(event, |status| status.registered = None);
    }

    /// Lanes that start from now on register only the files of the current version.
    pub(super) fn end_registration(&self) {
        self.lock().new_file = None;
    }

    /// Closes the gates of all lanes for a range.
    pub(super) fn hold(&self, range: SectorRange) {
        let mut state = self.lock();
        state.held = Some(range);
        state.post(LaneEvent::Hold(range), |status| status.is_held = false);
    }

    /// Opens the gates of all lanes.
    pub(super) fn open(&self) {
        let mut state = self.lock();
        state.held = None;
        state.post(LaneEvent::Open, |_| ());
    }

    /// Registers the new file of the change with the number `change` with the engine and the page cache of a lane, and
    /// reports the result. Does nothing if the change has ended.
    pub(super) fn register_in(&self, change: u64, id: LaneId, ops: &mut OpQueue, cached_reads: &mut CachedReads) {
        let new_file = |state: &LaneTableState| state.new_file.clone().filter(|_| state.changes == change);
        let found = new_file(&self.lock());
        let Some((slot, file)) = found else { return };
        let result = ops.register(cached_reads, slot, &file).map_err(|e| e.to_string());
        let mut state = self.lock();
        // The change may have been given up meanwhile, and another begun.
        let is_awaited = new_file(&state).is_some();
        if let Some(lane) = state.lanes.iter_mut().find(|lane| lane.id == id && is_awaited) {
            lane.status.registered = Some(result);
        }
        drop(state);
        self.reported.notify_all();
    }

    /// Records that a lane holds the writes (if `is_held` is true; a lane reports this once for each time that its gate
    /// is closed), the version with which the lane plans (`adopted`), and the oldest version that it uses.
    pub(super) fn report_progress(&self, id: LaneId, is_held: bool, adopted: u32, oldest: u32) {
        if let Some(lane) = self.lock().lanes.iter_mut().find(|lane| lane.id == id) {
            lane.status.is_held |= is_held;
            (lane.status.adopted, lane.status.oldest) = (adopted, oldest);
        }
        self.reported.notify_all();
    }

    /// Returns the first lane for which `is_late` is true.
    pub(super) fn first(&self, is_late: impl Fn(&LaneStatus) -> bool) -> Option<(LaneId, LaneStatus)> {
        self.lock().lanes.iter().find(|lane| is_late(&lane.status)).map(|lane| (lane.id, lane.status.clone()))
    }

    /// The oldest version that a lane uses, by the last reports; `None` if there is no lane.
    pub(super) fn oldest_version(&self) -> Option<u32> {
        self.lock().lanes.iter().map(|lane| lane.status.oldest).min()
    }

    /// Waits until `is_late` is false for all lanes, at most for `at_most`.
    pub(super) fn wait(&self, at_most: Duration, is_late: impl Fn(&LaneStatus) -> bool) {
        let any_late = |state: &mut LaneTableState| state.lanes.iter().any(|lane| is_late(&lane.status));
        let _ = self.reported.wait_timeout_while(self.lock(), at_most, any_late);
    }

    fn lock(&self) -> MutexGuard<'_, LaneTableState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LaneTableState {
    /// Posts an event to all lanes, after their status was changed by `reset`.
    fn post(&mut self, event: LaneEvent, reset: impl Fn(&mut LaneStatus)) {
        for lane in &mut self.lanes {
            reset(&mut lane.status);
            lane.mailbox.post(event);
        }
    }
}
