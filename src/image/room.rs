//! Where the next blocks of an image go, and when more room for them is due.

use std::collections::BTreeSet;

use super::writable::Writable;

/// Blocks between two that count as neighbours.
const NEAR: u32 = 2;

/// Where the next block goes.
#[derive(Debug)]
pub struct Room {
    /// First file sector after all that is in use.
    pub next: u64,
    /// The end of what is durably zero and may be given out.
    pub end: u64,
    /// File sector before which the host has the room that blocks must find.
    pub reserved: u64,
    /// File sector of the trailing footer.
    pub footer: u64,
    /// File sectors before it that are to be wiped before room behind `end` is given out: older footers and stamps.
    pub stale: Vec<u64>,
    /// Blocks that have no place yet.
    pub unplaced: u64,
    /// Blocks whose place the file does not know yet.
    pub fresh: BTreeSet<u32>,
    /// A step is under way.
    pub growing: bool,
    /// A sync of a step is under way.
    pub syncing: bool,
    /// Steps that made the file longer, since the image was opened or the host was full.
    pub steps: u32,
    /// Steps that reserved room, since then.
    pub reservations: u32,
    /// The block that got a place last, and how many before it were its neighbours.
    pub last: u32,
    pub run: u32,
}

impl Room {
    /// Notes that a block got the place at `next`, which ends at `end`.
    pub fn placed(&mut self, block: u32, end: u64) {
        // Several queues, or several writes in flight, place neighbours in almost their order.
        self.run = if block.abs_diff(self.last) <= NEAR { self.run.saturating_add(1) } else { 0 };
        self.last = block;
        self.next = end;
        self.unplaced -= 1;
        self.fresh.insert(block);
    }

    /// File sector before which a block may go.
    pub fn usable(&self) -> u64 {
        self.end.min(self.reserved)
    }
}

impl Writable {
    /// Whether a step of growth is due: less than a quarter of a step is left, and blocks may still need it.
    pub fn is_short(&self, room: &Room) -> bool {
        let wanted = (self.reserved_blocks(room) / 4).max(1).min(room.unplaced);
        wanted > 0 && self.end_after(room.next, wanted, room.unplaced).is_none_or(|end| end > room.usable())
    }

    /// Whether a step of growth waits for a sync.
    pub(super) fn is_growth_syncing(&self) -> bool {
        self.image().block_size().is_some() && self.room().syncing
    }

    /// Whether a step of growth is under way.
    pub fn is_growing(&self) -> bool {
        self.room().growing
    }
}
