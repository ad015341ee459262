//! The jobs a lane does for the whole disk beside its requests: a commit that it leads, a step of growth.

use std::io;

use super::lane::Lane;
use super::mailbox::{Grown, Letter};
use super::task::Token;
use crate::error::{ErrorKind, Result};
use crate::image::{Commit, Growth, JobStep};
use crate::storage::Op;

/// Which job; at most one of each a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum JobKind {
    Commit,
    Growth,
}

/// A job under way.
pub(super) enum Job {
    Commit(Commit),
    Growth(Growth),
}

/// A job, and what it waits for.
pub(super) struct Running {
    pub(super) job: Job,
    /// Operations of its present step that are not complete.
    pub(super) pending: u32,
    /// The first failure among them.
    pub(super) failed: Option<io::Error>,
}

impl Running {
    pub(super) fn new(job: Job) -> Running {
        Running { job, pending: 0, failed: None }
    }

    /// The next step. All operations of the last one are complete.
    pub(super) fn next(&mut self, ops: &mut Vec<Op>) -> Result<JobStep> {
        let failed = self.failed.take();
        match &mut self.job {
            Job::Commit(commit) => commit.next(failed, ops),
            Job::Growth(growth) => growth.next(failed, ops),
        }
    }
}

impl Lane {
    fn running(&mut self, kind: JobKind) -> &mut Option<Running> {
        match kind {
            JobKind::Commit => &mut self.commit,
            JobKind::Growth => &mut self.growth,
        }
    }

    /// Begins a job.
    pub(super) fn start(&mut self, kind: JobKind, job: Job) {
        let before = self.running(kind).replace(Running::new(job));
        assert!(before.is_none(), "a lane does one commit and one step of growth at a time");
        self.step(kind);
    }

    /// An operation of a job is over.
    pub(super) fn job_moved(&mut self, kind: JobKind, result: io::Result<()>) {
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
        if let Ok(JobStep::Wait) = step {
            return;
        }
        let over = self.running(kind).take().expect("a running job");
        let result = step.map(|_| ());
        match over.job {
            // Nothing of it was acknowledged, and all of it is dirty again.
            Job::Commit(_) if self.disk.parks() && result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace) => {
                self.hold_commit();
            }
            Job::Commit(commit) => {
                self.told_commit_held = false;
                self.disk.committed(&result, commit.barriers());
                self.end_round(result.is_ok());
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

    /// Ends the round that this lane leads, and leads the next one if flushes wait for it.
    pub(super) fn end_round(&mut self, ok: bool) {
        if self.disk.rounds.finish(ok).is_some() {
            self.lead();
        }
    }

    /// Keeps the round of a commit that found the host full open: flushes wait, as writes do, until there is room. The next
    /// tick leads a new commit for the same round.
    fn hold_commit(&mut self) {
        self.commit_is_held = true;
        if !std::mem::replace(&mut self.told_commit_held, true) {
            let path = self.disk.version().top().expect("only writable disks commit").image.path().display();
            log::warn!("{path}: the host is full: a commit is held until there is room; free space on its file system");
        }
    }
}
