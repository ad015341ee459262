//! The jobs a lane does for the whole disk beside its requests: a commit that it leads, a step of growth.

use std::io;

use super::lane::Lane;
use super::mailbox::{GrowthResult, LaneEvent};
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
pub(super) struct RunningJob {
    pub(super) job: Job,
    /// Operations of its present step that are not complete.
    pub(super) pending_ops: u32,
    /// The first failure among them.
    pub(super) failed: Option<io::Error>,
}

impl RunningJob {
    pub(super) fn new(job: Job) -> RunningJob {
        RunningJob { job, pending_ops: 0, failed: None }
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
    fn job_mut(&mut self, kind: JobKind) -> &mut Option<RunningJob> {
        match kind {
            JobKind::Commit => &mut self.commit,
            JobKind::Growth => &mut self.growth,
        }
    }

    /// Begins a job.
    pub(super) fn start_job(&mut self, kind: JobKind, job: Job) {
        let before = self.job_mut(kind).replace(RunningJob::new(job));
        assert!(before.is_none(), "a lane does one commit and one step of growth at a time");
        self.step_job(kind);
    }

    /// An operation of a job is over.
    pub(super) fn job_op_completed(&mut self, kind: JobKind, result: io::Result<()>) {
        let running = self.job_mut(kind).as_mut().expect("operations belong to a running job");
        if let Err(e) = result {
            running.failed.get_or_insert(e);
        }
        running.pending_ops -= 1;
        if running.pending_ops == 0 {
            self.step_job(kind);
        }
    }

    fn step_job(&mut self, kind: JobKind) {
        let mut ops = std::mem::take(&mut self.job_ops);
        let running = self.job_mut(kind).as_mut().expect("a running job");
        let step = running.next(&mut ops);
        running.pending_ops = u32::try_from(ops.len()).expect("a step is at most a disk of sectors");
        let token = if kind == JobKind::Commit { Token::Commit } else { Token::Growth };
        for mut op in ops.drain(..) {
            op.token = token.pack();
            self.push_op(op);
        }
        self.job_ops = ops;
        if let Ok(JobStep::Wait) = step {
            return;
        }
        let over = self.job_mut(kind).take().expect("a running job");
        let result = step.map(|_| ());
        match over.job {
            // Nothing of it was acknowledged, and all of it is dirty again.
            Job::Commit(_)
                if self.disk.parks_when_full() && result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace) =>
            {
                self.stall_commit();
            }
            Job::Commit(commit) => {
                self.commit_stall_logged = false;
                self.disk.record_commit(&result, commit.barriers());
                self.end_round(result.is_ok());
            }
            Job::Growth(_) => {
                let grown = match &result {
                    Ok(()) => GrowthResult::Grown,
                    Err(e) if e.kind() == ErrorKind::NoSpace => {
                        if !self.disk.parks_when_full() && !std::mem::replace(&mut self.no_space_logged, true) {
                            log::error!("{}; writes fail until then", e.line());
                        }
                        GrowthResult::NoSpace
                    }
                    Err(e) => {
                        log::error!("{}", e.line());
                        GrowthResult::Failed
                    }
                };
                self.disk.broadcast(LaneEvent::GrowthEnded(grown));
            }
        }
    }

    /// Ends the round that this lane leads, and leads the next one if flushes wait for it.
    pub(super) fn end_round(&mut self, ok: bool) {
        if self.disk.group_commit.finish(ok).is_some() {
            self.lead_commit();
        }
    }

    /// Keeps the round of a commit that found the host full open: flushes wait, as writes do, until there is room. The next
    /// tick leads a new commit for the same round.
    fn stall_commit(&mut self) {
        self.commit_stalled = true;
        if !std::mem::replace(&mut self.commit_stall_logged, true) {
            let path = self.disk.version().top().expect("only writable disks commit").image.path().display();
            log::warn!("{path}: the host is full: a commit is held until there is room; free space on its file system");
        }
    }
}
