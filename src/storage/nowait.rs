//! Buffered writes done at once, by the thread that asks, instead of through the ring.
//!
//! A write to the page cache is a copy. Some file systems (ext4) let no ring do it without waiting, so each goes through a
//! kernel thread of the ring: two changes of thread for 4 KiB (measured on ext4, 32 in flight: see `disk/lane.rs`). The
//! copy is made here where it cannot wait (RWF_NOWAIT); where the file system never promises that, it is made all the
//! same, unless the last one took so long that writers are being held back: then the ring's threads do the waiting for a
//! while, and the queue goes on with its reads.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::blocking::call_once;
use super::engine::{FILE_SLOTS, host_file};
use super::env::File;
use super::host::HostFile;
use super::op::{Action, FileSlot, Op};
use super::transfer::Transfer;

/// Most bytes of a write that its queue makes itself: longer copies would hold up what is behind them.
const MOST: usize = 1 << 20;
/// A copy takes less; what takes longer has waited.
const LONG: Duration = Duration::from_millis(1);
/// For so many times as long the ring's threads then do the waiting: the queue waits a small part of the time.
const RECOVERY: u32 = 16;

/// The files of a ring whose writes may be made at once.
pub(super) struct NowaitWrites {
    files: Vec<Option<Target>>,
    /// Until when writes are left to the ring.
    held: Option<Instant>,
}

struct Target {
    file: HostFile,
    /// Whether the file system takes RWF_NOWAIT, as far as is known.
    prompt: bool,
}

impl NowaitWrites {
    pub(super) fn new() -> NowaitWrites {
        NowaitWrites { files: (0..FILE_SLOTS).map(|_| None).collect(), held: None }
    }

    /// Notes a file that the ring got; direct ones are not for us.
    pub(super) fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let file = host_file(file)?;
        *entry = (!file.is_direct()).then(|| Target { file: file.clone(), prompt: true });
        Ok(())
    }

    pub(super) fn unregister(&mut self, slot: FileSlot) {
        if let Some(entry) = self.files.get_mut(usize::from(slot.0)) {
            *entry = None;
        }
    }

    /// Whether an operation is to be tried here.
    #[inline]
    pub(super) fn accepts(&self, op: &Op) -> bool {
        op.action == Action::Write
            && op.payload.len() <= MOST
            && self.files.get(usize::from(op.slot.0)).is_some_and(Option::is_some)
    }

    /// Makes the next call of a write: what it returned, or the negated error code; `None` where it is to be left to the
    /// ring.
    pub(super) fn write(&mut self, op: &mut Op, progress: &mut Transfer) -> Option<i32> {
        let Target { file, prompt } = self.files[usize::from(op.slot.0)].as_mut()?;
        let fd = file.as_fd();
        if *prompt {
            match call_once(fd, op, progress, libc::RWF_NOWAIT).checked_neg() {
                Some(libc::EAGAIN) => return None,
                Some(libc::EOPNOTSUPP) => *prompt = false,
                code => return code.map(|code| -code),
            }
        }
        let begin = Instant::now();
        if self.held.is_some_and(|until| begin < until) {
            return None;
        }
        let returned = call_once(fd, op, progress, 0);
        let end = Instant::now();
        self.held = (end - begin > LONG).then(|| end + (end - begin) * RECOVERY);
        Some(returned)
    }
}
