//! Where the next blocks of an image go, and when more room for them is due.

use std::collections::BTreeSet;

use super::writable::Writable;

/// Blocks between two that count as neighbours.
const NEIGHBOR_DISTANCE: u32 = 2;

/// Where the next block goes.
#[derive(Debug)]
pub struct FreeTail {
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
    pub last_placed: u32,
    pub neighbor_run: u32,
}

impl FreeTail {
    /// Notes that a block got the place at `next`, which ends at `end`.
    pub fn note_placed(&mut self, block: u32, end: u64) {
        // Several queues, or several writes in flight, place neighbours in almost their order.
        self.neighbor_run =
            if block.abs_diff(self.last_placed) <= NEIGHBOR_DISTANCE { self.neighbor_run.saturating_add(1) } else { 0 };
        self.last_placed = block;
        self.next = end;
        self.unplaced -= 1;
        self.fresh.insert(block);
    }

    /// File sector before which a block may go.
    pub fn usable_end(&self) -> u64 {
        self.end.min(self.reserved)
    }
}

impl Writable {
    /// Whether a step of growth is due: less than a quarter of a step is left, and blocks may still need it.
    pub fn is_short(&self, room: &FreeTail) -> bool {
        let wanted = (self.reserved_blocks(room) / 4).max(1).min(room.unplaced);
        wanted > 0 && self.end_after(room.next, wanted, room.unplaced).is_none_or(|end| end > room.usable_end())
    }

    /// Whether a step of growth waits for a sync.
    pub(super) fn is_growth_syncing(&self) -> bool {
        self.image().block_size().is_some() && self.free_tail().syncing
    }

    /// Whether a step of growth is under way.
    pub fn is_growing(&self) -> bool {
        self.free_tail().growing
    }
}
