//! A request in flight: the state that it keeps between two stages. `stages.rs` executes the stages.

use super::punch::PUNCH_SECTORS;
use super::request::Work;
use crate::chain::Load;
use crate::image::Pins;
use crate::units::SectorRange;

/// The stage of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TaskStage {
    /// Looks up where the sectors are, and reserves space for writes.
    Plan,
    /// Reads bitmaps that are missing for the plan. Then plans again.
    Load,
    /// Waits until the file has grown, or until the file system has space. Then plans again.
    AwaitGrowth,
    /// Moves bytes. Then marks the written sectors.
    Move,
    /// Reads bitmaps that were evicted while bytes moved. Then marks the written sectors.
    LoadForMark,
    /// Waits for the commit that makes the request durable.
    AwaitCommit,
}

/// A request in flight.
pub(super) struct Task {
    pub(super) tag: u64,
    pub(super) work: Work,
    pub(super) stage: TaskStage,
    /// Number of the version with which the task was planned last.
    pub(super) epoch: u32,
    /// Number of operations in flight.
    pub(super) pending_ops: u32,
    /// Whether an operation failed, or the commit or growth for which the request waited.
    pub(super) failed: bool,
    /// Whether an operation failed because the file system is full, so that the operations have to be repeated.
    pub(super) no_space: bool,
    /// Whether the request is counted in `StalledWrites`.
    pub(super) stalled: bool,
    /// Index of the range that is being discarded or zeroed.
    pub(super) range_index: usize,
    /// Number of sectors of the current range that are discarded or zeroed already.
    pub(super) sectors_done: u64,
    /// The commit round that makes the request durable.
    pub(super) commit_round: u64,
    /// Whether the request may be answered only after a commit.
    pub(super) needs_commit: bool,
    /// The bitmaps that are being read.
    pub(super) load: Option<Box<Load>>,
    /// References to bitmap sectors that must stay in memory until the request is planned (reads, discards) or its
    /// sectors are marked (writes, zeroing).
    pub(super) pins: Pins,
    /// Sectors to mark after the current piece is zeroed.
    pub(super) marks: Vec<SectorRange>,
}

impl Task {
    pub(super) fn new(tag: u64, work: Work) -> Task {
        Task {
            tag,
            work,
            stage: TaskStage::Plan,
            epoch: 0,
            pending_ops: 0,
            failed: false,
            no_space: false,
            stalled: false,
            range_index: 0,
            sectors_done: 0,
            commit_round: 0,
            needs_commit: false,
            load: None,
            pins: Pins::default(),
            marks: Vec::new(),
        }
    }

    /// Prepares a finished task for another request. The vectors keep their memory.
    pub(super) fn reset(&mut self, tag: u64, work: Work) {
        (self.tag, self.work, self.stage) = (tag, work, TaskStage::Plan);
        (self.pending_ops, self.failed, self.no_space, self.range_index) = (0, false, false, 0);
        (self.commit_round, self.needs_commit, self.sectors_done) = (0, false, 0);
        self.stalled = false;
    }

    /// Whether the request writes, zeroes or discards sectors of a range.
    pub(super) fn changes(&self, held: SectorRange) -> bool {
        let overlaps = |range: &SectorRange| !range.clip(held).is_empty();
        match &self.work {
            Work::Write { range, .. } => overlaps(range),
            Work::Discard { ranges } => ranges.iter().any(overlaps),
            Work::WriteZeroes { ranges } => ranges.iter().any(|r| overlaps(&r.range)),
            Work::Read { .. } | Work::Prefetch { .. } | Work::Flush => false,
        }
    }

    /// Whether operations of the version `self.epoch` are in flight, or sectors are to be marked in that version.
    pub(super) fn uses_version(&self) -> bool {
        matches!(self.stage, TaskStage::Load | TaskStage::Move | TaskStage::LoadForMark)
    }

    /// Whether the request discards or zeroes sectors, and so needs the punch lock.
    pub(super) fn needs_punch_lock(&self) -> bool {
        matches!(self.work, Work::Discard { .. } | Work::WriteZeroes { .. })
    }

    /// Returns the current range of a discard or zeroing, and the number of its ranges. `None` for other requests.
    fn range(&self) -> Option<(SectorRange, usize)> {
        match &self.work {
            Work::Discard { ranges } => Some((ranges[self.range_index], ranges.len())),
            Work::WriteZeroes { ranges } => Some((ranges[self.range_index].range, ranges.len())),
            Work::Read { .. } | Work::Write { .. } | Work::Prefetch { .. } | Work::Flush => None,
        }
    }

    /// Returns the current piece of a discard or zeroing: the part that is punched next.
    pub(super) fn piece(&self) -> SectorRange {
        let (range, _) = self.range().expect("only discards and zeroing have pieces");
        let left = range.skip(self.sectors_done);
        // Pieces end at multiples of their size, so no piece spans two blocks of the default size.
        left.first(PUNCH_SECTORS - left.start() % PUNCH_SECTORS)
    }

    /// Advances to the next piece. Returns false if there is none.
    pub(super) fn next_piece(&mut self) -> bool {
        let Some((range, ranges)) = self.range() else { return false };
        self.sectors_done += self.piece().count();
        if self.sectors_done == range.count() {
            (self.range_index, self.sectors_done) = (self.range_index + 1, 0);
        }
        self.range_index < ranges
    }

    /// Takes the work with its guest memory, and releases pins and loaded bitmaps.
    pub(super) fn take_work(&mut self) -> Work {
        self.pins.release();
        self.load = None;
        std::mem::replace(&mut self.work, Work::Flush)
    }
}

/// The owner of an operation, packed into its token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Token {
    /// A task. `detail` is a byte offset in the memory of the request, or the index of a bitmap sector in `Task::load`.
    Task { task: u32, detail: u32 },
    /// The commit that this lane leads.
    Commit,
    /// A step of growth.
    Growth,
    /// A hint of early writeback.
    EarlyWriteback,
}

const COMMIT: u64 = u64::MAX;
const GROWTH: u64 = u64::MAX - 1;
const EARLY_WRITEBACK: u64 = u64::MAX - 2;

impl Token {
    pub(super) fn pack(self) -> u64 {
        match self {
            Token::Task { task, detail } => u64::from(task) << 32 | u64::from(detail),
            Token::Commit => COMMIT,
            Token::Growth => GROWTH,
            Token::EarlyWriteback => EARLY_WRITEBACK,
        }
    }

    pub(super) fn unpack(token: u64) -> Token {
        match token {
            COMMIT => Token::Commit,
            GROWTH => Token::Growth,
            EARLY_WRITEBACK => Token::EarlyWriteback,
            // Both halves are 32 bits wide by construction.
            #[expect(clippy::cast_possible_truncation)]
            _ => Token::Task { task: (token >> 32) as u32, detail: token as u32 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_multiples_of_the_piece_size() {
        let ranges = vec![SectorRange::between(5, 8), SectorRange::between(PUNCH_SECTORS - 1, 2 * PUNCH_SECTORS + 1)];
        let mut task = Task::new(0, Work::Discard { ranges });
        let mut pieces = vec![task.piece()];
        while task.next_piece() {
            pieces.push(task.piece());
        }
        let wanted = [
            (5, 8),
            (PUNCH_SECTORS - 1, PUNCH_SECTORS),
            (PUNCH_SECTORS, 2 * PUNCH_SECTORS),
            (2 * PUNCH_SECTORS, 2 * PUNCH_SECTORS + 1),
        ];
        assert_eq!(pieces, wanted.map(|(start, end)| SectorRange::between(start, end)));
        assert!(!Task::new(0, Work::Flush).next_piece());
    }

    #[test]
    fn tokens_survive_packing() {
        for token in
            [Token::Commit, Token::Growth, Token::EarlyWriteback, Token::Task { task: 65535, detail: u32::MAX }]
        {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
