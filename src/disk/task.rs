//! A request in flight. Its stages are driven by one `match` in `stages.rs`; here is what it remembers between them.

use super::request::Work;
use crate::chain::Load;
use crate::image::Held;
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
    /// Which of several ranges is at work (discard, write zeroes).
    pub(super) at: usize,
    /// The round that makes it durable.
    pub(super) round: u64,
    /// Whether it may be answered only after a commit.
    pub(super) owes_commit: bool,
    /// What is being loaded.
    pub(super) load: Option<Box<Load>>,
    /// What must stay in memory until it is planned (reads) or marked.
    pub(super) held: Held,
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
            round: 0,
            owes_commit: false,
            load: None,
            held: Held::default(),
            moved: false,
            marks: Vec::new(),
        }
    }

    /// Begins anew after `end`, with the room it has.
    pub(super) fn renew(&mut self, tag: u64, work: Work) {
        (self.tag, self.work, self.stage) = (tag, work, Stage::Plan);
        (self.pending, self.failed, self.full, self.at) = (0, false, false, 0);
        (self.round, self.owes_commit, self.moved, self.held_by_host) = (0, false, false, false);
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
    fn tokens_come_back() {
        for token in [Token::Commit, Token::Growth, Token::Early, Token::Task { task: 65535, detail: u32::MAX }] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
