//! Creates the operations of a task from its plan, and evaluates them when they complete.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::op_queue::OpQueue;
use super::request::Work;
use super::served_version::ServedVersion;
use super::statistics::LaneCounters;
use super::task::{Task, TaskStage, Token};
use crate::chain::{Extent, Source};
use crate::storage::{Action, Buffer, Completion, FileSlot, GuestIovecs, Op, Payload};

/// Maximum number of zero bytes per write, if the file system supports no range operation for zeroing.
const ZERO_CHUNK: u64 = 1 << 20;

/// The action that the lane must take after an operation has completed.
pub(super) enum OpEffect {
    /// Nothing.
    None,
    /// Log that a write failed because the file system is full.
    LogNoSpace,
    /// Replace a range operation that the file system does not support, with [`TaskOps::replace_unsupported`].
    Unsupported(Op),
}

/// Creates and evaluates the operations of tasks.
pub(super) struct TaskOps {
    /// The counters of the lane.
    pub(super) counters: Arc<LaneCounters>,
    /// Iovecs of completed operations, kept so that their memory is reused. They hold no reference to guest memory.
    iovec_pool: Vec<GuestIovecs>,
}

impl TaskOps {
    /// Creates the state of a lane with these counters.
    pub(super) fn new(counters: Arc<LaneCounters>) -> TaskOps {
        TaskOps { counters, iovec_pool: Vec::new() }
    }

    /// Pushes the operations for the extents of a plan.
    #[inline]
    pub(super) fn push(
        &mut self,
        number: u32,
        task: &mut Task,
        extents: &[Extent],
        version: &ServedVersion,
        ops: &mut OpQueue,
    ) {
        let mut at = 0;
        for extent in extents {
            self.counters.count_extent(&task.work, extent);
            let bytes = extent.range.bytes();
            let len = usize::try_from(bytes).expect("a range on a disk of 2040 GiB");
            let token = Token::Task { task: number, detail: u32::try_from(at).unwrap_or(0) }.pack();
            let op = match (&task.work, extent.source) {
                (Work::Read { into, .. }, Source::Zero) => {
                    into.zero(at, len);
                    None
                }
                (Work::Read { into, .. }, Source::File { slot, offset }) => {
                    let payload = self.payload(into, at, len, version.served_file(slot).memory_align, false);
                    Some(Op::read(token, slot, offset, payload))
                }
                (Work::Write { from, .. }, Source::File { slot, offset }) => {
                    let payload = self.payload(from, at, len, version.served_file(slot).memory_align, true);
                    Some(Op::write(token, slot, offset, payload))
                }
                (Work::WriteZeroes { ranges }, Source::File { slot, offset }) => {
                    let action = if ranges[task.range_index].unmap { Action::Punch } else { Action::Zero };
                    Some(Op::range(token, slot, action, offset, bytes))
                }
                (Work::Discard { .. }, Source::File { slot, offset }) => {
                    Some(Op::range(token, slot, Action::Punch, offset, bytes))
                }
                (_, Source::Zero) | (Work::Flush | Work::Prefetch { .. }, _) => {
                    unreachable!("only reads find zeros, a flush plans nothing, a prefetch moves nothing")
                }
            };
            if let Some(op) = op {
                task.pending_ops += 1;
                ops.push(op);
            }
            at += len;
        }
    }

    /// Returns the part of a request's memory that an operation moves, or a bounce buffer if the alignment of the part
    /// does not suit O_DIRECT. If `copy` is true, the bounce buffer contains the bytes of the part.
    fn payload(&mut self, memory: &GuestIovecs, at: usize, len: usize, align: usize, copy: bool) -> Payload {
        let mut iovecs = self.iovec_pool.pop().unwrap_or_else(|| GuestIovecs::with_capacity(8));
        memory.slice_into(at, len, &mut iovecs);
        if align == 1 || iovecs.is_aligned(align) {
            return Payload::Guest(iovecs);
        }
        let mut bounce = Buffer::zeroed(len);
        if copy {
            iovecs.copy_to(0, &mut bounce);
        }
        self.recycle(iovecs);
        Payload::Own(bounce)
    }

    /// Pushes a read of one bitmap sector.
    pub(super) fn push_bitmap_read(
        &mut self,
        number: u32,
        task: &mut Task,
        (piece, slot, offset): (u32, FileSlot, u64),
        ops: &mut OpQueue,
    ) {
        let sector = Payload::Own(Buffer::zeroed(crate::units::SECTOR_BYTES));
        task.pending_ops += 1;
        ops.push(Op::read(Token::Task { task: number, detail: piece }.pack(), slot, offset, sector));
    }

    /// Evaluates a completed operation: stores the bytes that it read and records its failure. `version` is the version
    /// of the task; `parks_when_full` is true if writes wait while the file system is full. The caller decrements
    /// `pending_ops`.
    #[inline]
    pub(super) fn complete(
        &mut self,
        task: &mut Task,
        detail: u32,
        completion: Completion,
        version: &ServedVersion,
        parks_when_full: bool,
    ) -> OpEffect {
        let Completion { op, result } = completion;
        let path = || version.file(op.slot).path();
        match (op.payload, result) {
            (Payload::Own(sector), Ok(())) if matches!(task.stage, TaskStage::Load | TaskStage::LoadForMark) => {
                task.load.as_mut().expect("a task that loads").complete(detail as usize, &sector);
            }
            (Payload::Own(bounce), Ok(())) => {
                if let (Work::Read { into, .. }, Action::Read) = (&task.work, op.action) {
                    into.copy_from(detail as usize, &bounce);
                }
            }
            (Payload::Guest(iovecs), Err(e)) if parks_when_full && is_full(op.action, &e) => {
                task.no_space = true;
                self.recycle(iovecs);
            }
            // Zeroing a range, and a write from a bounce buffer, may allocate space, too.
            (Payload::Own(_) | Payload::None, Err(e)) if parks_when_full && is_full(op.action, &e) => {
                task.no_space = true;
            }
            (Payload::Guest(iovecs), Err(e)) if is_full(op.action, &e) => {
                task.failed = true;
                self.recycle(iovecs);
                return OpEffect::LogNoSpace;
            }
            (Payload::Guest(iovecs), result) => {
                task.failed |= log_if_failed(result, op.action, op.offset, path);
                self.recycle(iovecs);
            }
            (Payload::None, Err(e)) if e.kind() == io::ErrorKind::Unsupported => {
                return OpEffect::Unsupported(Op::range(op.token, op.slot, op.action, op.offset, op.len));
            }
            (_, result) => task.failed |= log_if_failed(result, op.action, op.offset, path),
        }
        OpEffect::None
    }

    /// Replaces a range operation that the file system does not support. Writes of zeros replace a zeroing; a discard
    /// is dropped.
    pub(super) fn replace_unsupported(&mut self, task: &mut Task, op: &Op, ops: &mut OpQueue) {
        if !matches!(task.work, Work::WriteZeroes { .. }) {
            return;
        }
        let mut at = op.offset;
        while at < op.offset + op.len {
            let len = (op.offset + op.len - at).min(ZERO_CHUNK);
            let zeros = Buffer::zeroed(usize::try_from(len).expect("a chunk"));
            task.pending_ops += 1;
            ops.push(Op::write(op.token, op.slot, at, Payload::Own(zeros)));
            at += len;
        }
    }

    /// Keeps the iovecs of an operation so that their memory is reused. Drops the reference to guest memory, so that
    /// guest memory can be unmapped when the front-end removes it.
    fn recycle(&mut self, mut iovecs: GuestIovecs) {
        iovecs.clear();
        self.iovec_pool.push(iovecs);
    }
}

/// Whether an operation failed because the file system is full. Writes to allocated blocks can also fail for this
/// reason, after a punch or on a copy-on-write file system.
fn is_full(action: Action, e: &io::Error) -> bool {
    action != Action::Read && matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Returns whether an operation failed, and logs the failure. Calls `path` only for a failure, since the cost of the
/// call grows with the depth of the chain.
fn log_if_failed<'a>(result: io::Result<()>, action: Action, offset: u64, path: impl FnOnce() -> &'a Path) -> bool {
    let Err(e) = result else { return false };
    if e.raw_os_error() == Some(libc::EFAULT) {
        // EFAULT is no failure of the file: a page of guest memory is lost. The loss is logged elsewhere, once for the
        // disk.
        return true;
    }
    log::warn!("{}: {action:?} failed at byte {offset}: {e}", path().display());
    true
}
