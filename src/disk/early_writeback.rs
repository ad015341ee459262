//! Writing before the flush: a guest that flushes after every few writes waits for the disk twice, first for its data, then
//! for what points to it. While it still writes, the host can begin with the data ([`Action::WriteBehind`]).
//!
//! That is a hint: no request waits for it, and a sync goes on to be what makes data durable. The host tells that sync of
//! writes that failed; of a place that it could not even find for the data it tells the hint alone, and drops the data (ext4:
//! no room, a damaged table of its own), so that counts as a failed sync as soon as it is known. Where the guest flushes rarely,
//! or after every write, nothing is done: the host does better with all at once, or has no time left to win. Nor with the
//! engine of plain calls, whose queue would wait for it.

use std::io;
use std::sync::atomic::Ordering;

use super::lane::Lane;
use super::task::Token;
use crate::storage::Op;

/// Writes between two commits that are worth it: fewer leave nothing to overlap, more the host writes in better order.
const MIN_WRITES: u32 = 16;
const MAX_WRITES: u32 = 512;
/// Writes for which the host is told.
const WRITES_PER_HINT: u32 = 8;

/// What a queue wrote between commits.
#[derive(Default)]
pub(super) struct EarlyWriteback {
    /// The number of commits that have ended.
    commits: u64,
    /// Writes since then, and of these, those of which the host was not told.
    writes: u32,
    unhinted: u32,
    /// Whether the time between the last two commits was worth it.
    worthwhile: bool,
    /// An operation is under way.
    pub(super) in_flight: bool,
}

impl EarlyWriteback {
    /// A write is in the host's memory; so many commits have ended.
    pub(super) fn record_write(&mut self, commits: u64) {
        if self.commits != commits {
            self.worthwhile = (MIN_WRITES..=MAX_WRITES).contains(&self.writes);
            (self.commits, self.writes, self.unhinted) = (commits, 0, 0);
        }
        self.writes = self.writes.saturating_add(1);
        self.unhinted = self.unhinted.saturating_add(1);
    }

    /// Whether the host is to be told now.
    fn take_due(&mut self) -> bool {
        let due = self.worthwhile && self.unhinted >= WRITES_PER_HINT && self.writes <= MAX_WRITES && !self.in_flight;
        if due {
            (self.unhinted, self.in_flight) = (0, true);
        }
        due
    }
}

impl Lane {
    /// Has the host begin to write where that is worth it.
    pub(super) fn hint_writeback(&mut self) {
        let Some(top) = self.disk.version().top() else { return };
        let slot = top.slot;
        let is_buffered = self.disk.memory_align(slot) == 1;
        let waits = self.engine.wake_fd().is_none();
        if is_buffered && !waits && !self.disk.is_write_through() && self.early_writeback.take_due() {
            self.disk.counters().early_writebacks.fetch_add(1, Ordering::Relaxed);
            self.push_op(Op::start_writeback(Token::EarlyWriteback.pack(), slot));
        }
    }
}

impl Lane {
    /// The hint was taken, or failed.
    pub(super) fn writeback_hint_completed(&mut self, result: io::Result<()>) {
        self.early_writeback.in_flight = false;
        if let Err(e) = result
            && !is_harmless(&e)
        {
            let why = format!("the host could not write ({e})");
            self.disk.version().top().expect("only writable disks are told").image.poison(&why);
        }
    }
}

/// Whether a hint failed because it could not be given, or the host had no memory to begin: the data is where it was. What is not
/// known to be harmless is not.
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
    fn only_what_is_known_to_be_harmless_is() {
        let of = |code| is_harmless(&io::Error::from_raw_os_error(code));
        assert!([libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOMEM].into_iter().all(of));
        let lost = [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EUCLEAN, libc::EBADMSG, libc::EROFS, 4000];
        assert!(!lost.into_iter().any(of));
        assert!(!is_harmless(&io::ErrorKind::Other.into()));
    }

    /// How often the host is told in rounds of so many writes, after the first.
    fn told(writes: u32) -> u32 {
        let mut early = EarlyWriteback::default();
        let mut count = 0;
        for commits in 0..11 {
            for _ in 0..writes {
                early.record_write(commits);
                if early.take_due() {
                    assert!(!early.take_due(), "one at a time");
                    early.in_flight = false;
                    count += u32::from(commits > 0);
                }
            }
        }
        count
    }

    #[test]
    fn the_host_is_told_where_flushes_come_after_some_writes() {
        assert_eq!([1, 15, 16, 32, 512, 513, 5000].map(told), [0, 0, 20, 40, 640, 0, 0]);
    }

    #[test]
    fn a_guest_that_stops_flushing_is_left_to_the_host() {
        let mut early = EarlyWriteback::default();
        (0..32).for_each(|_| early.record_write(0));
        let told = (0..10_000).filter(|_| {
            early.record_write(1);
            let due = early.take_due();
            early.in_flight = false;
            due
        });
        assert_eq!(told.count(), (MAX_WRITES / WRITES_PER_HINT) as usize);
    }
}
