//! Early writeback: the kernel starts to write data before the guest flushes.
//!
//! A guest that flushes after every few writes waits for the disk twice: for its data, and then for the metadata that
//! points to the data. The kernel can write the data while the guest still adds writes ([`Action::StartWriteback`]).
//!
//! The operation is a hint: no request waits for it, and only a sync makes data durable. A later sync reports the
//! writes that fail after the hint was accepted. If the kernel cannot allocate space for the data (ext4: no space, or
//! damaged metadata), it reports the error to the hint only and drops the data. So an error of a hint counts as a
//! failed sync, unless it is known to be harmless.
//!
//! No hint is given if the guest flushes rarely (the kernel writes faster if it has all data at once) or after a few
//! writes (little overlaps). There is no hint, either, for a file that is opened with O_DIRECT or a disk that writes
//! through, or if the engine has no `wake_fd` (with a blocking engine, the queue would wait for the hint).
//!
//! [`Action::StartWriteback`]: crate::storage::Action::StartWriteback

use std::io;

use super::op_queue::OpQueue;
use super::task::Token;
use crate::storage::{FileSlot, Op};

/// Minimum and maximum number of writes between two commits for which hints are given. With fewer writes there is
/// nothing to overlap. With more writes the kernel orders the writeback better without hints.
const MIN_WRITES: u32 = 16;
const MAX_WRITES: u32 = 512;
/// Writes per hint. With a flush after every 32 writes, 4 writes per hint gain nothing, and 16 gain less than 8.
const WRITES_PER_HINT: u32 = 8;

/// The writes of one queue since the last commit, and whether hints are worthwhile.
#[derive(Default)]
pub(super) struct EarlyWriteback {
    /// The number of commits that had succeeded at the last write.
    commits: u64,
    /// Writes since the number of commits became `commits`.
    writes: u32,
    /// Writes since the last hint.
    unhinted: u32,
    /// Whether the number of writes between two commits was in the range for hints, the last time that this queue
    /// wrote between two commits.
    worthwhile: bool,
    /// The version with which the hint in flight was pushed, if a hint is in flight.
    in_flight: Option<u32>,
}

impl EarlyWriteback {
    /// Records a completed write. `commits` is the number of commits that have succeeded.
    pub(super) fn record_write(&mut self, commits: u64) {
        if self.commits != commits {
            self.worthwhile = (MIN_WRITES..=MAX_WRITES).contains(&self.writes);
            (self.commits, self.writes, self.unhinted) = (commits, 0, 0);
        }
        self.writes = self.writes.saturating_add(1);
        self.unhinted = self.unhinted.saturating_add(1);
    }

    /// The version with which the hint in flight was pushed; `None` if no hint is in flight.
    pub(super) fn epoch_in_flight(&self) -> Option<u32> {
        self.in_flight
    }

    /// Pushes a hint for the file in `slot` if one is due. `epoch` is the version of the slot. Returns whether a hint
    /// was pushed.
    pub(super) fn push_hint(&mut self, slot: FileSlot, epoch: u32, ops: &mut OpQueue) -> bool {
        let due = self.take_due(epoch);
        if due {
            ops.push(Op::start_writeback(Token::EarlyWriteback.pack(), slot));
        }
        due
    }

    /// Records the completion of a hint.
    ///
    /// # Errors
    /// The error of the hint, if the kernel may have dropped written data.
    pub(super) fn hint_completed(&mut self, result: io::Result<()>) -> io::Result<()> {
        self.in_flight = None;
        match result {
            Err(e) if !is_harmless(&e) => Err(e),
            _ => Ok(()),
        }
    }

    /// Returns whether a hint is due, and then counts it as in flight: the caller must push it.
    fn take_due(&mut self, epoch: u32) -> bool {
        let is_idle = self.in_flight.is_none();
        let due = self.worthwhile && self.unhinted >= WRITES_PER_HINT && self.writes <= MAX_WRITES && is_idle;
        if due {
            (self.unhinted, self.in_flight) = (0, Some(epoch));
        }
        due
    }
}

/// Returns whether a failed hint left the data in the page cache: the kernel does not support the hint, was
/// interrupted, or had no memory to begin. Errors that are not listed count as lost data.
fn is_harmless(failure: &io::Error) -> bool {
    let harmless = [
        libc::EINVAL,
        libc::ENOSYS,
        libc::EOPNOTSUPP,
        libc::ESPIPE,
        libc::ENOMEM,
        libc::EINTR,
        libc::EAGAIN,
        libc::ECANCELED,
    ];
    failure.kind() == io::ErrorKind::Unsupported || failure.raw_os_error().is_some_and(|code| harmless.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_errors_are_harmless() {
        let of = |code| is_harmless(&io::Error::from_raw_os_error(code));
        assert!([libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOMEM].into_iter().all(of));
        let lost = [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EUCLEAN, libc::EBADMSG, libc::EROFS, 4000];
        assert!(!lost.into_iter().any(of));
        assert!(!is_harmless(&io::ErrorKind::Other.into()));
    }

    /// Returns the number of hints in ten commit intervals of `writes` writes each. The hints of the interval before
    /// them are not counted.
    fn hints(writes: u32) -> u32 {
        let mut early = EarlyWriteback::default();
        let mut count = 0;
        for commits in 0..11 {
            for _ in 0..writes {
                early.record_write(commits);
                if early.take_due(1) {
                    assert!(!early.take_due(1), "one hint at a time");
                    early.in_flight = None;
                    count += u32::from(commits > 0);
                }
            }
        }
        count
    }

    #[test]
    fn hints_are_given_if_a_flush_follows_16_to_512_writes() {
        assert_eq!([1, 15, 16, 32, 512, 513, 5000].map(hints), [0, 0, 20, 40, 640, 0, 0]);
    }

    #[test]
    fn hints_end_if_the_guest_stops_flushing() {
        let mut early = EarlyWriteback::default();
        (0..32).for_each(|_| early.record_write(0));
        let hints = (0..10_000).filter(|_| {
            early.record_write(1);
            let due = early.take_due(1);
            early.in_flight = None;
            due
        });
        assert_eq!(hints.count(), (MAX_WRITES / WRITES_PER_HINT) as usize);
    }
}
