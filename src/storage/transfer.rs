//! What the engines on real files share: where a transfer goes on after a short one, and what a result means.

use std::io;

use super::op::{Action, Op};
use super::payload::Payload;

/// Runs in one call, at most (UIO_MAXIOV). More are a short transfer.
const MAX_RUNS: usize = 1024;

/// Bytes in a call on a single run, at most: the kernel stops a page short of 2 GiB.
const MAX_BYTES: usize = 1 << 30;

/// Calls in a row without progress (EAGAIN, EINTR) before that is an error.
const MAX_IDLE: u32 = 1000;

/// How far an operation has come. Kept, with its room, from one operation to the next.
#[derive(Default)]
pub(super) struct Transfer {
    done: usize,
    idle: u32,
    /// The runs that are left, after a short transfer.
    rest: Vec<libc::iovec>,
}

/// Memory for the next call.
pub(super) enum IoBuffers {
    /// A single run.
    Single(*mut u8, u32),
    /// Several, in an array that stays where it is until the operation is over or goes on.
    Vectored(*const libc::iovec, u32),
}

/// What to do after a call.
#[derive(Debug)]
pub(super) enum TransferState {
    /// The operation is over.
    Finished(io::Result<()>),
    /// Call again with the next [`Piece`].
    Continue,
}

impl Transfer {
    /// Starts anew.
    pub(super) fn reset(&mut self) {
        self.done = 0;
        self.idle = 0;
    }

    /// File offset at which the operation goes on.
    pub(super) fn offset(&self, op: &Op) -> u64 {
        op.offset + self.done as u64
    }

    /// The memory that is left of a read or a write.
    pub(super) fn next_buffers(&mut self, payload: &mut Payload) -> IoBuffers {
        match payload {
            Payload::None => panic!("reads and writes have a payload"),
            Payload::Own(b) => one(b[self.done..].as_mut_ptr(), b.len() - self.done),
            Payload::Guest(s) => {
                if self.done == 0 {
                    return many(s.iovecs());
                }
                self.rest.clear();
                let mut skip = self.done;
                for run in s.iovecs() {
                    let cut = skip.min(run.iov_len);
                    skip -= cut;
                    if cut < run.iov_len {
                        let start = run.iov_base.cast::<u8>().wrapping_add(cut).cast();
                        self.rest.push(libc::iovec { iov_base: start, iov_len: run.iov_len - cut });
                    }
                }
                many(&self.rest)
            }
        }
    }

    /// Takes in what a call returned: a count, or a negated error code.
    pub(super) fn advance(&mut self, op: &Op, returned: i32) -> TransferState {
        let moves = matches!(op.action, Action::Read | Action::Write | Action::WriteThrough);
        if returned < 0 {
            let code = -returned;
            if matches!(code, libc::EINTR | libc::EAGAIN) && self.idle < MAX_IDLE {
                self.idle += 1;
                return TransferState::Continue;
            }
            // A direct read goes on only from where a sector begins, and a file's odd end is not such a place.
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
        self.idle = 0;
        self.done += returned.unsigned_abs() as usize;
        assert!(self.done <= op.payload.len(), "the kernel moves no more than it was given");
        if self.done == op.payload.len() { TransferState::Finished(Ok(())) } else { TransferState::Continue }
    }
}

fn one(start: *mut u8, len: usize) -> IoBuffers {
    IoBuffers::Single(start, u32::try_from(len.min(MAX_BYTES)).expect("MAX_BYTES is below 2^32"))
}

fn many(runs: &[libc::iovec]) -> IoBuffers {
    match runs {
        [run] => one(run.iov_base.cast(), run.iov_len),
        _ => {
            IoBuffers::Vectored(runs.as_ptr(), u32::try_from(runs.len().min(MAX_RUNS)).expect("MAX_RUNS is below 2^32"))
        }
    }
}

/// The mode of fallocate(2) for an action on a range.
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
