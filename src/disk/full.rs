//! Writes that are held while the host has no room, counted over all lanes: the log gets one line when the first is held,
//! and one when the last is over.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lane::Lane;
use super::task::Task;

/// Bytes of room with which the host counts as no longer full: a file system that is full may report a few.
const ENOUGH: u64 = 4 << 20;

/// The writes of a disk that wait for room on the host.
#[derive(Debug, Default)]
pub(super) struct HeldWrites(AtomicUsize);

impl HeldWrites {
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
    pub(super) fn hold_parked(&mut self) {
        let mut writes = 0;
        for number in &self.parked {
            let task = self.tasks[*number as usize].as_mut().expect("it waits");
            writes += usize::from(!std::mem::replace(&mut task.held_by_host, true));
        }
        self.add_held(writes);
    }

    /// Counts one write as held: the host has no room for it.
    pub(super) fn hold(&self, task: &mut Task) {
        self.add_held(usize::from(!std::mem::replace(&mut task.held_by_host, true)));
    }

    fn add_held(&self, writes: usize) {
        if self.disk.held_writes.add(writes) {
            let path = self.top_path().display();
            log::warn!("{path}: the host is full: {writes} writes are held until there is room");
        }
    }

    /// Counts out a held write that is over. `done`: it found room.
    pub(super) fn release_held(&mut self, done: bool) {
        if self.disk.held_writes.remove() && done {
            self.log_room();
        }
    }

    /// Logs, once, that writes fail because the host has no room.
    pub(super) fn log_refused(&mut self) {
        if !std::mem::replace(&mut self.told_full, true) {
            log::error!("{}: the host is full: writes fail until there is room", self.top_path().display());
        }
    }

    /// Looks once in a while whether the host has room again, after the log said that writes fail.
    pub(super) fn look_for_room(&mut self) {
        let top = self.disk.version().top().filter(|_| self.told_full);
        let room = top.and_then(|top| top.image.file().file_system_space().ok());
        if room.is_some_and(|room| room.available >= ENOUGH) {
            self.told_full = false;
            self.log_room();
        }
    }

    /// Logs that writes find room again.
    pub(super) fn log_room(&self) {
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
        let held = HeldWrites::default();
        assert!(!held.add(0));
        assert!(held.add(2));
        assert!(!held.add(1));
        assert!(!held.remove() && !held.remove());
        assert!(held.remove());
        assert!(held.add(1));
    }
}
