//! A commit that a thread which serves no queue waits for.

use std::sync::Arc;
use std::time::Duration;

use super::group_commit::JoinedRound;
use super::mailbox::{LaneEvent, Mailbox};
use super::shared::Disk;
use crate::error::{Error, ErrorKind, Result};

impl Disk {
    /// Makes all completed writes durable, and waits until they are durable. Does not wait for space on a full file
    /// system: the calling thread has other work. If the disk parks writes, the flushes of lanes do not fail with the
    /// call; they wait for space.
    ///
    /// # Errors
    /// - `NoSpace` if the file system is full. No write is lost, and the call may be repeated.
    /// - `Io` if the commit failed, or if a commit that a lane led failed, also for lack of space, or if the process
    ///   has no file descriptors left.
    /// - `Poisoned` if a sync failed, now or earlier: completed writes may be lost.
    pub fn commit(&self) -> Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        let mut commit = PendingCommit::begin(self)?;
        loop {
            if let Some(result) = commit.poll(self) {
                return result;
            }
            commit.mailbox.sleep();
        }
    }
}

/// A commit round that a thread has joined. The thread does not wait for space on a full file system.
pub(super) struct PendingCommit {
    mailbox: Arc<Mailbox>,
    round: u64,
    /// The result, if this thread has led the round.
    result: Option<Result<()>>,
}

impl PendingCommit {
    /// Joins the next round of a writable disk, and leads it at once if no other one runs.
    ///
    /// # Errors
    /// `Io` if the process has no file descriptors left.
    pub(super) fn begin(disk: &Disk) -> Result<PendingCommit> {
        let mailbox = Arc::new(Mailbox::new()?);
        let JoinedRound { round, lead } = disk.group_commit.join(&mailbox);
        let result = lead.then(|| disk.lead_commit(&mailbox));
        if !lead {
            disk.group_commit.mark_urgent(&mailbox);
        }
        Ok(PendingCommit { mailbox, round, result })
    }

    /// Leaves the round. The thread does not wait any more.
    pub(super) fn leave(self, disk: &Disk) {
        disk.group_commit.leave(&self.mailbox);
    }

    /// Returns the result of the commit if the round has ended. Leads the round if its lead falls to this thread. To be
    /// called again when the mailbox has events.
    pub(super) fn poll(&mut self, disk: &Disk) -> Option<Result<()>> {
        if let Some(result) = self.result.take() {
            return Some(result);
        }
        for event in self.mailbox.take() {
            match event {
                LaneEvent::Leaderless if disk.group_commit.claim_lead() => {
                    return Some(disk.lead_commit(&self.mailbox));
                }
                LaneEvent::LeftRound { .. } => {
                    let what = "the host is full: completed writes are not durable yet; free space on its file system";
                    return Some(Err(Error::new(ErrorKind::NoSpace, what).at_path(disk.version().top_path())));
                }
                LaneEvent::Committed { round, ok } if round == self.round => {
                    return Some(if ok { Ok(()) } else { Err(commit_error(disk)) });
                }
                _ => {}
            }
        }
        None
    }

    /// Waits until there are events, or for `at_most`.
    pub(super) fn wait(&self, at_most: Duration) {
        self.mailbox.sleep_at_most(at_most);
    }
}

/// The error of a commit that a lane led.
fn commit_error(disk: &Disk) -> Error {
    let version = disk.version();
    match version.writable_top().image.check_poison() {
        Err(e) => e,
        Ok(()) => Error::new(ErrorKind::Io, "a commit failed").at_path(version.top_path()),
    }
}
