//! Writes and commits on a full file system: the number of writes that wait for space, the log lines about them, and
//! the events of a full and a no longer full host.
//!
//! Stalled writes are counted over all lanes of a disk. The log gets one line when the first write stalls, and one line
//! when the last stalled write succeeds. The host of a disk counts as full ([`FullHost`]) while a write or a commit
//! waits, or while a lane's writes fail.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::event::{DiskEvent, EventReporter};
use crate::storage::File;

/// Minimum number of free bytes for which a file system counts as not full. A full file system may report a few free
/// bytes.
const MIN_FREE_BYTES: u64 = 4 << 20;

/// The number of writes, commits and lanes of a disk that lack space. Reports when the number is zero no more, and when
/// it becomes zero.
#[derive(Debug)]
pub(super) struct FullHost {
    image: PathBuf,
    events: EventReporter,
    /// The lock is held while an event is reported, so that events are reported in the order of the changes.
    lacking: Mutex<usize>,
}

impl FullHost {
    /// Creates the counter of a disk with `image` as its top.
    pub(super) fn new(image: &Path, events: EventReporter) -> Arc<FullHost> {
        Arc::new(FullHost { image: image.to_path_buf(), events, lacking: Mutex::default() })
    }

    /// Whether the number is not zero.
    pub(super) fn is_full(&self) -> bool {
        *self.lacking.lock().unwrap_or_else(PoisonError::into_inner) > 0
    }

    fn add(&self, count: usize) {
        let mut lacking = self.lacking.lock().unwrap_or_else(PoisonError::into_inner);
        if *lacking == 0 && count > 0 {
            self.events.report(DiskEvent::DiskFull { path: self.image.clone() });
        }
        *lacking += count;
    }

    fn remove_one(&self) {
        let mut lacking = self.lacking.lock().unwrap_or_else(PoisonError::into_inner);
        *lacking -= 1;
        if *lacking == 0 {
            self.events.report(DiskEvent::RoomAgain { path: self.image.clone() });
        }
    }
}

/// One commit or lane that lacks space. Dropping the mark removes the commit or lane from the count.
#[derive(Debug)]
struct FullMark(Arc<FullHost>);

impl FullMark {
    /// Sets `mark` unless it is set. Returns whether it was not set.
    fn set(mark: &mut Option<FullMark>, host: &Arc<FullHost>) -> bool {
        let is_first = mark.is_none();
        if is_first {
            host.add(1);
            *mark = Some(FullMark(host.clone()));
        }
        is_first
    }
}

impl Drop for FullMark {
    fn drop(&mut self) {
        self.0.remove_one();
    }
}

/// The number of a disk's writes that wait for space on the file system.
#[derive(Debug)]
pub(super) struct StalledWrites {
    count: AtomicUsize,
    host: Arc<FullHost>,
}

impl StalledWrites {
    /// Creates the count, which is zero.
    pub(super) fn new(host: Arc<FullHost>) -> StalledWrites {
        StalledWrites { count: AtomicUsize::new(0), host }
    }

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

    /// Number of writes that wait now.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed) as u64
    }

    /// Adds `writes` to the count. Returns whether the count was zero before and no longer is.
    fn add(&self, writes: usize) -> bool {
        self.host.add(writes);
        writes > 0 && self.count.fetch_add(writes, Ordering::Relaxed) == 0
    }

    /// Subtracts one write. Returns whether the count is zero now.
    fn remove(&self) -> bool {
        self.host.remove_one();
        self.count.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

/// Records whether a lane has logged that writes fail because the file system is full.
#[derive(Debug)]
pub(super) struct NoSpaceLog {
    host: Arc<FullHost>,
    /// Set if failing writes were logged.
    mark: Option<FullMark>,
}

impl NoSpaceLog {
    /// Creates the record of a lane of which nothing was logged.
    pub(super) fn new(host: Arc<FullHost>) -> NoSpaceLog {
        NoSpaceLog { host, mark: None }
    }

    /// Logs that writes to `image` fail, unless that was logged since there last was space.
    pub(super) fn write_failed(&mut self, image: &Path) {
        if FullMark::set(&mut self.mark, &self.host) {
            log::error!("{}: the host is full: writes fail until there is space", image.display());
        }
    }

    /// Logs that the image could not grow and that writes fail, unless failing writes were logged already.
    pub(super) fn growth_failed(&mut self, error: &Error) {
        if FullMark::set(&mut self.mark, &self.host) {
            log::error!("{}; writes fail until then", error.line());
        }
    }

    /// Logs that there is space again, if failing writes were logged and the file system of `file` has space.
    pub(super) fn check_space(&mut self, file: &File, image: &Path) {
        let has_space = |file: &File| file.file_system_space().is_ok_and(|space| space.available >= MIN_FREE_BYTES);
        if self.mark.is_some() && has_space(file) {
            self.space_available(image);
        }
    }

    /// Logs that there is space again, if failing writes were logged.
    pub(super) fn space_available(&mut self, image: &Path) {
        if self.mark.take().is_some() {
            log_space_available(image);
        }
    }
}

/// A commit round that stays open because the file system is full.
#[derive(Debug)]
pub(super) struct StalledCommit {
    stalled: bool,
    host: Arc<FullHost>,
    /// Set at the first stall, until a commit succeeds or fails for another reason than space, or the lane hands the
    /// round over.
    mark: Option<FullMark>,
}

impl StalledCommit {
    /// Creates the state of a lane without a stalled round.
    pub(super) fn new(host: Arc<FullHost>) -> StalledCommit {
        StalledCommit { stalled: false, host, mark: None }
    }

    /// Keeps the round open. Logs this at the first stall since [`StalledCommit::commit_ended`].
    pub(super) fn stall(&mut self, image: &Path) {
        self.stalled = true;
        if FullMark::set(&mut self.mark, &self.host) {
            let path = image.display();
            log::warn!("{path}: the host is full: a commit waits until there is space; free space on its file system");
        }
    }

    /// Whether a round waits for space.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Ends the stall. Returns whether a round waited for space; if so, the caller must lead the round again or hand it
    /// over.
    pub(super) fn take(&mut self) -> bool {
        std::mem::take(&mut self.stalled)
    }

    /// Records that a commit succeeded or failed for another reason than space, or that the round was handed over. The
    /// next stall is logged.
    pub(super) fn commit_ended(&mut self) {
        self.mark = None;
    }
}

fn log_space_available(image: &Path) {
    log::info!("{}: there is room again: writes continue", image.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a host, and the list of its events: true for full, false for room again.
    fn observed() -> (Arc<FullHost>, Arc<Mutex<Vec<bool>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        let record = move |event| seen.lock().unwrap().push(matches!(event, DiskEvent::DiskFull { .. }));
        (FullHost::new(Path::new("/x.vhd"), EventReporter::new(record)), events)
    }

    #[test]
    fn the_first_and_the_last_stalled_write_are_recognized() {
        let (host, events) = observed();
        let held = StalledWrites::new(host);
        assert!(!held.add(0));
        assert!(held.add(2));
        assert!(!held.add(1));
        assert!(!held.remove() && !held.remove());
        assert!(held.remove());
        assert!(held.add(1));
        assert_eq!(*events.lock().unwrap(), [true, false, true]);
    }

    #[test]
    fn a_host_is_full_as_long_as_one_write_commit_or_lane_lacks_space() {
        let (host, events) = observed();
        let writes = StalledWrites::new(host.clone());
        let (mut commit, mut lane) = (StalledCommit::new(host.clone()), NoSpaceLog::new(host.clone()));
        let image = Path::new("/x.vhd");
        writes.stall(1, image);
        commit.stall(image);
        lane.write_failed(image);
        lane.write_failed(image);
        writes.end(true, image);
        // While the commit is repeated, the host stays full.
        assert!(commit.take() && host.is_full());
        commit.stall(image);
        commit.commit_ended();
        assert_eq!(*events.lock().unwrap(), [true], "the lane still lacks space");
        lane.space_available(image);
        assert!(!host.is_full());
        commit.stall(image);
        drop(commit);
        assert_eq!(*events.lock().unwrap(), [true, false, true, false], "a lane that ends waits no longer");
    }
}
