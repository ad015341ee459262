//! Writes that are held while the host has no room, counted over all lanes: the log gets one line when the first is held,
//! and one when the last is over.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lane::Lane;
use super::task::Task;

/// Bytes of room with which the host counts as no longer full: a file system that is full may report a few.
const MIN_FREE_BYTES: u64 = 4 << 20;

/// The writes of a disk that wait for room on the host.
#[derive(Debug, Default)]
pub(super) struct StalledWrites(AtomicUsize);

impl StalledWrites {
    /// Counts `writes` that begin to wait. Returns whether no other write waited.
    fn add(&self, writes: usize) -> bool {
        writes > 0 && self.0.fetch_add(writes, Ordering::Relaxed) == 0
    }

    /// Counts out a write that is over. Returns whether no other write waits.
    fn remove(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

impl Lane {
    /// Counts the parked writes as held: the host has no room for them.
    pub(super) fn stall_parked(&mut self) {
        let mut writes = 0;
        for number in &self.parked {
            let task = self.tasks[*number as usize].as_mut().expect("it waits");
            writes += usize::from(!std::mem::replace(&mut task.stalled, true));
        }
        self.add_stalled(writes);
    }

    /// Counts one write as held: the host has no room for it.
    pub(super) fn stall(&self, task: &mut Task) {
        self.add_stalled(usize::from(!std::mem::replace(&mut task.stalled, true)));
    }

    fn add_stalled(&self, writes: usize) {
        if self.disk.stalled_writes.add(writes) {
            let path = self.top_path().display();
            log::warn!("{path}: the host is full: {writes} writes are held until there is room");
        }
    }

    /// Counts out a held write that is over. `done`: it found room.
    pub(super) fn end_stall(&mut self, done: bool) {
        if self.disk.stalled_writes.remove() && done {
            self.log_space_available();
        }
    }

    /// Logs, once, that writes fail because the host has no room.
    pub(super) fn log_no_space(&mut self) {
        if !std::mem::replace(&mut self.no_space_logged, true) {
            log::error!("{}: the host is full: writes fail until there is room", self.top_path().display());
        }
    }

    /// Looks once in a while whether the host has room again, after the log said that writes fail.
    pub(super) fn check_host_space(&mut self) {
        let top = self.disk.version().top().filter(|_| self.no_space_logged);
        let room = top.and_then(|top| top.image.file().file_system_space().ok());
        if room.is_some_and(|room| room.available >= MIN_FREE_BYTES) {
            self.no_space_logged = false;
            self.log_space_available();
        }
    }

    /// Logs that writes find room again.
    pub(super) fn log_space_available(&self) {
        log::info!("{}: there is room again: writes go on", self.top_path().display());
    }

    fn top_path(&self) -> &Path {
        self.disk.version().top().expect("only writable disks need room").image.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_are_told_apart() {
        let held = StalledWrites::default();
        assert!(!held.add(0));
        assert!(held.add(2));
        assert!(!held.add(1));
        assert!(!held.remove() && !held.remove());
        assert!(held.remove());
        assert!(held.add(1));
    }
}
