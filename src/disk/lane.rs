//! A queue's engine: takes requests, drives each through its stages, answers. Belongs to one thread, never waits.
//!
//! On the way of a read of known sectors there is no lock and no allocation (tasks, slices and plans are used again). What the
//! host has in memory is copied (`copies.rs`); for all else there is one system call, the `submit` of everything pushed.
//!
//! What was tried to make a queue faster, each with the figures of `benches/serve` (medians, guest and server on a processor
//! each of two, page cache, November 2026):
//!
//! - *Turns* (`device/exchange.rs`). All 32 reads of a queue in one turn: 150,000 reads a second, p50 162 us, since the guest
//!   sees nothing before the last is done. Of 4 to 32: 275,000 to 348,000. Half of what there is: 340,000. Kept.
//! - *Waiting for the guest* (`vhost/patience.rs`). At depth 1 from 67 to 16-20 us. Kept.
//! - *Writes through the page cache without the ring* (`storage/inline.rs`). Over old sectors on ext4 from 100,000 to 200,000
//!   and more a second; into a fresh child from 90,000 to 130,000-170,000. Kept.
//! - *Growth without syncs* (`image/tail.rs`): 1 MiB writes in order into a fresh child from 1,600 to 4,700 a second. Kept.
//! - *Reading ahead of cold streams* (`ahead.rs`). Kept. *preadv for each read, or DEFER_TASKRUN* (`storage/ring.rs`). Not kept.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Disk;
use super::ahead::Ahead;
use super::copies::PlannedCopy;
use super::job::{Job, JobKind, Running};
use super::mailbox::{Grown, Letter, Mailbox};
use super::request::{Answer, Request, Work};
use super::task::{Task, Token};
use crate::chain::Plan;
use crate::error::ErrorKind;
use crate::image::{Commit, Growth, Step};
use crate::storage::{Action, Completion, Engine, Op, Slices};

/// Requests that a lane takes at once.
const TASKS: usize = 1024;
/// Ticks between two commits in the background.
const COMMIT_TICKS: u32 = 5;

/// One queue's share of a disk.
pub struct Lane {
    // Dropped first: it waits for the kernel, which may still write into memory that the tasks own.
    pub(super) engine: Box<dyn Engine>,
    pub(super) disk: Arc<Disk>,
    mailbox: Arc<Mailbox>,
    /// Boxes, which are handed on and kept: a task is a few hundred bytes.
    pub(super) tasks: Vec<Option<Box<Task>>>,
    pub(super) free: Vec<u32>,
    /// Tasks that wait for room, and tasks that wait for a commit.
    parked: Vec<u32>,
    awaiting: Vec<u32>,
    commit: Option<Running>,
    growth: Option<Running>,
    ticks: u32,
    /// Whether the log knows that the host is full.
    told_full: bool,
    /// Operations that found the engine full.
    backlog: VecDeque<Op>,
    pub(super) answers: Vec<Answer>,
    pub(super) ahead: Ahead,
    /// Whether something was handed over since completions were last looked for.
    submitted: bool,
    // Used again and again.
    #[expect(clippy::vec_box, reason = "they come from `tasks` and go there")]
    pub(super) spare: Vec<Box<Task>>,
    pub(super) plan: Plan,
    done: Vec<Completion>,
    steps: Vec<Op>,
    pub(super) pool: Vec<Slices>,
    /// Planned, to be made with the next submit.
    pub(super) copies: Vec<PlannedCopy>,
}

impl Lane {
    pub(super) fn new(disk: Arc<Disk>, engine: Box<dyn Engine>, mailbox: Arc<Mailbox>) -> Lane {
        let count = u32::try_from(TASKS).expect("a small constant");
        Lane {
            engine,
            disk,
            mailbox,
            tasks: std::iter::repeat_with(|| None).take(TASKS).collect(),
            free: (0..count).rev().collect(),
            parked: Vec::new(),
            awaiting: Vec::new(),
            commit: None,
            growth: None,
            ticks: 0,
            told_full: false,
            backlog: VecDeque::new(),
            answers: Vec::with_capacity(TASKS),
            ahead: Ahead::new(),
            submitted: false,
            spare: Vec::new(),
            plan: Plan::default(),
            done: Vec::with_capacity(TASKS),
            steps: Vec::new(),
            pool: Vec::new(),
            copies: Vec::new(),
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
    pub fn room(&self) -> usize {
        if self.backlog.is_empty() { self.free.len() } else { 0 }
    }

    /// Takes a request and goes as far with it as memory allows; no system call. There is `room`.
    pub fn push(&mut self, request: Request) {
        let read = if let Work::Read { range, .. } = &request.work { Some(*range) } else { None };
        self.begin(request);
        if let Some(range) = read {
            self.follow(range);
        }
    }

    /// A guest begins to use the disk: room for its first writes is made while it does something else.
    ///
    /// # Errors
    /// As `submit`.
    pub fn prepare(&mut self) -> io::Result<()> {
        let top = self.disk.version().top();
        if top.is_some_and(|top| top.image.wants_room() && !top.image.is_poisoned()) {
            self.grow_if_short();
        }
        self.submit()
    }

    /// Hands everything pushed to the host in one call, but for what is only to be copied: that is done here.
    ///
    /// # Errors
    /// The engine is of no further use.
    pub fn submit(&mut self) -> io::Result<()> {
        self.submitted = true;
        self.copy_all();
        self.engine.submit()
    }

    /// Takes what is complete, goes on with its requests and jobs, and appends the answers. Never waits.
    ///
    /// # Errors
    /// The engine is of no further use.
    pub fn poll(&mut self, answers: &mut Vec<Answer>) -> io::Result<()> {
        loop {
            let letters = self.mailbox.take();
            let mut done = std::mem::take(&mut self.done);
            self.engine.reap(&mut done);
            // What the host has in memory is complete as soon as it was handed over.
            if !std::mem::take(&mut self.submitted) && done.iter().any(|c| c.op.action == Action::Read) {
                self.ahead.waited();
            }
            let idle = letters.is_empty() && done.is_empty() && self.copies.is_empty();
            for completion in done.drain(..) {
                self.completed(completion);
            }
            self.done = done;
            letters.into_iter().for_each(|letter| self.read(letter));
            while let Some(op) = self.backlog.pop_front() {
                if let Err(op) = self.engine.push(op) {
                    self.backlog.push_front(op);
                    break;
                }
            }
            answers.append(&mut self.answers);
            if idle {
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
    pub fn bell_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.fd()
    }

    /// Whether nothing is under way and no answer owed.
    pub fn is_idle(&self) -> bool {
        self.free.len() == TASKS && self.commit.is_none() && self.growth.is_none() && self.answers.is_empty()
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
            if self.engine.under_way() > 0 {
                self.engine.wait()?;
            } else if !self.parked.is_empty() && self.growth.is_none() {
                // There is no room, and no time to wait for it.
                let parked = std::mem::take(&mut self.parked);
                self.go_on(parked, false);
            } else {
                // Everything left waits for another lane.
                self.mailbox.sleep();
            }
        }
    }

    fn completed(&mut self, completion: Completion) {
        match Token::unpack(completion.op.token) {
            Token::Task { task, detail } => self.moved(task, detail, completion),
            Token::Commit => self.job_moved(JobKind::Commit, completion.result),
            Token::Growth => self.job_moved(JobKind::Growth, completion.result),
        }
    }

    /// What other lanes have to say.
    fn read(&mut self, letter: Letter) {
        let concerned = match letter {
            Letter::Committed { round, ok } => {
                let tasks = &self.tasks;
                let of = |n: &u32| tasks[*n as usize].as_ref().is_some_and(|t| t.round == round);
                let (mine, others) = std::mem::take(&mut self.awaiting).into_iter().partition(of);
                self.awaiting = others;
                self.go_on(mine, ok);
                return;
            }
            Letter::Grown(Grown::Full) if self.disk.parks() => return self.tell_full(),
            Letter::Grown(grown) => grown == Grown::Room,
        };
        let parked = std::mem::take(&mut self.parked);
        self.told_full &= !concerned;
        self.go_on(parked, concerned);
    }

    /// Lets requests that waited go on, or fail.
    fn go_on(&mut self, waited: Vec<u32>, ok: bool) {
        for number in waited {
            self.tasks[number as usize].as_mut().expect("it waits").failed |= !ok;
            self.advance(number);
        }
    }

    pub(super) fn tell_full(&mut self) {
        if !self.parked.is_empty() && !self.told_full {
            let path = self.disk.version().top().expect("only writable disks grow").image.path().display();
            log::warn!("{path}: the host is full: {} writes are held until there is room", self.parked.len());
            self.told_full = true;
        }
    }

    /// Leads the commit of a round that has just begun.
    pub(super) fn lead(&mut self) {
        let top = self.disk.version().top().expect("only writable disks commit");
        let commit = Commit::new(top.image.clone(), top.slot);
        self.start(JobKind::Commit, Job::Commit(commit));
    }

    /// Begins a step of growth where one is due and nobody else is at it. False where there is room enough.
    pub(super) fn grow_if_short(&mut self) -> bool {
        let top = self.disk.version().top().expect("only writable disks grow");
        if let Some(growth) = Growth::begin(&top.image, top.slot) {
            self.start(JobKind::Growth, Job::Growth(growth));
            return true;
        }
        top.image.is_growing()
    }

    /// Parks a request until the file has grown.
    pub(super) fn park(&mut self, number: u32) {
        self.parked.push(number);
    }

    /// Has a request wait for the next commit to start, and leads that if none runs. Returns its round.
    pub(super) fn join(&mut self, number: u32) -> u64 {
        let joined = self.disk.rounds.join(&self.mailbox);
        self.awaiting.push(number);
        if joined.lead {
            self.lead();
        }
        joined.round
    }

    /// Begins a commit for which nobody waits, unless one is going to begin anyway.
    pub(super) fn commit_soon(&mut self) {
        if self.disk.rounds.join(&self.mailbox).lead {
            self.lead();
        }
    }

    /// To be called every second, so that what nobody else wakes goes on: writes that found the host full are tried
    /// again; and every few seconds what was written and not flushed becomes durable in the background, which bounds what
    /// a power cut takes and what a live journal has to hold.
    pub fn tick(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        self.go_on(parked, true);
        self.ticks = (self.ticks + 1) % COMMIT_TICKS;
        if self.ticks != 0 {
            return;
        }
        let top = self.disk.version().top();
        if top.is_some_and(|top| top.image.is_dirty() && !top.image.is_poisoned()) {
            self.commit_soon();
        }
    }

    fn running(&mut self, kind: JobKind) -> &mut Option<Running> {
        match kind {
            JobKind::Commit => &mut self.commit,
            JobKind::Growth => &mut self.growth,
        }
    }

    fn start(&mut self, kind: JobKind, job: Job) {
        let before = self.running(kind).replace(Running::new(job));
        assert!(before.is_none(), "a lane does one commit and one step of growth at a time");
        self.step(kind);
    }

    fn job_moved(&mut self, kind: JobKind, result: io::Result<()>) {
        let running = self.running(kind).as_mut().expect("operations belong to a running job");
        if let Err(e) = result {
            running.failed.get_or_insert(e);
        }
        running.pending -= 1;
        if running.pending == 0 {
            self.step(kind);
        }
    }

    fn step(&mut self, kind: JobKind) {
        let mut ops = std::mem::take(&mut self.steps);
        let running = self.running(kind).as_mut().expect("a running job");
        let step = running.next(&mut ops);
        running.pending = u32::try_from(ops.len()).expect("a step is at most a disk of sectors");
        let token = if kind == JobKind::Commit { Token::Commit } else { Token::Growth };
        for mut op in ops.drain(..) {
            op.token = token.pack();
            self.push_op(op);
        }
        self.steps = ops;
        if let Ok(Step::Wait) = step {
            return;
        }
        let over = self.running(kind).take().expect("a running job");
        let result = step.map(|_| ());
        match over.job {
            Job::Commit(commit) => {
                self.disk.committed(&result, commit.barriers());
                if self.disk.rounds.finish(result.is_ok()).is_some() {
                    self.lead();
                }
            }
            Job::Growth(_) => {
                let grown = match &result {
                    Ok(()) => Grown::Room,
                    Err(e) if e.kind() == ErrorKind::NoSpace => {
                        if !self.disk.parks() && !std::mem::replace(&mut self.told_full, true) {
                            log::error!("{}; writes fail until then", e.line());
                        }
                        Grown::Full
                    }
                    Err(e) => {
                        log::error!("{}", e.line());
                        Grown::Failed
                    }
                };
                self.disk.post(Letter::Grown(grown));
            }
        }
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
        if self.commit.take().is_some() {
            while self.disk.rounds.finish(false).is_some() {}
        }
        if self.growth.take().is_some() {
            self.disk.post(Letter::Grown(Grown::Failed));
        }
    }
}
