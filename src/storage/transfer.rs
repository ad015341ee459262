//! Progress of one operation on a file of the host: continues short transfers and interprets results.

use std::io;

use super::op::{Action, Op};
use super::payload::Payload;

/// Maximum number of iovecs in one call (UIO_MAXIOV). A longer list is passed in several calls.
const MAX_IOVECS: usize = 1024;

/// Maximum length of a call with a single buffer. The kernel's limit is a page less than 2 GiB.
const MAX_CALL_BYTES: usize = 1 << 30;

/// Number of consecutive calls without progress (EAGAIN, EINTR) after which the operation fails.
const MAX_RETRIES: u32 = 1000;

/// Progress of an operation. Reused for the next operation, with its allocation.
#[derive(Default)]
pub(super) struct Transfer {
    done: usize,
    retries: u32,
    /// Iovecs that remain after a short transfer.
    remaining: Vec<libc::iovec>,
}

/// Memory for the next system call of a transfer.
pub(super) enum IoBuffers {
    /// Address and length of one buffer.
    Single(*mut u8, u32),
    /// Address and length of an array of iovecs. The array stays in place until the next call of
    /// [`Transfer::next_buffers`], as long as the payload and the transfer exist.
    Vectored(*const libc::iovec, u32),
}

/// State of an operation after a call.
#[derive(Debug)]
pub(super) enum TransferState {
    /// The operation is complete.
    Finished(io::Result<()>),
    /// Another call is needed, with the next [`IoBuffers`].
    Continue,
}

impl Transfer {
    /// Begins a new operation.
    pub(super) fn reset(&mut self) {
        self.done = 0;
        self.retries = 0;
    }

    /// Returns the file offset of the next call.
    pub(super) fn offset(&self, op: &Op) -> u64 {
        op.offset + self.done as u64
    }

    /// Returns the memory for the next call of a read or write.
    pub(super) fn next_buffers(&mut self, payload: &mut Payload) -> IoBuffers {
        match payload {
            Payload::None => panic!("reads and writes have a payload"),
            Payload::Own(b) => single(b[self.done..].as_mut_ptr(), b.len() - self.done),
            Payload::Guest(s) => {
                if self.done == 0 {
                    return vectored(s.iovecs());
                }
                self.remaining.clear();
                let mut skip = self.done;
                for run in s.iovecs() {
                    let cut = skip.min(run.iov_len);
                    skip -= cut;
                    if cut < run.iov_len {
                        let start = run.iov_base.cast::<u8>().wrapping_add(cut).cast();
                        self.remaining.push(libc::iovec { iov_base: start, iov_len: run.iov_len - cut });
                    }
                }
                vectored(&self.remaining)
            }
        }
    }

    /// Processes the result of a call: a count, or a negated error code.
    pub(super) fn advance(&mut self, op: &Op, returned: i32) -> TransferState {
        let moves = matches!(op.action, Action::Read | Action::Write | Action::WriteThrough);
        if returned < 0 {
            let code = -returned;
            if matches!(code, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
                self.retries += 1;
                return TransferState::Continue;
            }
            // A direct read cannot continue in the middle of a sector. The previous call ended there only because the
            // file does.
            if code == libc::EINVAL
                && op.action == Action::Read
                && self.done > 0
                && !self.offset(op).is_multiple_of(512)
            {
                return TransferState::Finished(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            if !moves && code == libc::EOPNOTSUPP {
                return TransferState::Finished(Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    io::Error::from_raw_os_error(code),
                )));
            }
            return TransferState::Finished(Err(io::Error::from_raw_os_error(code)));
        }
        if !moves {
            return TransferState::Finished(Ok(()));
        }
        if returned == 0 {
            let kind = if op.action == Action::Read { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
            return TransferState::Finished(Err(kind.into()));
        }
        self.retries = 0;
        self.done += returned.unsigned_abs() as usize;
        assert!(self.done <= op.payload.len(), "the kernel moves no more than it was given");
        if self.done == op.payload.len() { TransferState::Finished(Ok(())) } else { TransferState::Continue }
    }
}

fn single(start: *mut u8, len: usize) -> IoBuffers {
    IoBuffers::Single(start, u32::try_from(len.min(MAX_CALL_BYTES)).expect("MAX_CALL_BYTES is below 2^32"))
}

fn vectored(runs: &[libc::iovec]) -> IoBuffers {
    match runs {
        [run] => single(run.iov_base.cast(), run.iov_len),
        _ => {
            let count = u32::try_from(runs.len().min(MAX_IOVECS)).expect("MAX_IOVECS is below 2^32");
            IoBuffers::Vectored(runs.as_ptr(), count)
        }
    }
}

/// Returns the mode of fallocate(2) for an action on a range.
pub(super) fn fallocate_mode(action: Action) -> i32 {
    libc::FALLOC_FL_KEEP_SIZE
        | match action {
            Action::Allocate => 0,
            Action::Punch => libc::FALLOC_FL_PUNCH_HOLE,
            Action::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Action::Read
            | Action::Write
            | Action::WriteThrough
            | Action::Sync
            | Action::Prefetch
            | Action::StartWriteback => panic!("only actions on ranges have a mode"),
        }
}
