//! The stages of a request, from its plan to its answer. One `match` executes them; `mod.rs` has a drawing.
//!
//! A stage can be repeated from its beginning: look-ups have no effect, and a reservation that is repeated returns the
//! first one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cached_reads::CachedRead;
use super::lane::Lane;
use super::readahead;
use super::request::{Answer, Outcome, Request, Work};
use super::statistics::LaneCounters;
use super::task::{Task, TaskStage, Token};
use super::task_ops::OpEffect;
use crate::chain::{Missing, PlanBuffer};
use crate::mutant::{self, Mutant};
use crate::storage::{Action, Completion};
use crate::units::SectorRange;

/// Minimum number of free tasks for which a prefetch is started.
const MIN_FREE_TASKS: usize = 64;

/// The result of a stage.
enum StageResult {
    /// The next stage begins now.
    Enter(TaskStage),
    /// The task waits for an event, and then begins the next stage.
    Wait(TaskStage),
    /// The request is answered.
    Finish(Outcome),
}

impl Lane {
    /// The counters of the lane. The owner of the lane counts the requests, and the lane the bytes of each layer.
    pub fn counters(&self) -> &Arc<LaneCounters> {
        &self.task_ops.counters
    }

    /// Starts a request. Requires a free task, which [`Lane::push_capacity`] ensures.
    pub(super) fn start_request(&mut self, Request { tag, work }: Request) {
        let (number, mut task) = self.tasks.start(tag, work);
        let first = self.run_stage(number, &mut task);
        self.run(number, task, first);
    }

    /// Starts a read whose plan is in `self.plan`.
    fn start_planned_read(&mut self, CachedRead { tag, range, into }: CachedRead) {
        let (number, mut task) = self.tasks.start(tag, Work::Read { range, into });
        let plan = std::mem::take(&mut self.plan);
        let first = self.carry_out(number, &mut task, &plan);
        self.plan = plan;
        self.run(number, task, first);
    }

    /// Plans the queued reads. A read becomes a list of copies if all of its bytes are zeros or known to be resident,
    /// and a task otherwise.
    pub(super) fn plan_cached_reads(&mut self) {
        self.cached_reads.prefetch_plans(self.versions.current(), &mut self.frozen_cache);
        while let Some(read) = self.cached_reads.next_candidate() {
            let range = read.range;
            let version = self.versions.current();
            if let Err(read) = self.cached_reads.plan(read, version, &mut self.frozen_cache, &mut self.plan) {
                self.start_planned_read(read);
            }
            self.track_read(range);
        }
    }

    /// Makes the planned copies. Returns whether a copy failed, so that its read became a task with operations to
    /// submit.
    pub(super) fn copy_cached_reads(&mut self) -> bool {
        self.cached_reads.copy_all(&mut self.answers);
        let mut any_failed = false;
        while let Some(CachedRead { tag, range, into }) = self.cached_reads.next_failed() {
            any_failed = true;
            self.start_request(Request { tag, work: Work::Read { range, into } });
        }
        any_failed
    }

    /// Number of reads that were answered without a task so far: by copies from the page cache, or by zeros.
    pub fn copied_reads(&self) -> u64 {
        self.cached_reads.copied()
    }

    /// Records a read for readahead, and starts a prefetch if one is due.
    #[inline]
    pub(super) fn track_read(&mut self, range: SectorRange) {
        if let Some(range) = self.readahead.record_read(range, self.versions.current().sectors())
            && self.push_capacity() >= MIN_FREE_TASKS
        {
            self.start_request(Request { tag: 0, work: Work::Prefetch { range } });
        }
    }

    /// Records the completion of an operation of a task, and advances the task if no other operation is pending.
    pub(super) fn op_completed(&mut self, number: u32, detail: u32, completion: Completion) {
        let task = self.tasks.get_mut(number);
        if completion.op.action == Action::Prefetch {
            self.readahead.hint_completed();
        } else {
            let parks = self.disk.parks_when_full();
            match self.task_ops.complete(task, detail, completion, self.versions.of(task.epoch), parks) {
                OpEffect::None => {}
                OpEffect::LogNoSpace => self.no_space_log.write_failed(self.versions.current().top_path()),
                OpEffect::Unsupported(op) => self.task_ops.replace_unsupported(task, &op, &mut self.ops),
            }
        }
        task.pending_ops -= 1;
        if task.pending_ops == 0 {
            self.advance(number);
        }
    }

    /// Advances tasks after the event for which they wait. The tasks fail if `ok` is false.
    pub(super) fn resume_tasks(&mut self, numbers: Vec<u32>, ok: bool) {
        for number in numbers {
            self.tasks.get_mut(number).failed |= !ok;
            self.advance(number);
        }
    }

    /// Advances a waiting task until it has to wait again or is answered.
    pub(super) fn advance(&mut self, number: u32) {
        let mut task = self.tasks.take(number);
        let next = self.run_stage(number, &mut task);
        self.run(number, task, next);
    }

    /// Advances a task after a stage with the result `next`. Only this function changes the stage of a task in
    /// flight.
    fn run(&mut self, number: u32, mut task: Box<Task>, mut next: StageResult) {
        let outcome = loop {
            match next {
                StageResult::Enter(stage) => {
                    task.stage = stage;
                    next = self.run_stage(number, &mut task);
                }
                StageResult::Wait(stage) => {
                    task.stage = stage;
                    return self.tasks.put(number, task);
                }
                StageResult::Finish(outcome) => break outcome,
            }
        };
        self.release_punch_lock(number);
        if task.stalled {
            self.disk.stalled_writes.end(outcome == Outcome::Done, self.versions.current().top_path());
        }
        let tag = task.tag;
        match task.take_work() {
            Work::Prefetch { .. } => {}
            Work::Read { into: memory, .. } | Work::Write { from: memory, .. } => {
                self.answers.push(Answer { tag, outcome, memory: Some(memory) });
            }
            _ => self.answers.push(Answer { tag, outcome, memory: None }),
        }
        self.tasks.finish(number, task);
    }

    #[inline]
    fn run_stage(&mut self, number: u32, task: &mut Task) -> StageResult {
        match task.stage {
            TaskStage::Plan => self.plan_task(number, task),
            TaskStage::Load | TaskStage::LoadForMark if task.failed => StageResult::Finish(Outcome::Failed),
            TaskStage::Load => {
                self.supply_bitmaps(task);
                StageResult::Enter(TaskStage::Plan)
            }
            TaskStage::LoadForMark => {
                self.supply_bitmaps(task);
                StageResult::Enter(TaskStage::Move)
            }
            TaskStage::AwaitGrowth if task.failed => StageResult::Finish(Outcome::Failed),
            TaskStage::AwaitGrowth => StageResult::Enter(TaskStage::Plan),
            TaskStage::Move => self.transfer_completed(number, task),
            TaskStage::AwaitCommit => StageResult::Finish(if task.failed { Outcome::Failed } else { Outcome::Done }),
        }
    }

    fn plan_task(&mut self, number: u32, task: &mut Task) -> StageResult {
        if matches!(task.work, Work::Flush) && self.disk.is_read_only() {
            return StageResult::Finish(Outcome::Done);
        }
        if !matches!(task.work, Work::Read { .. } | Work::Prefetch { .. }) {
            let top = self.versions.current().top();
            if top.is_none_or(|top| top.image.is_poisoned()) {
                return StageResult::Finish(Outcome::Failed);
            }
        }
        if self.gate.holds(task) {
            task.pins.release();
            self.release_punch_lock(number);
            self.gate.wait(number);
            return StageResult::Wait(TaskStage::Plan);
        }
        if task.needs_punch_lock() && !self.punch_queue.may_punch(number, &self.disk.punch_lock, &self.mailbox) {
            return StageResult::Wait(TaskStage::Plan);
        }
        let mut plan = std::mem::take(&mut self.plan);
        let version = self.versions.current();
        if task.epoch != version.epoch() {
            // Pins belong to the top of the version of the last plan.
            task.pins.release();
        }
        let reserved = match &task.work {
            Work::Read { range, .. } => {
                version.plan_read(*range, &mut self.frozen_cache, &mut plan);
                Ok(())
            }
            Work::Prefetch { range } => {
                readahead::plan_blocks(*range, version, &mut self.frozen_cache, &mut plan);
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
        let next = if reserved.is_err() && plan.missing.is_empty() {
            self.await_growth(number)
        } else {
            self.carry_out(number, task, &plan)
        };
        self.plan = plan;
        next
    }

    /// Waits until the file has room for the block that the plan could not reserve.
    fn await_growth(&mut self, number: u32) -> StageResult {
        if self.ensure_growth() {
            self.release_punch_lock(number);
            self.parked.push(number);
            StageResult::Wait(TaskStage::AwaitGrowth)
        } else {
            // Another lane has made space since the plan was made.
            StageResult::Enter(TaskStage::Plan)
        }
    }

    /// Pushes the operations of a plan: reads of missing bitmaps if there are any, the transfers otherwise.
    #[inline]
    fn carry_out(&mut self, number: u32, task: &mut Task, plan: &PlanBuffer) -> StageResult {
        task.epoch = self.versions.current().epoch();
        if !plan.missing.is_empty() {
            return self.load_bitmaps(number, task, &plan.missing, TaskStage::Load);
        }
        task.marks.clear();
        task.marks.extend_from_slice(&plan.marks);
        if let (Work::Write { range, .. }, true) = (&task.work, mutant::enabled(Mutant::EarlyMarks)) {
            let _ = self.versions.current().writable_top().image.mark(*range);
        }
        if let Work::Prefetch { range } = task.work {
            self.push_hints(number, task, range, plan);
        } else {
            self.task_ops.push(number, task, &plan.extents, self.versions.current(), &mut self.ops);
        }
        if !matches!(task.work, Work::Write { .. } | Work::WriteZeroes { .. }) {
            task.pins.release();
        }
        if plan.reserved {
            self.ensure_growth();
        }
        if task.pending_ops == 0 { StageResult::Enter(TaskStage::Move) } else { StageResult::Wait(TaskStage::Move) }
    }

    /// Pushes the prefetch hints of a planned range.
    fn push_hints(&mut self, number: u32, task: &mut Task, range: SectorRange, plan: &PlanBuffer) {
        let token = Token::Task { task: number, detail: 0 }.pack();
        let version = self.versions.current();
        let policy = |slot| version.served_file(slot).readahead;
        let (hints, bytes) = self.readahead.push_hints(range, &plan.extents, policy, token, &mut self.ops);
        task.pending_ops += hints;
        self.disk.counters().readahead_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Pushes reads of bitmaps that are missing for a plan or a mark. The task continues with `stage`.
    fn load_bitmaps(&mut self, number: u32, task: &mut Task, missing: &[Missing], stage: TaskStage) -> StageResult {
        let load = self.versions.of(task.epoch).load(missing);
        for (piece, (slot, at)) in (0..).zip(load.reads()) {
            self.task_ops.push_bitmap_read(number, task, (piece, slot, at), &mut self.ops);
        }
        task.load = Some(Box::new(load));
        if task.pending_ops == 0 { StageResult::Enter(stage) } else { StageResult::Wait(stage) }
    }

    /// Passes the bitmaps that a task has read to the chain.
    fn supply_bitmaps(&mut self, task: &mut Task) {
        let load = task.load.take().expect("a task that loads");
        self.versions.of(task.epoch).supply(&load, &mut task.pins);
    }

    /// Evaluates a transfer after all of its operations have completed, and marks the written sectors.
    fn transfer_completed(&mut self, number: u32, task: &mut Task) -> StageResult {
        if task.failed {
            return StageResult::Finish(Outcome::Failed);
        }
        if std::mem::take(&mut task.no_space) {
            // No sector of the range was marked, so all operations of the range can be repeated when the task resumes.
            self.release_punch_lock(number);
            self.parked.push(number);
            let first = !std::mem::replace(&mut task.stalled, true);
            self.disk.stalled_writes.stall(usize::from(first), self.versions.current().top_path());
            return StageResult::Wait(TaskStage::AwaitGrowth);
        }
        let reads = matches!(task.work, Work::Read { .. } | Work::Prefetch { .. });
        let (Some(top), false) = (self.versions.of(task.epoch).top(), reads) else {
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
                Err(bitmap_sectors) => absent.extend(bitmap_sectors),
            }
        }
        if !absent.is_empty() {
            // These bitmap sectors were evicted while the bytes moved. Repeating the marks that were made is harmless.
            return self.load_bitmaps(
                number,
                task,
                &Missing::bitmap_sectors(top.slot, &absent),
                TaskStage::LoadForMark,
            );
        }
        task.pins.release();
        if matches!(task.work, Work::Write { .. }) {
            self.early_writeback.record_write(self.disk.counters().commits.load(Ordering::Relaxed));
        }
        if top.image.take_commit_due() {
            self.start_background_commit();
        }
        if task.next_piece() {
            self.punch_queue.requeue(number, &self.disk.punch_lock, &self.mailbox);
            StageResult::Wait(TaskStage::Plan)
        } else if task.needs_commit || self.disk.is_write_through() {
            self.await_commit(number, task)
        } else {
            StageResult::Finish(Outcome::Done)
        }
    }

    /// Adds a task to the next commit round, and leads the round if no other runs and the rounds are not held.
    fn await_commit(&mut self, number: u32, task: &mut Task) -> StageResult {
        let joined = self.disk.group_commit.join(&self.mailbox);
        self.awaiting_commit.push(number);
        if joined.lead {
            self.lead_commit();
        }
        // The event names its round, so the end of another round does not resume the task.
        task.commit_round = joined.round;
        StageResult::Wait(TaskStage::AwaitCommit)
    }

    /// Pushes a hint of early writeback if one is due.
    pub(super) fn hint_writeback(&mut self) {
        let (disk, version) = (&*self.disk, self.versions.current());
        let Some(top) = version.top() else { return };
        let is_blocking = self.ops.engine.wake_fd().is_none();
        if version.served_file(top.slot).is_buffered()
            && !is_blocking
            && !disk.is_write_through()
            && self.early_writeback.push_hint(top.slot, version.epoch(), &mut self.ops)
        {
            disk.counters().early_writebacks.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn release_punch_lock(&mut self, number: u32) {
        self.punch_queue.release(number, &self.disk.punch_lock, &self.mailbox);
    }

    /// Counts the parked writes as stalled.
    pub(super) fn stall_parked(&mut self) {
        let mut writes = 0;
        for number in &self.parked {
            writes += usize::from(!std::mem::replace(&mut self.tasks.get_mut(*number).stalled, true));
        }
        self.disk.stalled_writes.stall(writes, self.versions.current().top_path());
    }
}
