//! Where the next blocks of an image go, and when more room for them is due.

use std::collections::BTreeSet;

use crate::format::layout;
use crate::units::SECTOR;

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

/// The first file sector from `from` on at which a stamp and the footer behind it share a page, at least two sectors behind
/// the footer at `footer`.
pub(super) fn stamp_sector_from(from: u64, footer: u64) -> u64 {
    const PAGE: u64 = layout::PAGE / SECTOR;
    let at = from.max(footer + 2);
    if at % PAGE == PAGE - 1 { at + 1 } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_and_footer_share_a_page_behind_the_old_footer() {
        for footer in 0..64 {
            for from in 0..96 {
                let at = stamp_sector_from(from, footer);
                assert!(at >= from && at >= footer + 2 && at / 8 == (at + 1) / 8, "{footer} {from} {at}");
                assert!(at <= from.max(footer + 2) + 1, "no more than needed");
            }
        }
    }
}
