//! How a growing file takes room on the host: whole blocks ahead, or only the pages that a commit must find.
//!
//! A commit must never fail for want of room after the data it makes visible was acknowledged, so growth reserves what C2
//! writes before a block gets its place (docs/space.md):
//!
//! | | reserved ahead | taken by the first write | a full host refuses |
//! | --- | --- | --- | --- |
//! | sparse | the pages of each block's bitmap | the pages it covers | growth, or that write |
//! | block | the whole block | nothing | growth |
//!
//! Sparse reserves whole blocks, too, while the guest writes whole blocks one after the other.
//!
//! Sparse relies on the file system's [`AllocationMode`](crate::storage::AllocationMode). Growth covers what a commit needs as far as that rule reaches; beyond it
//! (copy on write, reflinked files, file systems that cannot reserve) a commit that finds no room is tried again
//! (`disk/job.rs`).

use std::ops::Range;

use crate::format::layout;
use crate::storage::{Action, FileSlot, Op};
use crate::units::{BlockSize, SECTOR};

/// Bytes between two reserved ranges that are reserved with them: those of a block of 4 KiB, which one write fills.
const MERGE_GAP: u64 = layout::PAGE;
/// Reservations handed to the engine at once: the queue's requests must find room there, too.
const OPS_AT_ONCE: usize = 32;

/// How the host's room for new blocks is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Allocation {
    /// Data takes room when it is written. Growth reserves the pages of bitmaps alone.
    #[default]
    Sparse,
    /// Growth reserves whole blocks: the file is less fragmented, and a write into a placed block never meets a full host.
    Block,
}

/// The room that one step of growth reserves, handed out in portions.
pub(super) struct Reservation {
    /// Ranges of bytes.
    ranges: Vec<Range<u64>>,
    next: usize,
}

impl Reservation {
    /// All bytes from sector `from` to the end of blocks at these places, or of the file.
    pub(super) fn whole(from: u64, places: impl Iterator<Item = Range<u64>>, ends: Range<u64>) -> Reservation {
        let to = if ends.is_empty() { places.last().map_or(from, |place| place.end) } else { ends.end };
        Reservation { ranges: std::iter::once(from * SECTOR..to * SECTOR).collect(), next: 0 }
    }

    /// The pages of the bitmaps of blocks at these places, and of the sectors at the file's end, which lie behind them.
    pub(super) fn bitmaps(
        places: impl Iterator<Item = Range<u64>>,
        block_size: BlockSize,
        ends: Range<u64>,
    ) -> Reservation {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let bitmap = u64::from(block_size.bitmap_sectors());
        let ends = (!ends.is_empty()).then_some((ends.start, ends.end));
        for (from, to) in places.map(|place| (place.start, place.start + bitmap)).chain(ends) {
            let page = from * SECTOR / layout::PAGE * layout::PAGE..(to * SECTOR).next_multiple_of(layout::PAGE);
            match ranges.last_mut() {
                Some(last) if page.start <= last.end + MERGE_GAP => last.end = page.end,
                _ => ranges.push(page),
            }
        }
        Reservation { ranges, next: 0 }
    }

    /// Whole blocks at these places, and the sectors at the file's end.
    pub(super) fn blocks(places: impl Iterator<Item = Range<u64>>, ends: Range<u64>) -> Reservation {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for place in places.chain((!ends.is_empty()).then_some(ends)) {
            match ranges.last_mut() {
                Some(last) if place.start * SECTOR <= last.end + MERGE_GAP => last.end = place.end * SECTOR,
                _ => ranges.push(place.start * SECTOR..place.end * SECTOR),
            }
        }
        Reservation { ranges, next: 0 }
    }

    /// Pushes the next portion; false if all was pushed before.
    pub(super) fn push_next(&mut self, slot: FileSlot, ops: &mut Vec<Op>) -> bool {
        let portion = &self.ranges[self.next..(self.next + OPS_AT_ONCE).min(self.ranges.len())];
        self.next += portion.len();
        ops.extend(portion.iter().map(|r| Op::range(0, slot, Action::Allocate, r.start, r.end - r.start)));
        !portion.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::bat::next_places;

    #[test]
    fn bitmaps_are_reserved_by_pages_and_small_blocks_whole() {
        let ranges = |bytes: u32, blocks: usize| {
            let block_size = BlockSize::from_bytes(bytes).unwrap();
            let all: Vec<_> = next_places(16, block_size, 10).take(blocks).collect();
            let end = all.last().unwrap().end;
            Reservation::bitmaps(all.into_iter(), block_size, end..end + 1).ranges
        };
        let stride = (2 << 20) + (64 << 10);
        let page = |at: u64| at..at + 4096;
        assert_eq!(
            ranges(2 << 20, 2),
            [page(60 << 10), page((60 << 10) + stride), page(2 * stride)],
            "the footer apart"
        );
        let small = ranges(4096, 3);
        assert_eq!((small.len(), small[0].start, small[0].end), (1, 8192, 8192 + 7 * 4096), "blocks of 4 KiB whole");
        let large = ranges(256 << 20, 1);
        assert_eq!(large[0].end - large[0].start, 64 << 10, "a bitmap of 128 sectors");
    }

    #[test]
    fn portions_leave_room_in_the_engine() {
        let block_size = BlockSize::DEFAULT;
        let ends = 1 << 20..(1 << 20) + 2;
        let mut reservation = Reservation::bitmaps(next_places(16, block_size, 100).take(70), block_size, ends);
        let mut counts = Vec::new();
        let mut ops = Vec::new();
        while reservation.push_next(FileSlot(0), &mut ops) {
            counts.push(ops.drain(..).count());
        }
        assert_eq!(counts, [32, 32, 7]);
    }
}
