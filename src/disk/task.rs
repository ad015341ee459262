//! A request in flight. Its stages are driven by one `match` in `stages.rs`; here is what it remembers between them.

use super::punch::PIECE;
use super::request::Work;
use crate::chain::Load;
use crate::image::Pins;
use crate::units::SectorRange;

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Ask where the sectors are.
    Plan,
    /// Bitmaps are being read; then plan again, or mark.
    Load,
    /// A fresh block waits for the file to grow; then plan again.
    Room,
    /// Bytes are moving.
    Move,
    /// A commit makes it durable.
    Await,
}

/// A request in flight.
pub(super) struct Task {
    pub(super) tag: u64,
    pub(super) work: Work,
    pub(super) stage: Stage,
    /// Operations that are not complete.
    pub(super) pending: u32,
    /// Whether one of them failed.
    pub(super) failed: bool,
    /// Whether one of them found the host full.
    pub(super) full: bool,
    /// Whether it is counted among the writes that wait for room on the host.
    pub(super) held_by_host: bool,
    /// Which of several ranges is at work (discard, write zeroes), and how many of its sectors are done.
    pub(super) at: usize,
    pub(super) sectors_done: u64,
    /// The round that makes it durable.
    pub(super) round: u64,
    /// Whether it may be answered only after a commit.
    pub(super) owes_commit: bool,
    /// What is being loaded.
    pub(super) load: Option<Box<Load>>,
    /// What must stay in memory until it is planned (reads) or marked.
    pub(super) held: Pins,
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
            stage: Stage::Plan,
            pending: 0,
            failed: false,
            full: false,
            held_by_host: false,
            at: 0,
            sectors_done: 0,
            round: 0,
            owes_commit: false,
            load: None,
            held: Pins::default(),
            moved: false,
            marks: Vec::new(),
        }
    }

    /// Begins anew after `end`, with the room it has.
    pub(super) fn renew(&mut self, tag: u64, work: Work) {
        (self.tag, self.work, self.stage) = (tag, work, Stage::Plan);
        (self.pending, self.failed, self.full, self.at) = (0, false, false, 0);
        (self.round, self.owes_commit, self.moved, self.sectors_done) = (0, false, false, 0);
        self.held_by_host = false;
    }

    /// Whether it punches or zeroes, and so has to wait for its turn.
    pub(super) fn punches(&self) -> bool {
        matches!(self.work, Work::Discard { .. } | Work::WriteZeroes { .. })
    }

    /// The range of a discard or zeroing that is at work, and the number of ranges.
    fn range(&self) -> Option<(SectorRange, usize)> {
        match &self.work {
            Work::Discard { ranges } => Some((ranges[self.at], ranges.len())),
            Work::WriteZeroes { ranges } => Some((ranges[self.at].range, ranges.len())),
            Work::Read { .. } | Work::Write { .. } | Work::Prefetch { .. } | Work::Flush => None,
        }
    }

    /// The piece of a discard or zeroing that is at work.
    pub(super) fn piece(&self) -> SectorRange {
        let (range, _) = self.range().expect("only discards and zeroing have pieces");
        let left = range.skip(self.sectors_done);
        // Pieces end at multiples of their size, and so at ends of blocks.
        left.first(PIECE - left.start() % PIECE)
    }

    /// Moves on to the next piece. Returns false if there is none.
    pub(super) fn next_piece(&mut self) -> bool {
        let Some((range, ranges)) = self.range() else { return false };
        self.sectors_done += self.piece().count();
        if self.sectors_done == range.count() {
            (self.at, self.sectors_done) = (self.at + 1, 0);
        }
        self.at < ranges
    }

    /// What it was asked to do, with the guest's memory; holds nothing any more.
    pub(super) fn end(&mut self) -> Work {
        self.held.release();
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
    Early,
}

const COMMIT: u64 = u64::MAX;
const GROWTH: u64 = u64::MAX - 1;
const EARLY: u64 = u64::MAX - 2;

impl Token {
    pub(super) fn pack(self) -> u64 {
        match self {
            Token::Task { task, detail } => u64::from(task) << 32 | u64::from(detail),
            Token::Commit => COMMIT,
            Token::Growth => GROWTH,
            Token::Early => EARLY,
        }
    }

    pub(super) fn unpack(token: u64) -> Token {
        match token {
            COMMIT => Token::Commit,
            GROWTH => Token::Growth,
            EARLY => Token::Early,
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
        let ranges = vec![SectorRange::between(5, 8), SectorRange::between(PIECE - 1, 2 * PIECE + 1)];
        let mut task = Task::new(0, Work::Discard { ranges });
        let mut pieces = vec![task.piece()];
        while task.next_piece() {
            pieces.push(task.piece());
        }
        let wanted = [(5, 8), (PIECE - 1, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 1)];
        assert_eq!(pieces, wanted.map(|(start, end)| SectorRange::between(start, end)));
        assert!(!Task::new(0, Work::Flush).next_piece());
    }

    #[test]
    fn tokens_come_back() {
        for token in [Token::Commit, Token::Growth, Token::Early, Token::Task { task: 65535, detail: u32::MAX }] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
