//! A request in flight. Its stages are driven by one `match` in `stages.rs`; here is what it remembers between them.

use super::punch::PUNCH_SECTORS;
use super::request::Work;
use crate::chain::Load;
use crate::image::Pins;
use crate::units::SectorRange;

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TaskStage {
    /// Ask where the sectors are.
    Plan,
    /// Bitmaps are being read; then plan again, or mark.
    Load,
    /// A fresh block waits for the file to grow; then plan again.
    AwaitGrowth,
    /// Bytes are moving.
    Move,
    /// A commit makes it durable.
    AwaitCommit,
}

/// A request in flight.
pub(super) struct Task {
    pub(super) tag: u64,
    pub(super) work: Work,
    pub(super) stage: TaskStage,
    /// Operations that are not complete.
    pub(super) pending_ops: u32,
    /// Whether one of them failed.
    pub(super) failed: bool,
    /// Whether one of them found the host full.
    pub(super) no_space: bool,
    /// Whether it is counted among the writes that wait for room on the host.
    pub(super) stalled: bool,
    /// Which of several ranges is at work (discard, write zeroes), and how many of its sectors are done.
    pub(super) range_index: usize,
    pub(super) sectors_done: u64,
    /// The round that makes it durable.
    pub(super) commit_round: u64,
    /// Whether it may be answered only after a commit.
    pub(super) needs_commit: bool,
    /// What is being loaded.
    pub(super) load: Option<Box<Load>>,
    /// What must stay in memory until it is planned (reads) or marked.
    pub(super) pins: Pins,
    /// Whether its bytes have moved, and what is being loaded is for the marks.
    pub(super) moved: bool,
    /// What to mark when zeroing is done.
    pub(super) marks: Vec<SectorRange>,
}

impl Task {
    pub(super) fn new(tag: u64, work: Work) -> Task {
        Task {
            tag,
            work,
            stage: TaskStage::Plan,
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
            moved: false,
            marks: Vec::new(),
        }
    }

    /// Begins anew after `end`, with the room it has.
    pub(super) fn reset(&mut self, tag: u64, work: Work) {
        (self.tag, self.work, self.stage) = (tag, work, TaskStage::Plan);
        (self.pending_ops, self.failed, self.no_space, self.range_index) = (0, false, false, 0);
        (self.commit_round, self.needs_commit, self.moved, self.sectors_done) = (0, false, false, 0);
        self.stalled = false;
    }

    /// Whether it punches or zeroes, and so has to wait for its turn.
    pub(super) fn needs_punch_lock(&self) -> bool {
        matches!(self.work, Work::Discard { .. } | Work::WriteZeroes { .. })
    }

    /// The range of a discard or zeroing that is at work, and the number of ranges.
    fn range(&self) -> Option<(SectorRange, usize)> {
        match &self.work {
            Work::Discard { ranges } => Some((ranges[self.range_index], ranges.len())),
            Work::WriteZeroes { ranges } => Some((ranges[self.range_index].range, ranges.len())),
            Work::Read { .. } | Work::Write { .. } | Work::Prefetch { .. } | Work::Flush => None,
        }
    }

    /// The piece of a discard or zeroing that is at work.
    pub(super) fn piece(&self) -> SectorRange {
        let (range, _) = self.range().expect("only discards and zeroing have pieces");
        let left = range.skip(self.sectors_done);
        // Pieces end at multiples of their size, and so at ends of blocks.
        left.first(PUNCH_SECTORS - left.start() % PUNCH_SECTORS)
    }

    /// Moves on to the next piece. Returns false if there is none.
    pub(super) fn next_piece(&mut self) -> bool {
        let Some((range, ranges)) = self.range() else { return false };
        self.sectors_done += self.piece().count();
        if self.sectors_done == range.count() {
            (self.range_index, self.sectors_done) = (self.range_index + 1, 0);
        }
        self.range_index < ranges
    }

    /// What it was asked to do, with the guest's memory; holds nothing any more.
    pub(super) fn take_work(&mut self) -> Work {
        self.pins.release();
        self.load = None;
        std::mem::replace(&mut self.work, Work::Flush)
    }
}

/// What a completion is for, packed into an operation's token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Token {
    /// Operation of a task. `detail`: byte offset in the request's memory, or number of a loaded piece.
    Task { task: u32, detail: u32 },
    /// Operation of the commit this lane leads.
    Commit,
    /// Operation of a step of growth.
    Growth,
    /// The hint to write before a flush.
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
    fn ranges_are_cut_at_multiples_of_a_piece() {
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
    fn tokens_come_back() {
        for token in
            [Token::Commit, Token::Growth, Token::EarlyWriteback, Token::Task { task: 65535, detail: u32::MAX }]
        {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
