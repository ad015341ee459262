//! The disk that all queues share.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::file_table::FileTable;
use super::group_commit::GroupCommit;
use super::lane_table::LaneTable;
use super::lost_names::LostNames;
use super::mailbox::{LaneEvent, Mailbox};
use super::options::{DiskOptions, WhenFull};
use super::punch::PunchLock;
use super::served_version::ServedVersion;
use super::slot_table::SlotTable;
use super::stalled_writes::{FullHost, StalledWrites};
use super::statistics::lane_registry::LaneRegistry;
use crate::chain::Version;
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventReporter;
use crate::image::{self, Commit};
use crate::mutant::{self, Mutant};
use crate::storage::{Env, FileSlot};

/// Time for which [`Disk::close`] waits for a change in progress.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A chain that is being served.
pub struct Disk {
    env: Arc<dyn Env>,
    /// The version that was published last. Lanes plan with it as soon as they have adopted it.
    current: Mutex<Arc<ServedVersion>>,
    capacity: AtomicU64,
    is_read_only: bool,
    slots: Mutex<SlotTable>,
    pub(super) lanes: LaneTable,
    /// Whether a change of the version is in progress.
    pub(super) is_changing: AtomicBool,
    /// Whether [`Disk::close`] was called. No change begins then, unless `close` ran out of time waiting for an earlier
    /// change.
    pub(super) is_closed: AtomicBool,
    pub(super) group_commit: GroupCommit,
    pub(super) punch_lock: PunchLock,
    pub(super) full_host: Arc<FullHost>,
    pub(super) stalled_writes: StalledWrites,
    write_through: AtomicBool,
    options: DiskOptions,
    serial: [u8; 20],
    counters: DiskCounters,
    pub(super) lane_counters: LaneRegistry,
    lost_names: LostNames,
}

/// Counters for statistics.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Commits that succeeded.
    pub commits: AtomicU64,
    /// Syncs of all commits, also of those that failed, except commits of lanes that wait for space and are repeated.
    pub syncs: AtomicU64,
    /// Bytes that were prefetched for sequential reads.
    pub readahead_bytes: AtomicU64,
    /// Hints to the kernel to start writeback before a flush.
    pub early_writebacks: AtomicU64,
}

impl Disk {
    pub(super) fn new(
        env: Arc<dyn Env>,
        version: Version,
        files: FileTable,
        serial: [u8; 20],
        options: &DiskOptions,
    ) -> Disk {
        let full_host = FullHost::new(&options.path, options.events.clone());
        Disk {
            env,
            capacity: AtomicU64::new(version.sectors()),
            is_read_only: version.top().is_none(),
            slots: Mutex::new(SlotTable::new(version.files().map(|(slot, _)| slot))),
            current: Mutex::new(Arc::new(ServedVersion::new(0, version, files))),
            lanes: LaneTable::default(),
            is_changing: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            group_commit: GroupCommit::default(),
            punch_lock: PunchLock::default(),
            stalled_writes: StalledWrites::new(full_host.clone()),
            full_host,
            write_through: AtomicBool::new(options.write_through),
            options: options.clone(),
            serial,
            counters: DiskCounters::default(),
            lane_counters: LaneRegistry::default(),
            lost_names: LostNames::default(),
        }
    }

    /// The folder of the live journal; `None` if there is none.
    pub fn journal_folder(&self) -> Option<PathBuf> {
        self.version().top().and_then(|top| top.image.journal_folder().map(Path::to_owned))
    }

    /// Size of the disk in sectors.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Whether the disk refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// The serial, padded with zeros.
    pub fn serial(&self) -> &[u8; 20] {
        &self.serial
    }

    /// The current version of the disk.
    pub fn version(&self) -> Arc<ServedVersion> {
        self.current_locked().clone()
    }

    /// The current version of the disk, locked: no other version is published meanwhile.
    pub(super) fn current_locked(&self) -> MutexGuard<'_, Arc<ServedVersion>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a version the current one. The lanes have registered its files, and are asked to adopt it.
    pub(super) fn publish(&self, version: Arc<ServedVersion>) {
        let mut current = self.current_locked();
        self.capacity.store(version.sectors(), Ordering::Relaxed);
        assert_eq!(version.epoch(), current.epoch() + 1, "changes are serial");
        *current = version;
        self.lanes.end_registration();
        self.lanes.broadcast(LaneEvent::Adopt);
    }

    /// Takes a free file slot; `None` if all are in use. First frees the retired slots that no operation uses any more.
    pub(super) fn take_slot(&self) -> Option<FileSlot> {
        let oldest = self.lanes.oldest_version().unwrap_or(u32::MAX);
        let unused = self.slots().take_unused(oldest);
        unused.into_iter().for_each(|slot| self.free_slot(slot));
        let slot = self.slots().take()?;
        self.lane_counters.slot_taken(slot);
        Some(slot)
    }

    /// Frees a file slot, and removes its file from the engines. No operation uses the slot.
    pub(super) fn free_slot(&self, slot: FileSlot) {
        self.lanes.broadcast(LaneEvent::Unregister(slot));
        self.lane_counters.slot_freed(slot);
        self.slots().free(slot);
    }

    /// Records that no version from `epoch` on uses a slot, but that operations in flight may.
    pub(super) fn retire_slot(&self, slot: FileSlot, epoch: u32) {
        self.slots().retire(slot, epoch);
    }

    fn slots(&self) -> MutexGuard<'_, SlotTable> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free file slot for a new top that replaces the one at `path`.
    ///
    /// # Errors
    /// `Refused` if all are in use.
    pub(super) fn take_slot_for(&self, path: &Path) -> Result<FileSlot> {
        let none = || Error::new(ErrorKind::Refused, "all file slots of the disk are in use").at_path(path);
        self.take_slot().ok_or_else(none)
    }

    /// The options with which the disk was opened.
    pub(super) fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Whether reads are copied from the page cache if possible.
    pub(super) fn reads_page_cache(&self) -> bool {
        self.options.page_cache_reads
    }

    /// The environment of the disk.
    pub(super) fn env(&self) -> &dyn Env {
        &*self.env
    }

    /// Reporter of the disk's events.
    pub fn events(&self) -> &EventReporter {
        &self.options.events
    }

    /// Whether writes or commits wait, or writes fail, because the file system is full.
    pub fn is_full(&self) -> bool {
        self.full_host.is_full()
    }

    /// Whether the top is poisoned, so that the disk refuses writes.
    pub fn is_poisoned(&self) -> bool {
        self.version().top().is_some_and(|top| top.image.is_poisoned())
    }

    /// Poisons the top of a version that a lane uses. If a change has replaced the top meanwhile, poisons the new one, too:
    /// flushes promise that the writes to both are durable. A change that opens the file of the top again calls this
    /// function after it has published the image, if the old one is poisoned.
    pub(super) fn poison_top(&self, version: &ServedVersion, why: &str) {
        let top = version.writable_top();
        top.image.poison(why);
        let current = self.version();
        let now = current.writable_top();
        if !Arc::ptr_eq(&now.image, &top.image) {
            now.image.poison(why);
        }
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// Sets whether a write is answered only when it is durable. A write checks this after its bytes have moved, so
    /// the call also applies to writes in flight.
    pub fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::SeqCst);
    }

    /// Whether a write is answered only when it is durable.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    /// Whether writes wait while the file system is full.
    pub(super) fn parks_when_full(&self) -> bool {
        self.options.when_full == WhenFull::Park
    }

    /// Leads the running round on the calling thread, whose mailbox is `mailbox`. Leaves the next round to its waiters.
    /// If the file system is full and the disk parks writes, leaves the running round to its other waiters, too,
    /// because lanes can wait for space.
    pub(super) fn lead_commit(&self, mailbox: &Arc<Mailbox>) -> Result<()> {
        // While the round runs, no change replaces the file that takes the writes.
        let version = self.version();
        let top = version.writable_top();
        let mut commit = Commit::new(top.image.clone(), top.slot);
        let result =
            image::run_to_completion(&*self.env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops));
        self.record_commit(&result, commit.barriers());
        match &result {
            Err(e) if self.parks_when_full() && e.kind() == ErrorKind::NoSpace => self.group_commit.hand_over(mailbox),
            _ => self.group_commit.finish_and_hand_over(result.is_ok()),
        }
        result
    }

    /// Counts a commit, if it succeeded, and its syncs. Logs its failure.
    pub(super) fn record_commit(&self, result: &Result<()>, syncs: u32) {
        self.counters.syncs.fetch_add(u64::from(syncs), Ordering::Relaxed);
        match result {
            Ok(()) => {
                self.counters.commits.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) => log::error!("a commit failed: {}", e.line()),
        }
    }

    /// Commits and closes the image cleanly: the file then ends with a footer directly after its last block, or keeps
    /// its length if the file system has no space for that footer. All lanes must be dropped before this call.
    ///
    /// # Errors
    /// `Busy` if a change of the disk is still in progress after five seconds. Those of [`Disk::commit`], of cutting the
    /// file, and of removing the live journal; the next open then recovers the image.
    pub fn close(&self) -> Result<()> {
        // No change begins from here on. A change that is in progress ends soon, since there are no lanes.
        self.is_closed.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + CHANGE_TIMEOUT;
        while self.is_changing.load(Ordering::SeqCst) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let is_changing = self.is_changing.load(Ordering::SeqCst);
        // No version is published from here on, unless a change is in progress.
        let version = self.version();
        let Some(top) = version.top() else { return Ok(()) };
        if is_changing {
            let what = "a change of the disk is in progress; the next open for writing completes or undoes it";
            return Err(Error::new(ErrorKind::Busy, what).at_path(version.top_path()));
        }
        if mutant::enabled(Mutant::TrimFirst) {
            top.image.trim()?;
        }
        self.commit()?;
        // From here on, the space of blocks that were reserved and never written counts as free and is cut off.
        top.image.end_session();
        if mutant::enabled(Mutant::RemoveJournalFirst) {
            top.image.remove_journal()?;
        }
        top.image.trim()?;
        // The journal is removed after the stamp is cut off, since an image with a stamp but no journal is refused.
        top.image.remove_journal()
    }

    /// Checks that the name of each file of the chain still leads to it, and warns once of each that does not. Does
    /// nothing while a change of the disk is in progress, which may rename files.
    pub fn check_names(&self) {
        if self.is_changing.load(Ordering::SeqCst) {
            return;
        }
        self.lost_names.check(self.version().files());
    }
}
