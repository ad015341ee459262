//! Allocation: the space that a growing file reserves on the file system, either whole blocks or only the pages that a
//! commit writes.
//!
//! A commit must not fail for lack of space after its data was acknowledged. So growth reserves the pages that step C2
//! of a commit writes before a block gets its place (docs/space.md):
//!
//! | allocation | reserved by growth | allocated by the first write | fails if the file system is full |
//! | --- | --- | --- | --- |
//! | sparse | the pages of each block's bitmap | the pages that it covers | growth, or that write |
//! | block | the whole block | nothing | growth |
//!
//! Sparse allocation also reserves whole blocks while the guest writes whole blocks in sequence.
//!
//! Sparse allocation relies on the [`AllocationMode`](crate::storage::AllocationMode) of the file system. If the file
//! system gives no guarantee (copy on write, reflinked files, file systems without reservation), a commit that fails
//! for lack of space is retried (`disk/job.rs`).

use std::ops::Range;

use crate::format::layout;
use crate::storage::{Action, FileSlot, Op};
use crate::units::{BlockSize, FileSector};

/// Maximum gap in bytes between two reserved ranges that is reserved, too. It equals the data of a 4 KiB block, which
/// one write fills.
const MERGE_GAP: u64 = layout::PAGE;
/// Reservations pushed to the engine at once, so that it has room for the requests of the queue.
const OPS_AT_ONCE: usize = 32;

/// Way in which the space of new blocks is allocated on the file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Allocation {
    /// Writes allocate the space of data. Growth reserves only the pages of bitmaps.
    #[default]
    Sparse,
    /// Growth reserves whole blocks. The file is less fragmented. A write into a block that was placed in this way does
    /// not fail for lack of space, if the file system guarantees it.
    Block,
}

/// The ranges that one step of growth reserves, pushed to the engine in portions.
pub(super) struct Reservation {
    /// Ranges in bytes.
    ranges: Vec<Range<u64>>,
    next: usize,
}

impl Reservation {
    /// Reserves all bytes from sector `from` to the end of the last of `places`, or to the end of `ends` if `ends` is
    /// not empty.
    pub(super) fn whole(
        from: FileSector,
        places: impl Iterator<Item = Range<FileSector>>,
        ends: Range<FileSector>,
    ) -> Reservation {
        let to = if ends.is_empty() { places.last().map_or(from, |place| place.end) } else { ends.end };
        Reservation { ranges: std::iter::once(from.byte_offset()..to.byte_offset()).collect(), next: 0 }
    }

    /// Reserves the pages with the bitmaps of blocks at `places`, and the pages of `ends`, which come after all places.
    pub(super) fn bitmaps(
        places: impl Iterator<Item = Range<FileSector>>,
        block_size: BlockSize,
        ends: Range<FileSector>,
    ) -> Reservation {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let bitmap = u64::from(block_size.bitmap_sectors());
        let ends = (!ends.is_empty()).then_some((ends.start, ends.end));
        for (from, to) in places.map(|place| (place.start, place.start + bitmap)).chain(ends) {
            let page =
                from.byte_offset() / layout::PAGE * layout::PAGE..to.byte_offset().next_multiple_of(layout::PAGE);
            match ranges.last_mut() {
                Some(last) if page.start <= last.end + MERGE_GAP => last.end = page.end,
                _ => ranges.push(page),
            }
        }
        Reservation { ranges, next: 0 }
    }

    /// Reserves whole blocks at `places`, and the sectors `ends` at the end of the file.
    pub(super) fn blocks(places: impl Iterator<Item = Range<FileSector>>, ends: Range<FileSector>) -> Reservation {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for place in places.chain((!ends.is_empty()).then_some(ends)) {
            let block = place.start.byte_offset()..place.end.byte_offset();
            match ranges.last_mut() {
                Some(last) if block.start <= last.end + MERGE_GAP => last.end = block.end,
                _ => ranges.push(block),
            }
        }
        Reservation { ranges, next: 0 }
    }

    /// Pushes the next portion. Returns false if all portions were pushed before.
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
            let all: Vec<_> = next_places(FileSector::new(16), block_size, 10).take(blocks).collect();
            let end = all.last().unwrap().end;
            Reservation::bitmaps(all.into_iter(), block_size, end..end + 1).ranges
        };
        let stride = (2 << 20) + (64 << 10);
        let page = |at: u64| at..at + 4096;
        assert_eq!(
            ranges(2 << 20, 2),
            [page(60 << 10), page((60 << 10) + stride), page(2 * stride)],
            "the footer has a page of its own"
        );
        let small = ranges(4096, 3);
        assert_eq!((small.len(), small[0].start, small[0].end), (1, 8192, 8192 + 7 * 4096), "blocks of 4 KiB whole");
        let large = ranges(256 << 20, 1);
        assert_eq!(large[0].end - large[0].start, 64 << 10, "a bitmap of 128 sectors");
    }

    #[test]
    fn portions_leave_room_in_the_engine() {
        let block_size = BlockSize::DEFAULT;
        let ends = FileSector::new(1 << 20)..FileSector::new((1 << 20) + 2);
        let mut reservation =
            Reservation::bitmaps(next_places(FileSector::new(16), block_size, 100).take(70), block_size, ends);
        let mut counts = Vec::new();
        let mut ops = Vec::new();
        while reservation.push_next(FileSlot(0), &mut ops) {
            counts.push(ops.drain(..).count());
        }
        assert_eq!(counts, [32, 32, 7]);
    }
}
