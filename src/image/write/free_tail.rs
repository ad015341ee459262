//! The free tail: the space of a file between its last block and its footer, where new blocks go.

use std::collections::BTreeSet;

use crate::format::layout;
use crate::units::{BlockIndex, FileSector, SECTOR};

/// Maximum difference between the numbers of two blocks that count as neighbours.
const NEIGHBOR_DISTANCE: u32 = 2;

/// The free tail of an image, and how it grows.
#[derive(Debug)]
pub struct FreeTail {
    /// First file sector after all blocks and metadata: the next block goes here.
    pub next: FileSector,
    /// File sector at which the durably zero space ends. Blocks end before it.
    pub end: FileSector,
    /// File sector before which the space that new blocks need is reserved on the file system.
    pub reserved: FileSector,
    /// File sector of the trailing footer.
    pub footer: FileSector,
    /// File sectors of older footers and stamps. They are overwritten with zeros before space after `end` is used.
    pub stale: Vec<FileSector>,
    /// Number of blocks without a place.
    pub unplaced: u64,
    /// Blocks whose BAT entry is not in the file yet.
    pub fresh: BTreeSet<BlockIndex>,
    /// Whether a step of growth is in progress.
    pub growing: bool,
    /// Whether a sync of a step of growth is in flight.
    pub syncing: bool,
    /// Number of steps that extended the file, since the image was opened or the file system was last full.
    pub steps: u32,
    /// Number of all completed steps, since the image was opened or the file system was last full.
    pub reservations: u32,
    /// The block that got a place last.
    pub last_placed: BlockIndex,
    /// Number of latest placements in sequence in which each block was a neighbour of the block placed before it.
    pub neighbor_run: u32,
}

impl FreeTail {
    /// Records that a block got the place at `next`, which ends at file sector `end`.
    pub fn note_placed(&mut self, block: BlockIndex, end: FileSector) {
        // Several queues, or several writes in flight, place neighbours almost in order.
        let is_neighbor = block.distance_to(self.last_placed) <= NEIGHBOR_DISTANCE;
        self.neighbor_run = if is_neighbor { self.neighbor_run.saturating_add(1) } else { 0 };
        self.last_placed = block;
        self.next = end;
        self.unplaced -= 1;
        self.fresh.insert(block);
    }

    /// File sector before which a new block must end.
    pub fn usable_end(&self) -> FileSector {
        self.end.min(self.reserved)
    }
}

/// The first file sector at or after `from` for a new stamp, such that the stamp and the footer after it are in one
/// page. The result is at least two sectors after the old footer at `footer`.
pub(super) fn stamp_sector_from(from: FileSector, footer: FileSector) -> FileSector {
    const PAGE: u64 = layout::PAGE / SECTOR;
    let at = from.max(footer + 2);
    if at.get() % PAGE == PAGE - 1 { at + 1 } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_and_footer_share_a_page_after_the_old_footer() {
        for footer in 0..64 {
            for from in 0..96 {
                let at = stamp_sector_from(FileSector::new(from), FileSector::new(footer)).get();
                assert!(at >= from && at >= footer + 2 && at / 8 == (at + 1) / 8, "{footer} {from} {at}");
                assert!(at <= from.max(footer + 2) + 1, "no more than needed");
            }
        }
    }
}
