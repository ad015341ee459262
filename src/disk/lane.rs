//! The engine of one virtqueue: takes requests, advances them through their stages, answers them. A lane belongs to one
//! thread. Only `drain` and `retire` (also by the drop of a lane) wait for operations in flight.
//!
//! A read whose bitmaps are in memory takes no lock and allocates nothing: tasks, iovecs and plans are reused. Reads
//! from the page cache are copies (`cached_reads`). `docs/performance.md`, section 3, lists the measures that make a
//! queue fast and those that were dropped.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::cached_reads::CachedReads;
use super::early_writeback::EarlyWriteback;
use super::job::{FinishedJob, Job, JobKind, Jobs};
use super::lane_gate::LaneGate;
use super::lane_table::LaneId;
use super::lane_versions::LaneVersions;
use super::mailbox::{GrowthResult, LaneEvent, Mailbox};
use super::op_queue::OpQueue;
use super::punch::PunchQueue;
use super::readahead::Readahead;
use super::request::{Answer, Request, Work};
use super::shared::Disk;
use super::stalled_writes::{NoSpaceLog, StalledCommit};
use super::task::Token;
use super::task_ops::TaskOps;
use super::task_table::TaskTable;
use crate::chain::{FrozenCacheHandle, PlanBuffer};
use crate::error::ErrorKind;
use crate::image::{Commit, Growth};
use crate::storage::{Action, Completion, Engine};

/// Ticks between two commits in the background.
const COMMIT_TICKS: u32 = 5;

/// The engine of one virtqueue.
pub struct Lane {
    // Dropped first: it waits for the kernel, which may still write into memory that the tasks own.
    pub(super) ops: OpQueue,
    pub(super) disk: Arc<Disk>,
    pub(super) id: LaneId,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) versions: LaneVersions,
    pub(super) gate: LaneGate,
    pub(super) tasks: TaskTable,
    /// Tasks that wait until the file has grown or the file system has space.
    pub(super) parked: Vec<u32>,
    /// Tasks that wait for a commit.
    pub(super) awaiting_commit: Vec<u32>,
    pub(super) jobs: Jobs,
    pub(super) stalled_commit: StalledCommit,
    pub(super) no_space_log: NoSpaceLog,
    pub(super) punch_queue: PunchQueue,
    pub(super) cached_reads: CachedReads,
    pub(super) readahead: Readahead,
    pub(super) early_writeback: EarlyWriteback,
    pub(super) ticks: u32,
    /// Whether [`Lane::submit`] was called since completions were last reaped.
    pub(super) submitted_since_reap: bool,
    pub(super) answers: Vec<Answer>,
    pub(super) frozen_cache: FrozenCacheHandle,
    // These buffers are reused for their memory.
    pub(super) plan: PlanBuffer,
    pub(super) task_ops: TaskOps,
    pub(super) completions: Vec<Completion>,
}

impl Lane {
    /// The disk that the lane serves.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The engine that carries out the operations.
    pub fn engine(&self) -> &dyn Engine {
        &*self.ops.engine
    }

    /// Number of requests that may be pushed now.
    pub fn push_capacity(&self) -> usize {
        // Each queued read may turn out to need a task.
        if self.ops.has_no_backlog() { self.tasks.free() - self.cached_reads.len() } else { 0 }
    }

    /// Starts a request and advances it until it has to wait, without submitting operations. A read that may be a copy
    /// is only queued; the next `submit` plans it with the others. Requires that `push_capacity` is not zero.
    #[inline]
    pub fn push(&mut self, Request { tag, work }: Request) {
        let Work::Read { range, into } = work else { return self.start_request(Request { tag, work }) };
        if let Err(into) = self.cached_reads.queue(tag, range, into) {
            self.start_request(Request { tag, work: Work::Read { range, into } });
            self.track_read(range);
        }
    }

    /// Submits all pushed operations, and makes the copies of queued reads.
    ///
    /// # Errors
    /// The engine failed and cannot be used any more.
    pub fn submit(&mut self) -> io::Result<()> {
        self.submitted_since_reap = true;
        self.plan_cached_reads();
        // Operations are submitted before the copies, so that the kernel works while the copies are made.
        let mut result = self.ops.engine.submit();
        if result.is_ok() && self.copy_cached_reads() {
            result = self.ops.engine.submit();
        }
        // The lane may sleep now. Meanwhile it must not keep a replaced table of the frozen cache in memory.
        self.frozen_cache.release();
        result
    }

    /// Queries the kernel for the residency of pages, by system calls. To be called when all answers have been given.
    pub fn refresh_residency(&mut self) {
        self.cached_reads.query_residency();
    }

    /// Reaps completions and events, advances the requests and jobs concerned, and appends the answers. Never waits.
    ///
    /// # Errors
    /// The engine failed and cannot be used any more.
    pub fn poll(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        let mut may_punch = true;
        loop {
            let events = self.mailbox.take();
            let mut done = std::mem::take(&mut self.completions);
            self.ops.engine.reap(&mut done);
            // A read from the page cache completes in the submit; one that completes later waited for the disk.
            if !std::mem::take(&mut self.submitted_since_reap) && done.iter().any(|c| c.op.action == Action::Read) {
                self.readahead.read_waited();
            }
            let idle = events.is_empty() && done.is_empty() && self.cached_reads.len() == 0;
            for completion in done.drain(..) {
                self.dispatch_completion(completion);
            }
            self.completions = done;
            events.into_iter().for_each(|event| self.handle_event(event));
            if self.gate.is_closing() || self.versions.has_old() {
                self.report_progress();
            }
            self.hint_writeback();
            // A blocking engine would punch all pieces in this loop, and no other request would be served meanwhile.
            let punches = may_punch && self.start_next_punch();
            may_punch &= !punches || self.ops.engine.wake_fd().is_some();
            self.ops.push_backlog();
            answers.append(&mut self.answers);
            if idle && !punches {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// A descriptor that is readable while completions of operations in flight may be available; `None` if the engine
    /// has no such descriptor, as the blocking engine, whose `submit` completes all operations.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ops.engine.wake_fd()
    }

    /// A descriptor that is readable while the mailbox has events.
    pub fn mailbox_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.fd()
    }

    /// Whether nothing is in flight and all requests have been answered.
    pub fn is_idle(&self) -> bool {
        let no_request = self.tasks.is_empty() && self.cached_reads.len() == 0 && self.answers.is_empty();
        no_request
            && self.early_writeback.epoch_in_flight().is_none()
            && !self.jobs.is_running(JobKind::Commit)
            && !self.stalled_commit.is_stalled()
            && !self.jobs.is_running(JobKind::Growth)
    }

    /// Waits until the lane is idle. Requests of this lane that wait for space on the file system fail.
    ///
    /// # Errors
    /// Those of [`Lane::poll`].
    pub fn drain(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        self.submit()?;
        loop {
            self.poll(answers)?;
            if self.is_idle() {
                // No round may wait for this lane to lead it: a background commit of the lane can still be joined.
                self.disk.group_commit.leave(&self.mailbox);
                // Takes the events up to now, which must not reach the flushes of the next ring. An event may offer the
                // lead of a round.
                self.poll(answers)?;
                if self.is_idle() {
                    return Ok(());
                }
            }
            if self.ops.engine.outstanding() > 0 {
                self.ops.engine.wait()?;
            } else if self.stalled_commit.take() {
                self.stalled_commit.commit_ended();
                self.disk.group_commit.hand_over(&self.mailbox);
            } else if !self.parked.is_empty() && !self.is_growing() {
                let parked = std::mem::take(&mut self.parked);
                self.resume_tasks(parked, false);
            } else if !self.has_queued_punch() {
                // All remaining requests wait for another lane or a live operation.
                self.disk.group_commit.mark_urgent(&self.mailbox);
                self.mailbox.sleep();
            }
        }
    }

    /// Whether this lane or another one carries out a step of growth.
    fn is_growing(&self) -> bool {
        self.jobs.is_running(JobKind::Growth) || self.versions.current().top().is_some_and(|top| top.image.is_growing())
    }

    fn dispatch_completion(&mut self, completion: Completion) {
        match Token::unpack(completion.op.token) {
            Token::Task { task, detail } => self.op_completed(task, detail, completion),
            Token::Commit => self.job_op_completed(JobKind::Commit, completion.result),
            Token::Growth => self.job_op_completed(JobKind::Growth, completion.result),
            Token::EarlyWriteback => {
                let epoch = self.early_writeback.epoch_in_flight().expect("a hint was pushed");
                if let Err(e) = self.early_writeback.hint_completed(completion.result) {
                    self.disk.poison_top(self.versions.of(epoch), &format!("the host could not write ({e})"));
                }
            }
        }
    }

    fn handle_event(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Committed { round, ok } => self.round_ended(round, ok),
            LaneEvent::LeftRound { round } => self.round_ended(round, false),
            LaneEvent::Leaderless => {
                if self.disk.group_commit.claim_lead() {
                    self.lead_commit();
                }
            }
            LaneEvent::GrowthEnded(GrowthResult::NoSpace) if self.disk.parks_when_full() => self.stall_parked(),
            LaneEvent::GrowthEnded(result) => {
                let parked = std::mem::take(&mut self.parked);
                if result == GrowthResult::Grown {
                    self.no_space_log.space_available(self.versions.current().top_path());
                }
                self.resume_tasks(parked, result == GrowthResult::Grown);
            }
            LaneEvent::PunchLockGranted => {
                let number = self.punch_queue.granted();
                self.advance(number);
            }
            LaneEvent::Register(change) => {
                self.disk.lanes.register_in(change, self.id, &mut self.ops, &mut self.cached_reads);
            }
            LaneEvent::Unregister(slot) => {
                self.cached_reads.unregister(slot);
                self.ops.unregister(slot);
            }
            LaneEvent::Hold(range) => self.gate.close(range),
            LaneEvent::Adopt => self.versions.adopt(self.disk.version()),
            LaneEvent::Open => {
                let waiting = self.gate.open();
                self.resume_tasks(waiting, true);
            }
        }
    }

    /// Reports to the change in progress whether writes are held, and which versions the lane uses.
    fn report_progress(&mut self) {
        let is_held = !self.jobs.is_running(JobKind::Growth) && self.gate.take_report(&self.tasks);
        let in_use = self.tasks.epochs().chain(self.jobs.epochs()).chain(self.early_writeback.epoch_in_flight());
        let adopted = self.versions.current().epoch();
        let oldest = in_use.fold(adopted, u32::min);
        self.versions.drop_before(oldest);
        if self.versions.note_report(oldest) || is_held {
            self.disk.lanes.report_progress(self.id, is_held, adopted, oldest);
        }
    }

    /// Resumes the tasks that wait for a round.
    fn round_ended(&mut self, round: u64, ok: bool) {
        let tasks = &self.tasks;
        let of_round = |n: &u32| tasks.get(*n).is_some_and(|t| t.commit_round == round);
        let (mine, others) = std::mem::take(&mut self.awaiting_commit).into_iter().partition(of_round);
        self.awaiting_commit = others;
        self.resume_tasks(mine, ok);
    }

    /// Starts the next piece if one is queued and the punch lock is free. Returns whether it did.
    fn start_next_punch(&mut self) -> bool {
        let next = self.punch_queue.start_next(&self.disk.punch_lock, &self.mailbox);
        if let Some(number) = next {
            self.advance(number);
        }
        next.is_some()
    }

    /// Whether a piece of a discard or zeroing is queued for which the next [`Lane::poll`] requests the punch lock.
    pub fn has_queued_punch(&self) -> bool {
        self.punch_queue.has_queued()
    }

    fn start_job(&mut self, job: Job) {
        if let Some(finished) = self.jobs.start(job, self.versions.current().epoch(), &mut self.ops) {
            self.job_finished(finished);
        }
    }

    fn job_op_completed(&mut self, kind: JobKind, result: io::Result<()>) {
        if let Some(finished) = self.jobs.op_completed(kind, result, &mut self.ops) {
            self.job_finished(finished);
        }
    }

    fn job_finished(&mut self, FinishedJob { job, result }: FinishedJob) {
        let is_full = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace);
        match (job, result) {
            // The round stays open, and the next tick leads a new commit for it, unless `drain` hands the round over
            // first. Nothing was acknowledged, and all that the failed commit had taken is dirty again.
            (Job::Commit(_), _) if is_full && self.disk.parks_when_full() => {
                self.disk.group_commit.stall();
                self.stalled_commit.stall(self.versions.current().top_path());
            }
            (Job::Commit(commit), result) => {
                self.stalled_commit.commit_ended();
                self.disk.record_commit(&result, commit.barriers());
                self.end_round(result.is_ok());
            }
            (Job::Growth(_), Ok(())) => self.disk.lanes.broadcast(LaneEvent::GrowthEnded(GrowthResult::Grown)),
            (Job::Growth(_), Err(e)) if is_full => {
                if !self.disk.parks_when_full() {
                    self.no_space_log.growth_failed(&e);
                }
                self.disk.lanes.broadcast(LaneEvent::GrowthEnded(GrowthResult::NoSpace));
            }
            (Job::Growth(_), Err(e)) => {
                log::error!("{}", e.line());
                self.disk.lanes.broadcast(LaneEvent::GrowthEnded(GrowthResult::Failed));
            }
        }
    }

    /// Starts a step of growth if one is due and none is in progress. Returns whether a step was started here or is in
    /// progress: then `GrowthEnded` announces its end.
    pub(super) fn ensure_growth(&mut self) -> bool {
        let top = self.versions.current().writable_top();
        if let Some(growth) = Growth::begin(&top.image, top.slot) {
            self.start_job(Job::Growth(growth));
            return true;
        }
        top.image.is_growing()
    }

    /// Leads the commit of the running round. While a round runs, no other version is published. The lane may not have
    /// adopted the current version yet, and a commit of an older top would not cover the writes to the new top.
    pub(super) fn lead_commit(&mut self) {
        self.versions.adopt(self.disk.version());
        let top = self.versions.current().writable_top();
        self.start_job(Job::Commit(Commit::new(top.image.clone(), top.slot)));
    }

    /// Ends the round that this lane leads, and leads the next one if flushes wait for it.
    fn end_round(&mut self, ok: bool) {
        if self.disk.group_commit.finish(ok).is_some() {
            self.lead_commit();
        }
    }

    /// Requests a commit for which no request waits. The commit starts now, or after the running round, or when held
    /// rounds are released.
    pub(super) fn start_background_commit(&mut self) {
        if self.disk.group_commit.join(&self.mailbox).lead {
            self.lead_commit();
        }
    }

    /// Does periodic work; to be called once a second.
    ///
    /// - Retries writes and commits that found the file system full.
    /// - Every few seconds makes writes durable that were not flushed. This bounds the writes that a power cut can
    ///   lose, and the marks that the live journal has to hold.
    pub fn tick(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        self.resume_tasks(parked, true);
        if self.stalled_commit.take() {
            self.lead_commit();
        }
        let top = self.versions.current().top();
        if let Some(top) = top {
            self.no_space_log.check_space(top.image.file(), top.image.path());
        }
        self.ticks = (self.ticks + 1) % COMMIT_TICKS;
        if self.ticks == 0 && top.is_some_and(|top| top.image.is_dirty() && !top.image.is_poisoned()) {
            self.start_background_commit();
        }
        // Without requests no other call submits. An engine that fails here fails again in the next call that reports
        // the failure.
        let _ = self.submit();
    }
}
