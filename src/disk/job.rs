//! Jobs that a lane does for the whole disk: a commit that it leads, a step of growth.

use std::io;

use super::op_queue::OpQueue;
use super::task::Token;
use crate::error::Result;
use crate::image::{Commit, Growth, JobStep};
use crate::storage::Op;

/// Kind of a job. A lane runs at most one job of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum JobKind {
    Commit,
    Growth,
}

/// A job.
pub(super) enum Job {
    Commit(Commit),
    Growth(Growth),
}

impl Job {
    fn kind(&self) -> JobKind {
        match self {
            Job::Commit(_) => JobKind::Commit,
            Job::Growth(_) => JobKind::Growth,
        }
    }
}

/// A job that has ended.
pub(super) struct FinishedJob {
    pub(super) job: Job,
    pub(super) result: Result<()>,
}

/// A job in progress.
struct RunningJob {
    job: Job,
    /// Number of the version whose top the job works on.
    epoch: u32,
    /// Operations of the current step that are in flight.
    pending_ops: u32,
    /// The first failure among the operations of the current step.
    failed: Option<io::Error>,
}

impl RunningJob {
    /// Begins the next step. All operations of the previous one must be complete.
    fn next(&mut self, ops: &mut Vec<Op>) -> Result<JobStep> {
        let failed = self.failed.take();
        match &mut self.job {
            Job::Commit(commit) => commit.next(failed, ops),
            Job::Growth(growth) => growth.next(failed, ops),
        }
    }
}

/// The jobs of a lane.
#[derive(Default)]
pub(super) struct Jobs {
    commit: Option<RunningJob>,
    growth: Option<RunningJob>,
    /// Operations of a step, before they are pushed. Empty between calls; kept for its memory.
    step_ops: Vec<Op>,
}

impl Jobs {
    /// Starts a job on the top of the version `epoch`. Returns the job if it ended at once.
    pub(super) fn start(&mut self, job: Job, epoch: u32, ops: &mut OpQueue) -> Option<FinishedJob> {
        let kind = job.kind();
        let before = self.job_mut(kind).replace(RunningJob { job, epoch, pending_ops: 0, failed: None });
        assert!(before.is_none(), "a lane does one commit and one step of growth at a time");
        self.step(kind, ops)
    }

    /// Records the completion of an operation. Returns the job if that ended it.
    pub(super) fn op_completed(
        &mut self,
        kind: JobKind,
        result: io::Result<()>,
        ops: &mut OpQueue,
    ) -> Option<FinishedJob> {
        let running = self.job_mut(kind).as_mut().expect("operations belong to a running job");
        if let Err(e) = result {
            running.failed.get_or_insert(e);
        }
        running.pending_ops -= 1;
        if running.pending_ops == 0 { self.step(kind, ops) } else { None }
    }

    fn step(&mut self, kind: JobKind, ops: &mut OpQueue) -> Option<FinishedJob> {
        let mut step_ops = std::mem::take(&mut self.step_ops);
        let running = self.job_mut(kind).as_mut().expect("a running job");
        let step = running.next(&mut step_ops);
        running.pending_ops = u32::try_from(step_ops.len()).expect("a step is at most a disk of sectors");
        let token = if kind == JobKind::Commit { Token::Commit } else { Token::Growth };
        for mut op in step_ops.drain(..) {
            op.token = token.pack();
            ops.push(op);
        }
        self.step_ops = step_ops;
        if let Ok(JobStep::Wait) = step {
            return None;
        }
        let RunningJob { job, .. } = self.job_mut(kind).take().expect("a running job");
        Some(FinishedJob { job, result: step.map(|_| ()) })
    }

    /// Whether a job of this kind is in progress.
    pub(super) fn is_running(&self, kind: JobKind) -> bool {
        match kind {
            JobKind::Commit => self.commit.is_some(),
            JobKind::Growth => self.growth.is_some(),
        }
    }

    /// The versions on whose tops jobs in progress work.
    pub(super) fn epochs(&self) -> impl Iterator<Item = u32> {
        self.commit.iter().chain(&self.growth).map(|running| running.epoch)
    }

    /// Drops a job. Returns whether one was in progress.
    pub(super) fn cancel(&mut self, kind: JobKind) -> bool {
        self.job_mut(kind).take().is_some()
    }

    fn job_mut(&mut self, kind: JobKind) -> &mut Option<RunningJob> {
        match kind {
            JobKind::Commit => &mut self.commit,
            JobKind::Growth => &mut self.growth,
        }
    }
}
