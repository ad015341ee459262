//! Writes and commits on a full file system: the number of writes that wait for space, and the log lines about them.
//!
//! Stalled writes are counted over all lanes of a disk. The log gets one line when the first write stalls, and one line
//! when no write stalls any more.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Error;
use crate::storage::File;

/// Minimum number of free bytes for which a file system counts as not full. A full file system may report a few free
/// bytes.
const MIN_FREE_BYTES: u64 = 4 << 20;

/// The number of a disk's writes that wait for space on the file system.
#[derive(Debug, Default)]
pub(super) struct StalledWrites(AtomicUsize);

impl StalledWrites {
    /// Adds `writes` writes to `image` that begin to wait. Logs a warning if no write waited before.
    pub(super) fn stall(&self, writes: usize, image: &Path) {
        if self.add(writes) {
            let path = image.display();
            log::warn!(
                "{path}: the host is full: {writes} writes wait until there is space; free space on its file system"
            );
        }
    }

    /// Removes one write to `image` from the count. If the write succeeded and no other write waits, logs that there is
    /// space again.
    pub(super) fn end(&self, succeeded: bool, image: &Path) {
        if self.remove() && succeeded {
            log_space_available(image);
        }
    }

    /// Adds `writes` to the count. Returns whether the count was zero before and no longer is.
    fn add(&self, writes: usize) -> bool {
        writes > 0 && self.0.fetch_add(writes, Ordering::Relaxed) == 0
    }

    /// Subtracts one write. Returns whether the count is zero now.
    fn remove(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

/// Records whether a lane has logged that writes fail because the file system is full.
#[derive(Debug, Default)]
pub(super) struct NoSpaceLog(bool);

impl NoSpaceLog {
    /// Logs that writes to `image` fail, unless that was logged since there last was space.
    pub(super) fn write_failed(&mut self, image: &Path) {
        if !std::mem::replace(&mut self.0, true) {
            log::error!("{}: the host is full: writes fail until there is space", image.display());
        }
    }

    /// Logs that the image could not grow and that writes fail, unless failing writes were logged already.
    pub(super) fn growth_failed(&mut self, error: &Error) {
        if !std::mem::replace(&mut self.0, true) {
            log::error!("{}; writes fail until then", error.line());
        }
    }

    /// Logs that there is space again, if failing writes were logged and the file system of `file` has space.
    pub(super) fn check_space(&mut self, file: &File, image: &Path) {
        let has_space = |file: &File| file.file_system_space().is_ok_and(|space| space.available >= MIN_FREE_BYTES);
        if self.0 && has_space(file) {
            self.space_available(image);
        }
    }

    /// Logs that there is space again, if failing writes were logged.
    pub(super) fn space_available(&mut self, image: &Path) {
        if std::mem::take(&mut self.0) {
            log_space_available(image);
        }
    }
}

/// A commit round that stays open because the file system is full.
#[derive(Debug, Default)]
pub(super) struct StalledCommit {
    stalled: bool,
    logged: bool,
}

impl StalledCommit {
    /// Keeps the round open. Logs this at the first stall after a commit.
    pub(super) fn stall(&mut self, image: &Path) {
        self.stalled = true;
        if !std::mem::replace(&mut self.logged, true) {
            let path = image.display();
            log::warn!("{path}: the host is full: a commit waits until there is space; free space on its file system");
        }
    }

    /// Whether a round is open.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Ends the stall. Returns whether a round was open; if so, the caller must retry or fail the round.
    pub(super) fn take(&mut self) -> bool {
        std::mem::take(&mut self.stalled)
    }

    /// Records that a commit has ended, so that the next stall is logged.
    pub(super) fn commit_ended(&mut self) {
        self.logged = false;
    }
}

fn log_space_available(image: &Path) {
    log::info!("{}: there is room again: writes continue", image.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_stalled_write_are_recognized() {
        let held = StalledWrites::default();
        assert!(!held.add(0));
        assert!(held.add(2));
        assert!(!held.add(1));
        assert!(!held.remove() && !held.remove());
        assert!(held.remove());
        assert!(held.add(1));
    }
}
