//! The engine of plain calls: preadv, pwritev, fdatasync, fallocate, one after the other, when `submit` is called.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::engine::{Engine, FILE_SLOTS};
use super::env::File;
use super::host::HostFile;
use super::op::{Action, Completion, FileSlot, Op};
use super::transfer::{self, IoBuffers, Transfer, TransferState};

/// See the file's first line.
pub struct BlockingEngine {
    files: Vec<Option<HostFile>>,
    pushed: Vec<Op>,
    over: Vec<Completion>,
    progress: Transfer,
    depth: usize,
    calls: u64,
}

// SAFETY: `progress` has pointers that are used only within `submit`, while the operation they come from is held.
unsafe impl Send for BlockingEngine {}

impl BlockingEngine {
    /// An engine for at most `depth` operations at once.
    pub fn new(depth: usize) -> BlockingEngine {
        assert!(depth > 0, "an engine takes at least one operation");
        BlockingEngine {
            files: vec![None; usize::from(FILE_SLOTS)],
            pushed: Vec::with_capacity(depth),
            over: Vec::with_capacity(depth),
            progress: Transfer::default(),
            depth,
            calls: 0,
        }
    }
}

impl Engine for BlockingEngine {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)?;
        *entry = Some(super::engine::host_file(file)?.clone());
        Ok(())
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        *self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)? = None;
        Ok(())
    }

    fn push(&mut self, op: Op) -> Result<(), Op> {
        if self.outstanding() == self.depth {
            return Err(op);
        }
        self.pushed.push(op);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        for mut op in self.pushed.drain(..) {
            let result = match self.files.get(usize::from(op.slot.0)).and_then(Option::as_ref) {
                Some(file) => carry_out(file.as_fd(), &mut op, &mut self.progress, &mut self.calls),
                None => Err(io::Error::from_raw_os_error(libc::EBADF)),
            };
            self.over.push(Completion { op, result });
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.over);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn outstanding(&self) -> usize {
        self.pushed.len() + self.over.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn system_calls(&self) -> u64 {
        self.calls
    }

    fn name(&self) -> &'static str {
        "blocking"
    }
}

fn carry_out(fd: BorrowedFd<'_>, op: &mut Op, progress: &mut Transfer, calls: &mut u64) -> io::Result<()> {
    progress.reset();
    loop {
        *calls += 1;
        let returned = call_once(fd, op, progress, 0);
        if let TransferState::Finished(result) = progress.advance(op, returned) {
            return result;
        }
    }
}

/// Makes one call, a read or write with these RWF flags; what it returned, or the negated error code.
pub(super) fn call_once(fd: BorrowedFd<'_>, op: &mut Op, progress: &mut Transfer, flags: i32) -> i32 {
    let fd = fd.as_raw_fd();
    let (Ok(offset), Ok(len)) = (i64::try_from(progress.offset(op)), i64::try_from(op.len)) else {
        // What the kernel says to offsets it cannot express.
        return -libc::EINVAL;
    };
    let returned = match op.action {
        Action::Read | Action::Write | Action::WriteThrough => {
            let (one, runs, count);
            match progress.next_buffers(&mut op.payload) {
                // The usual case, in which the kernel need not fetch an array of runs first.
                IoBuffers::Single(start, len) if op.action == Action::Write && flags == 0 => {
                    // SAFETY: as below.
                    return told(unsafe { libc::pwrite(fd, start.cast_const().cast(), len as usize, offset) });
                }
                IoBuffers::Single(start, len) => {
                    one = libc::iovec { iov_base: start.cast(), iov_len: len as usize };
                    (runs, count) = (&raw const one, 1);
                }
                IoBuffers::Vectored(start, n) => (runs, count) = (start, n.cast_signed()),
            }
            // SAFETY: the runs are memory of the payload, which `op` keeps alive and to which no reference exists
            // during the call; the array of runs lies in the payload, in `progress` or on this stack.
            unsafe {
                match op.action {
                    Action::Read => libc::preadv2(fd, runs, count, offset, flags),
                    Action::Write => libc::pwritev2(fd, runs, count, offset, flags),
                    _ => libc::pwritev2(fd, runs, count, offset, flags | libc::RWF_DSYNC),
                }
            }
        }
        // SAFETY: no memory is passed.
        Action::Sync => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: no memory is passed.
        Action::Prefetch => match unsafe { libc::posix_fadvise(fd, offset, len, libc::POSIX_FADV_WILLNEED) } {
            0 => 0,
            code => return -code,
        },
        // SAFETY: no memory is passed. A length of 0: to the end.
        Action::StartWriteback => unsafe { libc::sync_file_range(fd, 0, 0, libc::SYNC_FILE_RANGE_WRITE) as isize },
        // SAFETY: no memory is passed.
        action => unsafe { libc::fallocate(fd, transfer::fallocate_mode(action), offset, len) as isize },
    };
    told(returned)
}

/// What a call returned, or the negated error code.
fn told(returned: isize) -> i32 {
    match i32::try_from(returned).expect("the kernel moves less than 2 GiB in a call") {
        -1 => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        n => n,
    }
}
