//! The begin and the end of a lane, and the size of the disk that the lane serves.

use std::sync::Arc;

use super::cached_reads::CachedReads;
use super::early_writeback::EarlyWriteback;
use super::job::{JobKind, Jobs};
use super::lane::Lane;
use super::lane_gate::LaneGate;
use super::lane_versions::LaneVersions;
use super::mailbox::{GrowthResult, LaneEvent, Mailbox};
use super::op_queue::OpQueue;
use super::punch::PunchQueue;
use super::readahead::Readahead;
use super::served_version::ServedVersion;
use super::shared::Disk;
use super::stalled_writes::{NoSpaceLog, StalledCommit};
use super::task_ops::TaskOps;
use super::task_table::{MAX_TASKS, TaskTable};
use crate::chain::{FrozenCacheHandle, PlanBuffer};
use crate::error::{Error, Result};
use crate::storage::{Engine, EngineKind, PageCache};

/// The engine of a lane, and its page cache if there is one.
type LaneEngine = (Box<dyn Engine>, Option<Box<dyn PageCache>>);

impl Disk {
    /// Creates a lane for one queue. Only one thread may use it.
    ///
    /// # Errors
    /// - `Io` if the engine cannot be created, a file cannot be registered, or the process has no file descriptors
    ///   left.
    /// - `Unsupported` if the kernel has no io_uring and `kind` requires it.
    pub fn lane(self: &Arc<Self>, kind: EngineKind, depth: usize) -> Result<Lane> {
        let mailbox = Arc::new(Mailbox::new()?);
        let (current, version, (engine, page_cache)) = loop {
            let version = self.version();
            let engine = self.engine(&version, kind, depth)?;
            // A version that is published while the lane is added waits for this lock. So the lane begins with the
            // version of its engine, and gets the event `Adopt` for each later one.
            let current = self.current_locked();
            if current.epoch() == version.epoch() {
                break (current, version, engine);
            }
        };
        let counters = self.lane_counters.add_lane();
        let (mut ops, mut cached_reads) = (OpQueue::new(engine), CachedReads::new(page_cache, counters.clone()));
        let added = self.lanes.add(&mailbox, current.epoch(), &mut ops, &mut cached_reads);
        let (id, held) = added.map_err(|e| Error::io("cannot register a file with the I/O engine", e))?;
        drop(current);
        let versions = LaneVersions::new(version);
        Ok(Lane {
            ops,
            disk: self.clone(),
            id,
            mailbox,
            versions,
            gate: LaneGate::new(held),
            tasks: TaskTable::new(),
            parked: Vec::new(),
            awaiting_commit: Vec::new(),
            jobs: Jobs::default(),
            stalled_commit: StalledCommit::new(self.full_host.clone()),
            no_space_log: NoSpaceLog::new(self.full_host.clone()),
            punch_queue: PunchQueue::default(),
            cached_reads,
            readahead: Readahead::new(),
            early_writeback: EarlyWriteback::default(),
            ticks: 0,
            submitted_since_reap: false,
            answers: Vec::with_capacity(MAX_TASKS),
            frozen_cache: FrozenCacheHandle::default(),
            plan: PlanBuffer::default(),
            task_ops: TaskOps::new(counters),
            completions: Vec::with_capacity(MAX_TASKS),
        })
    }

    /// Creates an engine and its page cache, and registers all files of a version in both. There is no page cache if
    /// the disk does not read from it, or the engine has none.
    fn engine(&self, version: &ServedVersion, kind: EngineKind, depth: usize) -> Result<LaneEngine> {
        let mut engine = self.env().engine(kind, depth)?;
        let mut page_cache = if self.reads_page_cache() { engine.page_cache() } else { None };
        for (slot, file) in version.files() {
            let mut registered = engine.register(slot, file);
            if let Some(page_cache) = &mut page_cache {
                registered = registered.and_then(|()| page_cache.register(slot, file));
            }
            registered
                .map_err(|e| Error::io("cannot register the file with the I/O engine", e).at_path(file.path()))?;
        }
        Ok((engine, page_cache))
    }
}

impl Lane {
    /// Size of the disk in sectors, as the lane plans its requests. The lane adopts a new size later than
    /// [`Disk::capacity`] reports it, so requests are checked with this one.
    pub fn capacity(&self) -> u64 {
        self.versions.current().sectors()
    }

    /// Takes the lane out of service: waits for its operations, and ends the jobs and locks for which other lanes may
    /// wait. Requests in flight are not answered.
    pub fn retire(&mut self) {
        // An operation that is still in flight must not reach a file that a change has taken out of use.
        self.ops.finish();
        if self.jobs.cancel(JobKind::Commit) {
            // The abandoned commit has poisoned the image.
            while self.disk.group_commit.finish(false).is_some() {}
        } else if self.stalled_commit.is_stalled() {
            self.disk.group_commit.hand_over(&self.mailbox);
        }
        self.disk.group_commit.leave(&self.mailbox);
        if self.jobs.cancel(JobKind::Growth) {
            self.disk.lanes.broadcast(LaneEvent::GrowthEnded(GrowthResult::Failed));
        }
        self.disk.punch_lock.release(&self.mailbox);
        self.disk.lanes.remove(self.id);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.retire();
    }
}
