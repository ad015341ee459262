//! The blocking engine: `submit` makes the calls (preadv, pwritev, fdatasync, fallocate), one after the other.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::backend::File;
use super::engine::Engine;
use super::host::file::HostFile;
use super::op::{Action, Completion, FILE_SLOTS, FileSlot, Op};
use super::transfer::{self, IoBuffers, Transfer, TransferState};

/// Engine that makes blocking calls.
pub struct BlockingEngine {
    files: Vec<Option<Arc<HostFile>>>,
    pushed: Vec<Op>,
    completed: Vec<Completion>,
    transfer: Transfer,
    depth: usize,
    calls: u64,
}

// SAFETY: the only fields that are not Send are the iovecs in `transfer`. `Transfer::next_buffers` clears the list and
// fills it from the operation that `execute` borrows, and only the system calls of the same `execute` use the iovecs.
// So no iovec is used after the engine has moved to another thread.
unsafe impl Send for BlockingEngine {}

impl BlockingEngine {
    /// Creates an engine for at most `depth` outstanding operations.
    pub fn new(depth: usize) -> BlockingEngine {
        assert!(depth > 0, "an engine takes at least one operation");
        BlockingEngine {
            files: vec![None; usize::from(FILE_SLOTS)],
            pushed: Vec::with_capacity(depth),
            completed: Vec::with_capacity(depth),
            transfer: Transfer::default(),
            depth,
            calls: 0,
        }
    }
}

impl Engine for BlockingEngine {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)?;
        *entry = Some(HostFile::of(file)?);
        Ok(())
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        *self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)? = None;
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
            let result = match self.files.get(op.slot.as_usize()).and_then(Option::as_ref) {
                Some(file) => execute(file.as_fd(), &mut op, &mut self.transfer, &mut self.calls),
                None => Err(io::Error::from_raw_os_error(libc::EBADF)),
            };
            self.completed.push(Completion { op, result });
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.completed);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn outstanding(&self) -> usize {
        self.pushed.len() + self.completed.len()
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

fn execute(fd: BorrowedFd<'_>, op: &mut Op, transfer: &mut Transfer, calls: &mut u64) -> io::Result<()> {
    transfer.reset();
    loop {
        *calls += 1;
        let returned = call_once(fd, op, transfer, 0);
        if let TransferState::Finished(result) = transfer.advance(op, returned) {
            return result;
        }
    }
}

/// Makes the next system call of an operation. `flags` are the RWF flags of a read or write. Returns the result, or the
/// negated error code.
pub(super) fn call_once(fd: BorrowedFd<'_>, op: &mut Op, transfer: &mut Transfer, flags: i32) -> i32 {
    let fd = fd.as_raw_fd();
    let (Ok(offset), Ok(len)) = (i64::try_from(transfer.offset(op)), i64::try_from(op.len)) else {
        // As signed values, the offset and length would be negative: the kernel's error for that is EINVAL.
        return -libc::EINVAL;
    };
    let returned = match op.action {
        Action::Read | Action::Write | Action::WriteThrough => {
            let (one, runs, count);
            match transfer.next_buffers(&mut op.payload) {
                // The usual case. Unlike pwritev2, pwrite passes no array of iovecs that the kernel has to copy.
                IoBuffers::Single(start, len) if op.action == Action::Write && flags == 0 => {
                    // SAFETY: `next_buffers` returned a part of the payload, which `op` keeps alive. No reference to
                    // its bytes exists during the call: `op` is borrowed exclusively, and guest memory is accessed only
                    // by raw pointers.
                    return result_code(unsafe { libc::pwrite(fd, start.cast_const().cast(), len as usize, offset) });
                }
                IoBuffers::Single(start, len) => {
                    one = libc::iovec { iov_base: start.cast(), iov_len: len as usize };
                    (runs, count) = (&raw const one, 1);
                }
                IoBuffers::Vectored(start, n) => (runs, count) = (start, n.cast_signed()),
            }
            // SAFETY: `next_buffers` returned parts of the payload, which `op` keeps alive. No reference to their bytes
            // exists during the call: `op` is borrowed exclusively, and guest memory is accessed only by raw pointers.
            // The array of iovecs is in the payload, in `transfer` or on this stack, all of which outlive the call.
            unsafe {
                match op.action {
                    Action::Read => libc::preadv2(fd, runs, count, offset, flags),
                    Action::Write => libc::pwritev2(fd, runs, count, offset, flags),
                    _ => libc::pwritev2(fd, runs, count, offset, flags | libc::RWF_DSYNC),
                }
            }
        }
        // SAFETY: the call accesses no memory of this process.
        Action::Sync => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: the call accesses no memory of this process.
        Action::Prefetch => match unsafe { libc::posix_fadvise(fd, offset, len, libc::POSIX_FADV_WILLNEED) } {
            0 => 0,
            code => return -code,
        },
        // SAFETY: the call accesses no memory of this process. A length of 0 means up to the end of the file.
        Action::StartWriteback => unsafe { libc::sync_file_range(fd, 0, 0, libc::SYNC_FILE_RANGE_WRITE) as isize },
        // SAFETY: the call accesses no memory of this process.
        action => unsafe { libc::fallocate(fd, transfer::fallocate_mode(action), offset, len) as isize },
    };
    result_code(returned)
}

/// Converts the return value of a call to a count or a negated error code.
fn result_code(returned: isize) -> i32 {
    match i32::try_from(returned).expect("the kernel moves less than 2 GiB in a call") {
        -1 => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        n => n,
    }
}
