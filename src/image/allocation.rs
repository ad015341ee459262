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
//! Sparse relies on the file system's [`AllocationMode`]. Growth covers what a commit needs as far as that rule reaches; beyond it
//! (copy on write, reflinked files, file systems that cannot reserve) a commit that finds no room is tried again
//! (`disk/job.rs`).

use std::ops::Range;

use super::free_tail::FreeTail;
use super::writable::Writable;
use crate::format::layout;
use crate::storage::{Action, AllocationMode, FileSlot, Op};
use crate::units::{BlockSize, SECTOR};

/// Blocks by which a file grows at least, room permitting.
const MIN_STEP_BLOCKS: u64 = 16;
/// Bytes by which a file grows at first, if that is no more than an eighth of the disk.
const FIRST_STEP_BYTES: u64 = 256 << 20;
/// Bytes by which a file grows at most, unless sixteen blocks are more.
const MAX_STEP_BYTES: u64 = 1 << 30;
/// Blocks for which a sparse file takes room at first. Each time doubles that: what is reserved and not used stays in
/// proportion to what was written.
const FIRST_RESERVED_BLOCKS: u64 = 8;
/// Bytes of bitmaps for which a sparse file takes room at once, at most.
const MAX_RESERVED_BYTES: u64 = 8 << 20;
/// Blocks in a row that got places after each other, before the next ones are expected to be written as a whole.
const SEQUENTIAL_BLOCKS: u32 = 8;
/// Of these the last ones are not looked at: their writes may be under way.
const IN_FLIGHT_BLOCKS: u32 = 4;
/// Bytes of blocks in a row that are reserved whole at once.
const MAX_WHOLE_BYTES: u64 = 64 << 20;
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

impl Writable {
    /// Chooses how new blocks take room. Without a call the allocation is sparse. Only the first call counts.
    ///
    /// A file system whose rules are not known gets whole blocks.
    pub fn set_allocation(&self, wanted: Allocation) {
        let chosen = match (wanted, self.room_rule) {
            (Allocation::Sparse, AllocationMode::Unknown) => {
                let why = "it is not known whether this file system refuses a write at once when it is full";
                log::info!("{}: allocation=block is used: {why}", self.path().display());
                Allocation::Block
            }
            _ => wanted,
        };
        let _ = self.allocation.set(chosen);
    }

    /// How new blocks take room.
    pub(super) fn allocation(&self) -> Allocation {
        *self.allocation.get_or_init(|| match self.room_rule {
            AllocationMode::Unknown => Allocation::Block,
            AllocationMode::InPlace | AllocationMode::CopyOnWrite => Allocation::default(),
        })
    }

    /// Blocks by which the next step makes the file longer: an eighth of the disk up to 256 MiB, or 1 % of it, or sixteen
    /// blocks; four times as many each time, as a guest that fills its disk waits some milliseconds for a step; up to 1 GiB.
    pub(super) fn step_blocks(&self, room: &FreeTail) -> u64 {
        let Some(block_size) = self.image().block_size() else { return 0 };
        let bytes = u64::from(block_size.bytes());
        let size = self.image().size();
        let least = ((size / 8).min(FIRST_STEP_BYTES).max(size / 100) / bytes).max(MIN_STEP_BLOCKS);
        let most = (MAX_STEP_BYTES / bytes).max(MIN_STEP_BLOCKS);
        (least << (2 * room.steps).min(16)).min(most)
    }

    /// Blocks for which the next step reserves room on the host: all that the file then has room for, or sparse eight and
    /// twice as many each time.
    pub(super) fn reserved_blocks(&self, room: &FreeTail) -> u64 {
        let Some(block_size) = self.image().block_size() else { return 0 };
        match self.allocation() {
            Allocation::Block => self.step_blocks(room),
            Allocation::Sparse => {
                let bitmap = (u64::from(block_size.bitmap_sectors()) * SECTOR).max(layout::PAGE);
                let most = match room.neighbor_run >= SEQUENTIAL_BLOCKS {
                    // In proportion to what was written so: on a host of many children it is room that others lack.
                    true => {
                        (MAX_WHOLE_BYTES / u64::from(block_size.bytes())).min(u64::from(room.neighbor_run / 16)).max(1)
                    }
                    false => MAX_RESERVED_BYTES / bitmap,
                };
                (FIRST_RESERVED_BLOCKS << room.reservations.min(16)).min(most)
            }
        }
    }

    /// Whether the guest writes whole blocks in a row, so that the next ones are to be reserved whole: that is faster, and
    /// takes what is going to be taken anyway.
    pub(super) fn writes_whole_blocks(&self, room: &FreeTail) -> bool {
        let Some(bitmaps) = self.bitmaps().filter(|_| room.neighbor_run >= SEQUENTIAL_BLOCKS) else { return false };
        let granule = bitmaps.first_sector_of(room.last_placed.saturating_sub(IN_FLIGHT_BLOCKS));
        let mut all = true;
        // In a root all bits are set from the beginning.
        bitmaps.each_run(granule, 0, bitmaps.bits_per_sector(), |is_set, _| all &= is_set) && all
    }
}

/// The places of the next blocks, in sectors from the bitmap to the end of the data, if the next goes behind sector `next`.
pub(super) fn next_places(next: u64, block_size: BlockSize, unplaced: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut next, mut unplaced) = (next, unplaced);
    std::iter::from_fn(move || {
        let place = layout::next_place(next, block_size, unplaced).ok().filter(|_| unplaced > 0)?;
        next = u64::from(place) + u64::from(block_size.stride_sectors());
        unplaced -= 1;
        Some(u64::from(place)..next)
    })
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
