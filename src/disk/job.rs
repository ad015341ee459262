//! The jobs a lane does for the whole disk beside its requests: a commit that it leads, a step of growth.

use std::io;

use crate::error::Result;
use crate::image::{Commit, Growth, Step};
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
    pub(super) fn next(&mut self, ops: &mut Vec<Op>) -> Result<Step> {
        let failed = self.failed.take();
        match &mut self.job {
            Job::Commit(commit) => commit.next(failed, ops),
            Job::Growth(growth) => growth.next(failed, ops),
        }
    }
}
