//! The disk that all queues share.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::file_table::{FileTable, ServedFile};
use super::group_commit::GroupCommit;
use super::lost_names::LostNames;
use super::mailbox::{LaneEvent, Mailbox};
use super::options::{DiskOptions, WhenFull};
use super::punch::PunchLock;
use super::stalled_writes::StalledWrites;
use crate::chain::{Top, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Commit};
use crate::mutant::{self, Mutant};
use crate::storage::{Engine, EngineKind, Env, FileSlot, PageCache};

/// The engine of a lane, and its page cache if there is one.
type LaneEngine = (Box<dyn Engine>, Option<Box<dyn PageCache>>);

/// A chain that is being served.
pub struct Disk {
    env: Arc<dyn Env>,
    version: Version,
    files: FileTable,
    pub(super) group_commit: GroupCommit,
    pub(super) punch_lock: PunchLock,
    pub(super) stalled_writes: StalledWrites,
    /// Mailboxes of the lanes that exist.
    lanes: Mutex<Vec<Weak<Mailbox>>>,
    write_through: AtomicBool,
    when_full: WhenFull,
    page_cache_reads: bool,
    serial: [u8; 20],
    counters: DiskCounters,
    lost_names: LostNames,
}

/// Counters for statistics.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Commits that succeeded.
    pub commits: AtomicU64,
    /// Syncs of these commits.
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
        Disk {
            env,
            version,
            files,
            group_commit: GroupCommit::default(),
            punch_lock: PunchLock::default(),
            stalled_writes: StalledWrites::default(),
            lanes: Mutex::default(),
            write_through: AtomicBool::new(options.write_through),
            when_full: options.when_full,
            page_cache_reads: options.page_cache_reads,
            serial,
            counters: DiskCounters::default(),
            lost_names: LostNames::default(),
        }
    }

    /// The folder of the live journal; `None` if there is none.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.version.top().and_then(|top| top.image.journal_folder())
    }

    /// Size of the disk in sectors.
    pub fn capacity(&self) -> u64 {
        self.version.sectors()
    }

    /// Whether the disk refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.version.top().is_none()
    }

    /// The serial, padded with zeros.
    pub fn serial(&self) -> &[u8; 20] {
        &self.serial
    }

    /// The layers of the chain.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Counters since the disk was opened.
    pub fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// Sets whether a write is answered only when it is durable. Applies to requests that start later.
    pub fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::SeqCst);
    }

    /// Whether a write is answered only when it is durable.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    /// Whether writes wait while the file system is full.
    pub(super) fn parks_when_full(&self) -> bool {
        self.when_full == WhenFull::Park
    }

    /// The attributes of a file.
    #[inline]
    pub(super) fn file(&self, slot: FileSlot) -> &ServedFile {
        self.files.get(slot)
    }

    /// The writable layer. Only requests that write call this, and a read-only disk refuses these requests before.
    pub(super) fn writable_top(&self) -> &Top {
        self.version.top().expect("only a writable disk writes, commits or grows")
    }

    /// Path of the image that takes the writes.
    pub(super) fn top_path(&self) -> &Path {
        self.writable_top().image.path()
    }

    /// Creates an engine and its page cache, in which all files of the chain are registered. There is no page cache if
    /// [`DiskOptions::page_cache_reads`] is off, or the engine has none.
    pub(super) fn engine(&self, kind: EngineKind, depth: usize) -> Result<LaneEngine> {
        let mut engine = self.env.engine(kind, depth)?;
        let mut page_cache = if self.page_cache_reads { engine.page_cache() } else { None };
        for (slot, file) in self.version.files() {
            let mut registered = engine.register(slot, file);
            if let Some(page_cache) = &mut page_cache {
                registered = registered.and_then(|()| page_cache.register(slot, file));
            }
            registered
                .map_err(|e| Error::io("cannot register the file with the I/O engine", e).at_path(file.path()))?;
        }
        Ok((engine, page_cache))
    }

    /// Creates the mailbox of a new lane. It receives all events that are broadcast from now on.
    pub(super) fn add_mailbox(&self) -> Result<Arc<Mailbox>> {
        let mailbox = Arc::new(Mailbox::new()?);
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&mailbox));
        Ok(mailbox)
    }

    /// Posts an event to all lanes.
    pub(super) fn broadcast(&self, event: LaneEvent) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.retain(|lane| lane.upgrade().map(|m| m.post(event)).is_some());
    }

    /// Makes all completed writes durable, and waits until they are durable. Does not wait for space on a full file
    /// system: the calling thread has other work. If the disk parks writes, the flushes of lanes do not fail with the
    /// call; they wait for space.
    ///
    /// # Errors
    /// - `NoSpace` if the file system is full. No write is lost, and the call may be repeated.
    /// - `Io` if the commit failed, or if a commit that a lane led failed, also for lack of space.
    /// - `Poisoned` if a sync failed, now or earlier: completed writes may be lost.
    pub fn commit(&self) -> Result<()> {
        let Some(top) = self.version.top() else { return Ok(()) };
        let mailbox = Arc::new(Mailbox::new()?);
        let joined = self.group_commit.join(&mailbox);
        if joined.lead {
            return self.lead_commit(top, &mailbox);
        }
        self.group_commit.mark_urgent(&mailbox);
        loop {
            for event in mailbox.wait() {
                match event {
                    LaneEvent::Leaderless if self.group_commit.claim_lead() => return self.lead_commit(top, &mailbox),
                    LaneEvent::LeftRound { .. } => {
                        let what =
                            "the host is full: completed writes are not durable yet; free space on its file system";
                        return Err(Error::new(ErrorKind::NoSpace, what).at_path(top.image.path()));
                    }
                    LaneEvent::Committed { round, ok: true } if round == joined.round => return Ok(()),
                    LaneEvent::Committed { round, .. } if round == joined.round => {
                        top.image.check_poison()?;
                        return Err(Error::new(ErrorKind::Io, "a commit failed").at_path(top.image.path()));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Leads the running round on the calling thread, whose mailbox is `mailbox`. Leaves the next round to the lanes.
    /// If the file system is full, leaves the running round to the lanes, too, because lanes can wait for space.
    fn lead_commit(&self, top: &Top, mailbox: &Arc<Mailbox>) -> Result<()> {
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

    /// Counts a commit, and logs its failure.
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
    /// Those of [`Disk::commit`], and of cutting the file; the next open then recovers the image.
    pub fn close(&self) -> Result<()> {
        let Some(top) = self.version.top() else { return Ok(()) };
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

    /// Checks that the name of each file of the chain still leads to it, and warns once of each that does not.
    pub fn check_names(&self) {
        self.lost_names.check(self.version.files());
    }
}
