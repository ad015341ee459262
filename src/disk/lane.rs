//! A queue's engine: takes requests, drives each through its stages, answers. Belongs to one thread, never waits.
//!
//! On the way of a read of known sectors there is no lock and no allocation (tasks, slices and plans are used again). What the
//! host has in memory is copied (`dense.rs`); for all else there is one system call, the `submit` of everything pushed.
//!
//! What was tried to make a queue faster, with the figures of `benches/serve` (medians, guest and server on a processor each of
//! two, page cache, November 2026, 4 KiB):
//!
//! - *Turns* (`device/virtqueue.rs`): all 32 reads of a queue in one: 150,000 a second, as the guest sees nothing before the last
//!   is done; 4 to 16: 275,000 to 348,000; half of what there is: 340,000 at any depth. Kept. (Since reads are copies, turns of
//!   8 at most, or of a third, do 7 to 11 per cent more with a processor each, and a quarter less where guest and server share
//!   theirs: more signals. Three quarters do 5 per cent less. None of them kept.)
//! - *Waiting for the guest* (`vhost/adaptive_poll.rs`): one read at a time from 67 to 16-20 us. Kept.
//! - *Writes to the page cache without the ring* (`storage/nowait.rs`): over old sectors from 100,000 to 300,000. Kept.
//! - *Copies instead of reads* (`storage/reader.rs`), *planned together* (`dense.rs`): chain of 16 from 460,000 to 720,000-830,000,
//!   then to 900,000 a second; of processor time from 2.1 to 1.1 us each. Kept.
//! - *Copies without tasks* (`dense.rs`): 5 per cent more; *no shared counts on the way* (`chain/frozen_cache.rs`, `payload.rs`): 2;
//!   *descriptors and headers of a turn fetched at once* (`device/virtqueue.rs`): 7 to 10; *slices in a box*: 6. Kept.
//! - *The pages of a turn found together, the next part fetched while one is copied* (`dense.rs`): from 1,000,000 to 1,550,000 a
//!   second. Kept. Lines fetched in one burst do 7 per cent less, into the first cache 10; no gain for two parts ahead. Planned
//!   together, runs fetched before: 1 per cent; *regions remembered* (`storage/map_cache.rs`): 3 in a chain of 64. Kept.
//! - *Copies of up to 2 MiB* (`storage/reader.rs`): of 16 layers 1 MiB from 5,300 to 16,000 a second. Kept.
//! - *Signals that wait while more is left than a guest takes to wake* (`device/interrupt.rs`): writes 6 to 10 per cent more, their
//!   median latency 10 per cent less, reads as before. Kept. Up to 60 us instead of 40: the same; 20 us: no gain.
//! - *Growth without syncs* (`image/growth.rs`), *reading ahead of cold streams* (`readahead.rs`). Kept.
//! - *Writing before the flush* (`early_writeback.rs`): with a flush after every 32 writes into a fresh child 10 to 20 per cent more, told
//!   every 8 writes (every 4: the same; every 16: 8 per cent). Kept.
//! - *preadv for each read, DEFER_TASKRUN* (`storage/uring.rs`): no gain. Not kept. Nor were *not to look for work while a sync
//!   runs* (a flush after every 32 writes was no faster), *the pages of writes fetched before* as those of reads are, *two
//!   looks at the clock a turn* instead of five, and *turns of 8 where the host is told early*.
//! - *The bitmaps of a commit in portions, the host told between them* (`image/commit.rs`): with a flush after every 32 writes 4 to
//!   10 per cent more. Not kept: a hint is of the whole file, and beside another queue's stream the flush would wait for that.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Disk;
use super::cached_reads::CachedReads;
use super::early_writeback::EarlyWriteback;
use super::job::{Job, JobKind, RunningJob};
use super::mailbox::{GrowthResult, LaneEvent, Mailbox};
use super::punch::PunchQueue;
use super::readahead::Readahead;
use super::request::{Answer, Request, Work};
use super::task::{Task, Token};
use crate::chain::PlanBuffer;
use crate::image::{Commit, Growth};
use crate::storage::{Action, Completion, Engine, GuestIovecs, Op};

/// Requests that a lane takes at once.
const MAX_TASKS: usize = 1024;
/// Ticks between two commits in the background.
const COMMIT_TICKS: u32 = 5;

/// One queue's share of a disk.
pub struct Lane {
    // Dropped first: it waits for the kernel, which may still write into memory that the tasks own.
    pub(super) engine: Box<dyn Engine>,
    pub(super) disk: Arc<Disk>,
    pub(super) mailbox: Arc<Mailbox>,
    /// Boxes, which are handed on and kept: a task is a few hundred bytes.
    pub(super) tasks: Vec<Option<Box<Task>>>,
    pub(super) free_tasks: Vec<u32>,
    /// Tasks that wait for room, and tasks that wait for a commit.
    pub(super) parked: Vec<u32>,
    awaiting_commit: Vec<u32>,
    pub(super) commit: Option<RunningJob>,
    pub(super) growth: Option<RunningJob>,
    /// The commit that this lane leads found the host full; the next tick tries it again.
    pub(super) commit_stalled: bool,
    pub(super) commit_stall_logged: bool,
    pub(super) punch_queue: PunchQueue,
    ticks: u32,
    /// Whether the log says that the host is full and writes fail.
    pub(super) no_space_logged: bool,
    /// Operations that found the engine full.
    backlog: VecDeque<Op>,
    pub(super) answers: Vec<Answer>,
    pub(super) readahead: Readahead,
    pub(super) early_writeback: EarlyWriteback,
    /// Whether something was handed over since completions were last looked for.
    submitted_since_reap: bool,
    // Used again and again.
    #[expect(clippy::vec_box, reason = "they come from `tasks` and go there")]
    pub(super) task_pool: Vec<Box<Task>>,
    pub(super) plan: PlanBuffer,
    /// Whether `plan` is that of the read that begins now.
    pub(super) planned: bool,
    completions: Vec<Completion>,
    pub(super) job_ops: Vec<Op>,
    pub(super) iovec_pool: Vec<GuestIovecs>,
    /// To be made with the next submit.
    pub(super) cached_reads: CachedReads,
}

impl Lane {
    pub(super) fn new(disk: Arc<Disk>, engine: Box<dyn Engine>, mailbox: Arc<Mailbox>) -> Lane {
        let count = u32::try_from(MAX_TASKS).expect("a small constant");
        Lane {
            engine,
            disk,
            mailbox,
            tasks: std::iter::repeat_with(|| None).take(MAX_TASKS).collect(),
            free_tasks: (0..count).rev().collect(),
            parked: Vec::new(),
            awaiting_commit: Vec::new(),
            commit: None,
            growth: None,
            commit_stalled: false,
            commit_stall_logged: false,
            punch_queue: PunchQueue::default(),
            ticks: 0,
            no_space_logged: false,
            backlog: VecDeque::new(),
            answers: Vec::with_capacity(MAX_TASKS),
            readahead: Readahead::new(),
            early_writeback: EarlyWriteback::default(),
            submitted_since_reap: false,
            task_pool: Vec::new(),
            plan: PlanBuffer::default(),
            planned: false,
            completions: Vec::with_capacity(MAX_TASKS),
            job_ops: Vec::new(),
            iovec_pool: Vec::new(),
            cached_reads: CachedReads::default(),
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What carries out operations.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// Requests that may be pushed now.
    pub fn push_capacity(&self) -> usize {
        // A read that may be copies may yet need a task.
        if self.backlog.is_empty() { self.free_tasks.len() - self.cached_reads.len() } else { 0 }
    }

    /// Takes a request and goes as far with it as memory allows, but for reads that may be copies, which are planned together with
    /// the next `submit`; no system call. There is `room`.
    #[inline]
    pub fn push(&mut self, Request { tag, work }: Request) {
        let Work::Read { range, into } = work else { return self.start_request(Request { tag, work }) };
        if let Err(into) = self.queue_cached_read(tag, range, into) {
            self.start_request(Request { tag, work: Work::Read { range, into } });
            self.track_read(range);
        }
    }

    /// Hands everything pushed to the host in one call, but for what is only to be copied: that is done here.
    ///
    /// # Errors
    /// The engine is of no further use.
    pub fn submit(&mut self) -> io::Result<()> {
        self.submitted_since_reap = true;
        self.plan_cached_reads();
        // First what takes the host a while.
        let mut result = self.engine.submit();
        if result.is_ok() && self.copy_cached_reads() {
            result = self.engine.submit();
        }
        // What is forgotten of the chain is not to stay in memory for a queue that sleeps.
        self.plan.release_cache();
        result
    }

    /// To be called when answers have been given, and nobody waits.
    pub fn refresh_residency(&mut self) {
        self.engine.query_residency();
    }

    /// Takes what is complete, goes on with its requests and jobs, and appends the answers. Never waits.
    ///
    /// # Errors
    /// The engine is of no further use.
    pub fn poll(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        let mut may_punch = true;
        loop {
            let letters = self.mailbox.take();
            let mut done = std::mem::take(&mut self.completions);
            self.engine.reap(&mut done);
            // What the host has in memory is complete as soon as it was handed over.
            if !std::mem::take(&mut self.submitted_since_reap) && done.iter().any(|c| c.op.action == Action::Read) {
                self.readahead.read_waited();
            }
            let idle = letters.is_empty() && done.is_empty() && self.cached_reads.len() == 0;
            for completion in done.drain(..) {
                self.dispatch_completion(completion);
            }
            self.completions = done;
            letters.into_iter().for_each(|letter| self.handle_event(letter));
            self.hint_writeback();
            // An engine that works while it is called would do all pieces here, and hold up the queue.
            let punches = may_punch && self.start_next_punch();
            may_punch &= !punches || self.engine.wake_fd().is_some();
            while let Some(op) = self.backlog.pop_front() {
                if let Err(op) = self.engine.push(op) {
                    self.backlog.push_front(op);
                    break;
                }
            }
            answers.append(&mut self.answers);
            if idle && !punches {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Readable while completions may be there.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.engine.wake_fd()
    }

    /// Readable while another lane has something to say.
    pub fn mailbox_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.fd()
    }

    /// Whether nothing is under way and no answer is owed.
    pub fn is_idle(&self) -> bool {
        let nothing = self.free_tasks.len() == MAX_TASKS && self.cached_reads.len() == 0 && self.answers.is_empty();
        nothing
            && !self.early_writeback.in_flight
            && self.commit.is_none()
            && !self.commit_stalled
            && self.growth.is_none()
    }

    /// Waits until the lane is idle.
    ///
    /// # Errors
    /// As `poll`.
    pub fn drain(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        self.submit()?;
        loop {
            self.poll(answers)?;
            if self.is_idle() {
                return Ok(());
            }
            if self.engine.outstanding() > 0 {
                self.engine.wait()?;
            } else if std::mem::take(&mut self.commit_stalled) {
                // There is no room, and no time to wait for it: the flushes of this commit fail.
                self.end_round(false);
            } else if !self.parked.is_empty() && self.growth.is_none() {
                // There is no room, and no time to wait for it.
                let parked = std::mem::take(&mut self.parked);
                self.resume_tasks(parked, false);
            } else if !self.has_queued_punch() {
                // Everything left waits for another lane.
                let _hurried = self.disk.group_commit.mark_urgent();
                self.mailbox.sleep();
            }
        }
    }

    fn dispatch_completion(&mut self, completion: Completion) {
        match Token::unpack(completion.op.token) {
            Token::Task { task, detail } => self.op_completed(task, detail, completion),
            Token::Commit => self.job_op_completed(JobKind::Commit, completion.result),
            Token::Growth => self.job_op_completed(JobKind::Growth, completion.result),
            Token::EarlyWriteback => self.writeback_hint_completed(completion.result),
        }
    }

    /// What other lanes have to say.
    fn handle_event(&mut self, letter: LaneEvent) {
        let concerned = match letter {
            LaneEvent::Committed { round, ok } => {
                let tasks = &self.tasks;
                let of = |n: &u32| tasks[*n as usize].as_ref().is_some_and(|t| t.commit_round == round);
                let (mine, others) = std::mem::take(&mut self.awaiting_commit).into_iter().partition(of);
                self.awaiting_commit = others;
                self.resume_tasks(mine, ok);
                return;
            }
            LaneEvent::GrowthEnded(GrowthResult::NoSpace) if self.disk.parks_when_full() => return self.stall_parked(),
            LaneEvent::GrowthEnded(grown) => grown == GrowthResult::Grown,
            LaneEvent::PunchLockGranted => return self.punch_lock_granted(),
        };
        let parked = std::mem::take(&mut self.parked);
        if concerned && std::mem::take(&mut self.no_space_logged) {
            self.log_space_available();
        }
        self.resume_tasks(parked, concerned);
    }

    /// Lets requests that waited go on, or fail.
    fn resume_tasks(&mut self, waited: Vec<u32>, ok: bool) {
        for number in waited {
            self.tasks[number as usize].as_mut().expect("it waits").failed |= !ok;
            self.advance(number);
        }
    }

    /// Leads the commit of a round that has just begun.
    pub(super) fn lead_commit(&mut self) {
        let top = self.disk.version().top().expect("only writable disks commit");
        let commit = Commit::new(top.image.clone(), top.slot);
        self.start_job(JobKind::Commit, Job::Commit(commit));
    }

    /// Begins a step of growth where one is due and nobody else is at it. False where there is room enough.
    pub(super) fn ensure_growth(&mut self) -> bool {
        let top = self.disk.version().top().expect("only writable disks grow");
        if let Some(growth) = Growth::begin(&top.image, top.slot) {
            self.start_job(JobKind::Growth, Job::Growth(growth));
            return true;
        }
        top.image.is_growing()
    }

    /// Parks a request until the file has grown.
    pub(super) fn park(&mut self, number: u32) {
        self.parked.push(number);
    }

    /// Has a request wait for the next commit to start, and leads that if none runs. Returns its round.
    pub(super) fn join_commit(&mut self, number: u32) -> u64 {
        let joined = self.disk.group_commit.join(&self.mailbox);
        self.awaiting_commit.push(number);
        if joined.lead {
            self.lead_commit();
        }
        joined.round
    }

    /// Begins a commit for which nobody waits, unless one is going to begin anyway.
    pub(super) fn start_background_commit(&mut self) {
        if self.disk.group_commit.join(&self.mailbox).lead {
            self.lead_commit();
        }
    }

    /// To be called every second, so that what nobody else wakes goes on: writes and commits that found the host full are
    /// tried again; and every few seconds what was written and not flushed becomes durable in the background, which bounds what
    /// a power cut takes and what a live journal has to hold.
    pub fn tick(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        self.resume_tasks(parked, true);
        if std::mem::take(&mut self.commit_stalled) {
            // The flushes of this commit fail rather than that a queue which stops waits for ever.
            match self.disk.group_commit.is_urgent() {
                true => self.end_round(false),
                false => self.lead_commit(),
            }
        }
        self.check_host_space();
        self.ticks = (self.ticks + 1) % COMMIT_TICKS;
        let top = self.disk.version().top();
        if self.ticks == 0 && top.is_some_and(|top| top.image.is_dirty() && !top.image.is_poisoned()) {
            self.start_background_commit();
        }
        // A turn without requests submits nothing. A failure shows again in the next one that does.
        let _ = self.submit();
    }

    pub(super) fn push_op(&mut self, op: Op) {
        if !self.backlog.is_empty() {
            return self.backlog.push_back(op);
        }
        if let Err(op) = self.engine.push(op) {
            self.backlog.push_back(op);
        }
    }
}

impl Drop for Lane {
    /// A lane that goes while it leads a commit must not leave the others waiting.
    fn drop(&mut self) {
        if self.commit.take().is_some() || self.commit_stalled {
            while self.disk.group_commit.finish(false).is_some() {}
        }
        if self.growth.take().is_some() {
            self.disk.broadcast(LaneEvent::GrowthEnded(GrowthResult::Failed));
        }
        self.leave_punch_lock();
    }
}
