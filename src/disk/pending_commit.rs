//! Commits that are requested by threads that serve no queue.

use std::sync::Arc;
use std::time::Duration;

use super::group_commit::JoinedRound;
use super::mailbox::{LaneEvent, Mailbox};
use super::shared::Disk;
use crate::error::{Error, ErrorKind, Result};

impl Disk {
    /// Makes all completed writes durable, and waits until they are durable. Does nothing on a read-only disk. Does not
    /// wait for space on a full file system: the calling thread has other work. If the disk parks writes, the flushes
    /// of lanes do not fail with the call; they wait for space.
    ///
    /// # Errors
    /// - `NoSpace` if the file system is full, or if a snapshot has ended the wait after an error between its switch
    ///   and its decision. No write is lost, and the call may be repeated.
    /// - `Io` if the commit failed, or if a commit that another thread led failed, also for lack of space, or if the
    ///   process has no file descriptors left.
    /// - `Poisoned` if a sync failed, now or earlier, so that completed writes may be lost; or if a snapshot has failed
    ///   between its switch and its decision.
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
    /// Joins the next round of a writable disk. If no other round runs and the rounds are not held, leads the round,
    /// and returns after the commit has ended.
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

    /// Leaves the round. The thread gets no result.
    pub(super) fn leave(self, disk: &Disk) {
        disk.group_commit.leave(&self.mailbox);
    }

    /// Returns the result of the commit; `None` if the thread still waits for the round. If the running round has no
    /// leader, leads that round. The caller calls this function again when the mailbox has events.
    pub(super) fn poll(&mut self, disk: &Disk) -> Option<Result<()>> {
        if let Some(result) = self.result.take() {
            return Some(result);
        }
        for event in self.mailbox.take() {
            match event {
                LaneEvent::Leaderless if disk.group_commit.claim_lead() => {
                    let result = disk.lead_commit(&self.mailbox);
                    // The round may be an earlier one than that which this thread has joined.
                    disk.group_commit.leave(&self.mailbox);
                    return Some(result);
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

    /// Waits until there are events or a signal arrives, but at most for `at_most`.
    pub(super) fn wait(&self, at_most: Duration) {
        self.mailbox.sleep_at_most(at_most);
    }
}

/// Returns the error of a commit that another thread led.
fn commit_error(disk: &Disk) -> Error {
    let version = disk.version();
    match version.writable_top().image.check_poison() {
        Err(e) => e,
        Ok(()) => Error::new(ErrorKind::Io, "a commit failed").at_path(version.top_path()),
    }
}
