//! The stages of a request: the way from a plan to an answer. One `match` drives them; see the drawing in `mod.rs`.
//!
//! A stage is never re-entered midway: look-ups may repeat, and a reservation that is asked for again finds itself.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::lane::Lane;
use super::request::{Answer, Outcome, Request, Work};
use super::task::{Stage, Task, Token};
use crate::chain::{Missing, PlanBuffer, Source};
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Buffer, Completion, Op, Payload, GuestIovecs, FileSlot};
use crate::units::SECTOR_BYTES;

/// Zeros written at once where a file system cannot punch, in bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// What comes after a stage.
pub(super) enum Next {
    /// That stage, now.
    Stage(Stage),
    /// That stage, when what it waits for is over.
    Wait(Stage),
    /// Nothing: the answer.
    Over(Outcome),
}

impl Lane {
    /// Begins a request. There is `room`.
    pub(super) fn begin(&mut self, request: Request) {
        let number = self.free.pop().expect("a request is pushed only where there is room");
        let task = match self.spare.pop() {
            Some(mut task) => {
                task.renew(request.tag, request.work);
                task
            }
            None => Box::new(Task::new(request.tag, request.work)),
        };
        self.tasks[number as usize] = Some(task);
        self.advance(number);
    }

    /// An operation of a request is over.
    pub(super) fn moved(&mut self, number: u32, detail: u32, Completion { op, result }: Completion) {
        if op.action == Action::Prefetch {
            return self.prefetched(number);
        }
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        let (mut again, mut refused) = (None, false);
        match (op.payload, result) {
            (Payload::Own(sector), Ok(())) if task.stage == Stage::Load => {
                task.load.as_mut().expect("loading").complete(detail as usize, &sector);
            }
            (Payload::Own(bounce), Ok(())) => {
                if let (Work::Read { into, .. }, Action::Read) = (&task.work, op.action) {
                    into.copy_from(detail as usize, &bounce);
                }
            }
            (Payload::Guest(slices), Err(e)) if self.disk.parks() && is_full(op.action, &e) => {
                task.full = true;
                give_back(&mut self.pool, slices);
            }
            // Zeroing a range takes room, too.
            (Payload::Own(_) | Payload::None, Err(e)) if self.disk.parks() && is_full(op.action, &e) => {
                task.full = true
            }
            (Payload::Guest(slices), Err(e)) if is_full(op.action, &e) => {
                (task.failed, refused) = (true, true);
                give_back(&mut self.pool, slices);
            }
            (Payload::Guest(slices), result) => {
                task.failed |= report(result, op.action, op.offset, || self.disk.version().file(op.slot).path());
                give_back(&mut self.pool, slices);
            }
            (Payload::None, Err(e)) if e.kind() == io::ErrorKind::Unsupported => {
                again = Some(Op::range(op.token, op.slot, op.action, op.offset, op.len));
            }
            (_, result) => {
                task.failed |= report(result, op.action, op.offset, || self.disk.version().file(op.slot).path());
            }
        }
        if let Some(op) = again {
            return self.without_punch(number, op);
        }
        task.pending -= 1;
        if refused {
            self.log_refused();
        }
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        if task.pending == 0 {
            self.advance(number);
        }
    }

    /// The file system cannot punch: a discard is forgotten, zeros are written instead where zeros are owed.
    fn without_punch(&mut self, number: u32, op: Op) {
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        task.pending -= 1;
        let mut ops = Vec::new();
        if matches!(task.work, Work::WriteZeroes { .. }) {
            let mut at = op.offset;
            while at < op.offset + op.len {
                let len = (op.offset + op.len - at).min(ZERO_CHUNK);
                let zeros = Buffer::zeroed(usize::try_from(len).expect("a chunk"));
                ops.push(Op::write(op.token, op.slot, at, Payload::Own(zeros)));
                at += len;
            }
            task.pending += u32::try_from(ops.len()).expect("a request is at most a disk of chunks");
        }
        let pending = task.pending;
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
                Stage::Plan => self.plan(number, &mut task),
                Stage::Load if task.failed => Next::Over(Outcome::Failed),
                Stage::Load => {
                    let load = task.load.take().expect("loading");
                    self.disk.version().supply(&load, &mut task.held);
                    Next::Stage(if task.moved { Stage::Move } else { Stage::Plan })
                }
                Stage::Room if task.failed => Next::Over(Outcome::Failed),
                Stage::Room => Next::Stage(Stage::Plan),
                Stage::Move => self.arrived(number, &mut task),
                Stage::Await => Next::Over(if task.failed { Outcome::Failed } else { Outcome::Done }),
            };
            match next {
                Next::Stage(stage) => task.stage = stage,
                Next::Wait(stage) => {
                    task.stage = stage;
                    self.tasks[number as usize] = Some(task);
                    return;
                }
                Next::Over(outcome) => break outcome,
            }
        };
        self.punched(number);
        self.free.push(number);
        if task.held_by_host {
            self.release_held(outcome == Outcome::Done);
        }
        let tag = task.tag;
        match task.end() {
            Work::Prefetch { .. } => {}
            Work::Read { into: memory, .. } | Work::Write { from: memory, .. } => {
                self.answers.push(Answer { tag, outcome, memory: Some(memory) });
            }
            _ => self.answers.push(Answer { tag, outcome, memory: None }),
        }
        self.spare.push(task);
    }

    fn plan(&mut self, number: u32, task: &mut Task) -> Next {
        if matches!(task.work, Work::Flush) && self.disk.is_read_only() {
            return Next::Over(Outcome::Done);
        }
        if !matches!(task.work, Work::Read { .. } | Work::Prefetch { .. }) {
            let top = self.disk.version().top();
            if top.is_none_or(|top| top.image.is_poisoned()) {
                return Next::Over(Outcome::Failed);
            }
        }
        if task.punches() && !self.may_punch(number) {
            return Next::Wait(Stage::Plan);
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
                self.plan_ahead(*range, &mut plan);
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
                return self.make_durable(number, task);
            }
        };
        let next = if !plan.missing.is_empty() {
            self.load(number, task, &plan.missing)
        } else if room.is_err() {
            if self.grow_if_short() {
                self.punched(number);
                self.park(number);
                Next::Wait(Stage::Room)
            } else {
                Next::Stage(Stage::Plan) // another lane made room in the meantime
            }
        } else {
            task.marks.clear();
            task.marks.extend_from_slice(&plan.marks);
            if let (Work::Write { range, .. }, true) = (&task.work, mutant::is(Mutant::EarlyMarks)) {
                let _ = self.disk.version().top().expect("a writable disk").image.mark(*range);
            }
            self.move_all(number, task, &plan);
            if !matches!(task.work, Work::Write { .. } | Work::WriteZeroes { .. }) {
                task.held.release();
            }
            if plan.reserved {
                self.grow_if_short();
            }
            if task.pending == 0 { Next::Stage(Stage::Move) } else { Next::Wait(Stage::Move) }
        };
        self.plan = plan;
        next
    }

    /// Begins to read the bitmaps that a plan or a mark missed.
    fn load(&mut self, number: u32, task: &mut Task, missing: &[Missing]) -> Next {
        let load = self.disk.version().load(missing);
        for (piece, (slot, at)) in (0..).zip(load.reads()) {
            let sector = Payload::Own(Buffer::zeroed(SECTOR_BYTES));
            task.pending += 1;
            self.push_op(Op::read(Token::Task { task: number, detail: piece }.pack(), slot, at, sector));
        }
        task.load = Some(Box::new(load));
        if task.pending == 0 { Next::Stage(Stage::Load) } else { Next::Wait(Stage::Load) }
    }

    /// Pushes the operations of a plan.
    fn move_all(&mut self, number: u32, task: &mut Task, plan: &PlanBuffer) {
        if let Work::Prefetch { range } = task.work {
            return self.prefetch(number, task, range, plan);
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
                    let action = if ranges[task.at].unmap { Action::Punch } else { Action::Zero };
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
                task.pending += 1;
                self.push_op(op);
            }
            at += len;
        }
    }

    /// The part of a request's memory that an operation moves; a bounce buffer where O_DIRECT does not take it.
    fn payload(&mut self, memory: &GuestIovecs, at: usize, len: usize, slot: FileSlot, copy: bool) -> Payload {
        let mut slices = self.pool.pop().unwrap_or_else(|| GuestIovecs::with_capacity(8));
        memory.slice_into(at, len, &mut slices);
        let align = self.disk.memory_align(slot);
        if align == 1 || slices.is_aligned(align) {
            return Payload::Guest(slices);
        }
        let mut bounce = Buffer::zeroed(len);
        if copy {
            slices.copy_to(0, &mut bounce);
        }
        give_back(&mut self.pool, slices);
        Payload::Own(bounce)
    }

    /// All operations of a range are complete.
    fn arrived(&mut self, number: u32, task: &mut Task) -> Next {
        if task.failed {
            return Next::Over(Outcome::Failed);
        }
        if std::mem::take(&mut task.full) {
            // The next tick tries it again, from the start: nothing of it was marked.
            self.punched(number);
            self.park(number);
            self.hold(task);
            return Next::Wait(Stage::Room);
        }
        let reads = matches!(task.work, Work::Read { .. } | Work::Prefetch { .. });
        let (Some(top), false) = (self.disk.version().top(), reads) else {
            return Next::Over(Outcome::Done);
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
                Ok(kept) => task.owes_commit |= !kept,
                Err(granules) => absent.extend(granules),
            }
        }
        if !absent.is_empty() {
            // They left memory while the bytes moved. Marks may be repeated.
            task.moved = true;
            return self.load(number, task, &Missing::bitmap_sectors(&absent));
        }
        task.moved = false;
        task.held.release();
        if matches!(task.work, Work::Write { .. }) {
            self.early.wrote(self.disk.counts().commits.load(Ordering::Relaxed));
        }
        if top.image.take_commit_due() {
            self.commit_soon();
        }
        if task.next_piece() {
            self.punch_later(number);
            Next::Wait(Stage::Plan)
        } else if task.owes_commit || self.disk.is_write_through() {
            self.make_durable(number, task)
        } else {
            Next::Over(Outcome::Done)
        }
    }

    fn make_durable(&mut self, number: u32, task: &mut Task) -> Next {
        // Not `failed` by what another round may say: the letter names the round.
        task.round = self.join(number);
        Next::Wait(Stage::Await)
    }
}

/// Keeps the room of an operation's slices, and not a moment longer the memory, which the front-end may have taken back.
fn give_back(pool: &mut Vec<GuestIovecs>, mut slices: GuestIovecs) {
    slices.clear();
    pool.push(slices);
}

/// Whether a write found the host full: a place that was punched, or a file system that copies on write.
fn is_full(action: Action, e: &io::Error) -> bool {
    action != Action::Read && matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an operation failed; tells the log. To find the file takes longer the deeper the chain is.
fn report<'a>(result: io::Result<()>, action: Action, offset: u64, path: impl FnOnce() -> &'a Path) -> bool {
    let Err(e) = result else { return false };
    if e.raw_os_error() == Some(libc::EFAULT) {
        // No failure of the file: a page of the guest's memory cannot be had, which is logged once for the disk.
        return true;
    }
    log::warn!("{}: {action:?} failed at byte {offset}: {e}", path().display());
    true
}
