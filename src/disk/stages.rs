//! The stages of a request: the way from a plan to an answer. One `match` drives them; see the drawing in `mod.rs`.
//!
//! A stage is never re-entered midway: look-ups may repeat, and a reservation that is asked for again finds itself.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::lane::Lane;
use super::request::{Answer, Outcome, Request, Work};
use super::task::{Task, TaskStage, Token};
use crate::chain::{Missing, PlanBuffer, Source};
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, Completion, FileSlot, GuestIovecs, Op, Payload};
use crate::units::SECTOR_BYTES;

/// Zeros written at once where a file system cannot punch, in bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// What comes after a stage.
pub(super) enum StageResult {
    /// That stage, now.
    Enter(TaskStage),
    /// That stage, when what it waits for is over.
    Wait(TaskStage),
    /// Nothing: the answer.
    Finish(Outcome),
}

impl Lane {
    /// Begins a request. There is `room`.
    pub(super) fn start_request(&mut self, request: Request) {
        let number = self.free_tasks.pop().expect("a request is pushed only where there is room");
        let task = match self.task_pool.pop() {
            Some(mut task) => {
                task.reset(request.tag, request.work);
                task
            }
            None => Box::new(Task::new(request.tag, request.work)),
        };
        self.tasks[number as usize] = Some(task);
        self.advance(number);
    }

    /// An operation of a request is over.
    pub(super) fn op_completed(&mut self, number: u32, detail: u32, Completion { op, result }: Completion) {
        if op.action == Action::Prefetch {
            return self.prefetch_completed(number);
        }
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        let (mut again, mut refused) = (None, false);
        match (op.payload, result) {
            (Payload::Own(sector), Ok(())) if task.stage == TaskStage::Load => {
                task.load.as_mut().expect("loading").complete(detail as usize, &sector);
            }
            (Payload::Own(bounce), Ok(())) => {
                if let (Work::Read { into, .. }, Action::Read) = (&task.work, op.action) {
                    into.copy_from(detail as usize, &bounce);
                }
            }
            (Payload::Guest(slices), Err(e)) if self.disk.parks_when_full() && is_full(op.action, &e) => {
                task.no_space = true;
                recycle(&mut self.iovec_pool, slices);
            }
            // Zeroing a range takes room, too.
            (Payload::Own(_) | Payload::None, Err(e)) if self.disk.parks_when_full() && is_full(op.action, &e) => {
                task.no_space = true
            }
            (Payload::Guest(slices), Err(e)) if is_full(op.action, &e) => {
                (task.failed, refused) = (true, true);
                recycle(&mut self.iovec_pool, slices);
            }
            (Payload::Guest(slices), result) => {
                task.failed |= log_if_failed(result, op.action, op.offset, || self.disk.version().file(op.slot).path());
                recycle(&mut self.iovec_pool, slices);
            }
            (Payload::None, Err(e)) if e.kind() == io::ErrorKind::Unsupported => {
                again = Some(Op::range(op.token, op.slot, op.action, op.offset, op.len));
            }
            (_, result) => {
                task.failed |= log_if_failed(result, op.action, op.offset, || self.disk.version().file(op.slot).path());
            }
        }
        if let Some(op) = again {
            return self.punch_unsupported(number, op);
        }
        task.pending_ops -= 1;
        if refused {
            self.log_no_space();
        }
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        if task.pending_ops == 0 {
            self.advance(number);
        }
    }

    /// The file system cannot punch: a discard is forgotten, zeros are written instead where zeros are owed.
    fn punch_unsupported(&mut self, number: u32, op: Op) {
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        task.pending_ops -= 1;
        let mut ops = Vec::new();
        if matches!(task.work, Work::WriteZeroes { .. }) {
            let mut at = op.offset;
            while at < op.offset + op.len {
                let len = (op.offset + op.len - at).min(ZERO_CHUNK);
                let zeros = Buffer::zeroed(usize::try_from(len).expect("a chunk"));
                ops.push(Op::write(op.token, op.slot, at, Payload::Own(zeros)));
                at += len;
            }
            task.pending_ops += u32::try_from(ops.len()).expect("a request is at most a disk of chunks");
        }
        let pending = task.pending_ops;
        ops.into_iter().for_each(|op| self.push_op(op));
        if pending == 0 {
            self.advance(number);
        }
    }

    /// Goes on with a request until it has to wait. The only place where stages change.
    pub(super) fn advance(&mut self, number: u32) {
        let mut task = self.tasks[number as usize].take().expect("a task under way");
        let outcome = loop {
            let next = match task.stage {
                TaskStage::Plan => self.plan_task(number, &mut task),
                TaskStage::Load if task.failed => StageResult::Finish(Outcome::Failed),
                TaskStage::Load => {
                    let load = task.load.take().expect("loading");
                    self.disk.version().supply(&load, &mut task.pins);
                    StageResult::Enter(if task.moved { TaskStage::Move } else { TaskStage::Plan })
                }
                TaskStage::AwaitGrowth if task.failed => StageResult::Finish(Outcome::Failed),
                TaskStage::AwaitGrowth => StageResult::Enter(TaskStage::Plan),
                TaskStage::Move => self.transfer_completed(number, &mut task),
                TaskStage::AwaitCommit => {
                    StageResult::Finish(if task.failed { Outcome::Failed } else { Outcome::Done })
                }
            };
            match next {
                StageResult::Enter(stage) => task.stage = stage,
                StageResult::Wait(stage) => {
                    task.stage = stage;
                    self.tasks[number as usize] = Some(task);
                    return;
                }
                StageResult::Finish(outcome) => break outcome,
            }
        };
        self.release_punch_lock(number);
        self.free_tasks.push(number);
        if task.stalled {
            self.end_stall(outcome == Outcome::Done);
        }
        let tag = task.tag;
        match task.take_work() {
            Work::Prefetch { .. } => {}
            Work::Read { into: memory, .. } | Work::Write { from: memory, .. } => {
                self.answers.push(Answer { tag, outcome, memory: Some(memory) });
            }
            _ => self.answers.push(Answer { tag, outcome, memory: None }),
        }
        self.task_pool.push(task);
    }

    fn plan_task(&mut self, number: u32, task: &mut Task) -> StageResult {
        if matches!(task.work, Work::Flush) && self.disk.is_read_only() {
            return StageResult::Finish(Outcome::Done);
        }
        if !matches!(task.work, Work::Read { .. } | Work::Prefetch { .. }) {
            let top = self.disk.version().top();
            if top.is_none_or(|top| top.image.is_poisoned()) {
                return StageResult::Finish(Outcome::Failed);
            }
        }
        if task.needs_punch_lock() && !self.may_punch(number) {
            return StageResult::Wait(TaskStage::Plan);
        }
        let mut plan = std::mem::take(&mut self.plan);
        let version = self.disk.version();
        let room = match &task.work {
            Work::Read { range, .. } => {
                if !std::mem::take(&mut self.planned) {
                    version.plan_read(*range, &mut plan);
                }
                Ok(())
            }
            Work::Prefetch { range } => {
                self.plan_readahead(*range, &mut plan);
                Ok(())
            }
            Work::Write { range, .. } => version.plan_write(*range, &mut plan),
            Work::Discard { .. } => {
                version.plan_discard(task.piece(), &mut plan);
                Ok(())
            }
            Work::WriteZeroes { .. } => version.plan_zero(task.piece(), &mut plan),
            Work::Flush => {
                self.plan = plan;
                return self.await_commit(number, task);
            }
        };
        let next = if !plan.missing.is_empty() {
            self.load_bitmaps(number, task, &plan.missing)
        } else if room.is_err() {
            if self.ensure_growth() {
                self.release_punch_lock(number);
                self.park(number);
                StageResult::Wait(TaskStage::AwaitGrowth)
            } else {
                StageResult::Enter(TaskStage::Plan) // another lane made room in the meantime
            }
        } else {
            task.marks.clear();
            task.marks.extend_from_slice(&plan.marks);
            if let (Work::Write { range, .. }, true) = (&task.work, mutant::enabled(Mutant::EarlyMarks)) {
                let _ = self.disk.version().top().expect("a writable disk").image.mark(*range);
            }
            self.push_transfers(number, task, &plan);
            if !matches!(task.work, Work::Write { .. } | Work::WriteZeroes { .. }) {
                task.pins.release();
            }
            if plan.reserved {
                self.ensure_growth();
            }
            if task.pending_ops == 0 { StageResult::Enter(TaskStage::Move) } else { StageResult::Wait(TaskStage::Move) }
        };
        self.plan = plan;
        next
    }

    /// Begins to read the bitmaps that a plan or a mark missed.
    fn load_bitmaps(&mut self, number: u32, task: &mut Task, missing: &[Missing]) -> StageResult {
        let load = self.disk.version().load(missing);
        for (piece, (slot, at)) in (0..).zip(load.reads()) {
            let sector = Payload::Own(Buffer::zeroed(SECTOR_BYTES));
            task.pending_ops += 1;
            self.push_op(Op::read(Token::Task { task: number, detail: piece }.pack(), slot, at, sector));
        }
        task.load = Some(Box::new(load));
        if task.pending_ops == 0 { StageResult::Enter(TaskStage::Load) } else { StageResult::Wait(TaskStage::Load) }
    }

    /// Pushes the operations of a plan.
    fn push_transfers(&mut self, number: u32, task: &mut Task, plan: &PlanBuffer) {
        if let Work::Prefetch { range } = task.work {
            return self.push_prefetches(number, task, range, plan);
        }
        let mut at = 0;
        for extent in &plan.extents {
            let bytes = extent.range.bytes();
            let len = usize::try_from(bytes).expect("a range on a disk of 2040 GiB");
            let token = Token::Task { task: number, detail: u32::try_from(at).unwrap_or(0) }.pack();
            let op = match (&task.work, extent.source) {
                (Work::Read { into, .. }, Source::Zero) => {
                    into.zero(at, len);
                    None
                }
                (Work::Read { into, .. }, Source::File { slot, offset }) => {
                    let payload = self.payload(into, at, len, slot, false);
                    Some(Op::read(token, slot, offset, payload))
                }
                (Work::Write { from, .. }, Source::File { slot, offset }) => {
                    let payload = self.payload(from, at, len, slot, true);
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
                self.push_op(op);
            }
            at += len;
        }
    }

    /// The part of a request's memory that an operation moves; a bounce buffer where O_DIRECT does not take it.
    fn payload(&mut self, memory: &GuestIovecs, at: usize, len: usize, slot: FileSlot, copy: bool) -> Payload {
        let mut slices = self.iovec_pool.pop().unwrap_or_else(|| GuestIovecs::with_capacity(8));
        memory.slice_into(at, len, &mut slices);
        let align = self.disk.memory_align(slot);
        if align == 1 || slices.is_aligned(align) {
            return Payload::Guest(slices);
        }
        let mut bounce = Buffer::zeroed(len);
        if copy {
            slices.copy_to(0, &mut bounce);
        }
        recycle(&mut self.iovec_pool, slices);
        Payload::Own(bounce)
    }

    /// All operations of a range are complete.
    fn transfer_completed(&mut self, number: u32, task: &mut Task) -> StageResult {
        if task.failed {
            return StageResult::Finish(Outcome::Failed);
        }
        if std::mem::take(&mut task.no_space) {
            // The next tick tries it again, from the start: nothing of it was marked.
            self.release_punch_lock(number);
            self.park(number);
            self.stall(task);
            return StageResult::Wait(TaskStage::AwaitGrowth);
        }
        let reads = matches!(task.work, Work::Read { .. } | Work::Prefetch { .. });
        let (Some(top), false) = (self.disk.version().top(), reads) else {
            return StageResult::Finish(Outcome::Done);
        };
        let marks = match &task.work {
            Work::Write { range, .. } => std::slice::from_ref(range),
            Work::WriteZeroes { .. } => task.marks.as_slice(),
            Work::Discard { .. } => {
                top.image.note_unsynced();
                &[][..]
            }
            Work::Read { .. } | Work::Prefetch { .. } | Work::Flush => {
                unreachable!("answered above; a flush moves nothing")
            }
        };
        let mut absent = Vec::new();
        for range in marks {
            match top.image.mark(*range) {
                Ok(kept) => task.needs_commit |= !kept,
                Err(granules) => absent.extend(granules),
            }
        }
        if !absent.is_empty() {
            // They left memory while the bytes moved. Marks may be repeated.
            task.moved = true;
            return self.load_bitmaps(number, task, &Missing::bitmap_sectors(&absent));
        }
        task.moved = false;
        task.pins.release();
        if matches!(task.work, Work::Write { .. }) {
            self.early_writeback.record_write(self.disk.counters().commits.load(Ordering::Relaxed));
        }
        if top.image.take_commit_due() {
            self.start_background_commit();
        }
        if task.next_piece() {
            self.requeue_punch(number);
            StageResult::Wait(TaskStage::Plan)
        } else if task.needs_commit || self.disk.is_write_through() {
            self.await_commit(number, task)
        } else {
            StageResult::Finish(Outcome::Done)
        }
    }

    fn await_commit(&mut self, number: u32, task: &mut Task) -> StageResult {
        // Not `failed` by what another round may say: the letter names the round.
        task.commit_round = self.join_commit(number);
        StageResult::Wait(TaskStage::AwaitCommit)
    }
}

/// Keeps the room of an operation's slices, and not a moment longer the memory, which the front-end may have taken back.
fn recycle(pool: &mut Vec<GuestIovecs>, mut slices: GuestIovecs) {
    slices.clear();
    pool.push(slices);
}

/// Whether a write found the host full: a place that was punched, or a file system that copies on write.
fn is_full(action: Action, e: &io::Error) -> bool {
    action != Action::Read && matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an operation failed; tells the log. To find the file takes longer the deeper the chain is.
fn log_if_failed<'a>(result: io::Result<()>, action: Action, offset: u64, path: impl FnOnce() -> &'a Path) -> bool {
    let Err(e) = result else { return false };
    if e.raw_os_error() == Some(libc::EFAULT) {
        // No failure of the file: a page of the guest's memory cannot be had, which is logged once for the disk.
        return true;
    }
    log::warn!("{}: {action:?} failed at byte {offset}: {e}", path().display());
    true
}
