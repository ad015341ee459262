//! Buffered writes that the submitting thread makes itself, without the ring.
//!
//! A write to the page cache is a copy. On some file systems (ext4) io_uring cannot make a buffered write without
//! waiting, so every such write goes through a kernel thread: two thread switches for 4 KiB (`docs/performance.md`,
//! section 3, has figures). So the submitting thread makes the write with RWF_NOWAIT, by which the kernel fails the
//! call instead of waiting. If the file system does not support RWF_NOWAIT, the thread makes the write without the
//! flag. If a write without the flag is slow, the kernel is throttling writers. Then writes go to the ring for a while,
//! so that the kernel threads of the ring wait and the queue continues with reads.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::storage::backend::File;
use crate::storage::blocking::call_once;
use crate::storage::host::file::HostFile;
use crate::storage::op::{Action, FILE_SLOTS, FileSlot, Op};
use crate::storage::transfer::Transfer;

/// Maximum length of a write: a longer copy would delay the requests that follow it.
const MAX_WRITE: usize = 1 << 20;
/// Duration beyond which a write is taken to have waited, rather than only copied.
const SLOW_WRITE: Duration = Duration::from_millis(1);
/// Writes go to the ring for this many times the duration of a slow write, so that the queue waits for a small part of
/// its time.
const BACKOFF_FACTOR: u32 = 16;

/// Files of a ring that accept writes without the ring.
pub(super) struct NowaitWrites {
    files: Vec<Option<NowaitFile>>,
    /// Writes to files without support for RWF_NOWAIT go to the ring until this time.
    backoff_until: Option<Instant>,
}

struct NowaitFile {
    file: Arc<HostFile>,
    /// No write has failed because the file system does not support RWF_NOWAIT.
    supports_nowait: bool,
}

impl NowaitWrites {
    pub(super) fn new() -> NowaitWrites {
        NowaitWrites { files: (0..FILE_SLOTS).map(|_| None).collect(), backoff_until: None }
    }

    /// Registers a file. Writes to a file with O_DIRECT enabled always go to the ring.
    pub(super) fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)?;
        let file = HostFile::of(file)?;
        *entry = (!file.is_direct()).then_some(NowaitFile { file, supports_nowait: true });
        Ok(())
    }

    pub(super) fn unregister(&mut self, slot: FileSlot) {
        if let Some(entry) = self.files.get_mut(slot.as_usize()) {
            *entry = None;
        }
    }

    /// Returns whether an operation should be tried without the ring.
    #[inline]
    pub(super) fn accepts(&self, op: &Op) -> bool {
        op.action == Action::Write
            && op.payload.len() <= MAX_WRITE
            && self.files.get(op.slot.as_usize()).is_some_and(Option::is_some)
    }

    /// Makes the next call of a write. Returns its result, or the negated error code. `None` means that the write must
    /// go to the ring.
    pub(super) fn write(&mut self, op: &mut Op, transfer: &mut Transfer) -> Option<i32> {
        let NowaitFile { file, supports_nowait } = self.files[op.slot.as_usize()].as_mut()?;
        let fd = file.as_fd();
        if *supports_nowait {
            match call_once(fd, op, transfer, libc::RWF_NOWAIT).checked_neg() {
                Some(libc::EAGAIN) => return None,
                Some(libc::EOPNOTSUPP) => *supports_nowait = false,
                code => return code.map(|code| -code),
            }
        }
        let start = Instant::now();
        if self.backoff_until.is_some_and(|until| start < until) {
            return None;
        }
        let returned = call_once(fd, op, transfer, 0);
        let end = Instant::now();
        self.backoff_until = (end - start > SLOW_WRITE).then(|| end + (end - start) * BACKOFF_FACTOR);
        Some(returned)
    }
}
