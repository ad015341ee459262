//! Growth policy: when a file grows, by how much, and how much of that is reserved on the file system.

use super::allocation::Allocation;
use super::free_tail::FreeTail;
use super::writable::Writable;
use crate::format::layout;
use crate::storage::AllocationMode;
use crate::units::{FileSector, SECTOR};

/// Minimum step of growth in blocks, unless space is short.
const MIN_STEP_BLOCKS: u64 = 16;
/// Limit of the first step in bytes, unless 1 % of the disk is more.
const FIRST_STEP_BYTES: u64 = 256 << 20;
/// Maximum step in bytes, unless sixteen blocks are more.
const MAX_STEP_BYTES: u64 = 1 << 30;
/// Blocks for which the first step reserves space in sparse allocation. Each step doubles the number, so that unused
/// reservations stay in proportion to the data written.
const FIRST_RESERVED_BLOCKS: u64 = 8;
/// Maximum reservation of bitmaps in one step, in bytes.
const MAX_RESERVED_BYTES: u64 = 8 << 20;
/// Minimum length of a run of neighbouring blocks that counts as sequential writing.
const SEQUENTIAL_BLOCKS: u32 = 8;
/// Number of blocks at the end of a run whose bitmaps are not examined, as writes to them may be in flight.
const IN_FLIGHT_BLOCKS: u32 = 4;
/// Maximum reservation of whole blocks in one step, in bytes.
const MAX_WHOLE_BYTES: u64 = 64 << 20;

impl Writable {
    /// Chooses the allocation of new blocks. The default is sparse; only the first call has an effect.
    ///
    /// On a file system with unknown guarantees, the allocation is always by whole blocks.
    pub fn set_allocation(&self, allocation: Allocation) {
        let chosen = match (allocation, self.allocation_mode) {
            (Allocation::Sparse, AllocationMode::Unknown) => {
                let why = "it is unknown whether this file system reports a lack of space when data is written";
                log::info!("{}: uses allocation=block: {why}", self.path().display());
                Allocation::Block
            }
            _ => allocation,
        };
        let _ = self.allocation.set(chosen);
    }

    /// The allocation of new blocks.
    pub(super) fn allocation(&self) -> Allocation {
        *self.allocation.get_or_init(|| match self.allocation_mode {
            AllocationMode::Unknown => Allocation::Block,
            AllocationMode::InPlace | AllocationMode::CopyOnWrite => Allocation::default(),
        })
    }

    /// Number of blocks by which the next step extends the file.
    ///
    /// The first step is an eighth of the disk, but at most 256 MiB; at least 1 % of the disk, and at least sixteen
    /// blocks. Each step is four times as large as the one before. No step is larger than 1 GiB (or sixteen blocks): a
    /// guest that fills its disk waits milliseconds for each.
    pub(super) fn step_blocks(&self, tail: &FreeTail) -> u64 {
        let Some(block_size) = self.image().block_size() else { return 0 };
        let bytes = u64::from(block_size.bytes());
        let size = self.image().size();
        let least = ((size / 8).min(FIRST_STEP_BYTES).max(size / 100) / bytes).max(MIN_STEP_BLOCKS);
        let most = (MAX_STEP_BYTES / bytes).max(MIN_STEP_BLOCKS);
        (least << (2 * tail.steps).min(16)).min(most)
    }

    /// Number of blocks for which the next step reserves space: in block allocation all blocks of the step; in sparse
    /// allocation eight at first and twice as many each time, up to a limit.
    pub(super) fn reserved_blocks(&self, tail: &FreeTail) -> u64 {
        let Some(block_size) = self.image().block_size() else { return 0 };
        match self.allocation() {
            Allocation::Block => self.step_blocks(tail),
            Allocation::Sparse => {
                let bitmap = (u64::from(block_size.bitmap_sectors()) * SECTOR).max(layout::PAGE);
                let most = match tail.neighbor_run >= SEQUENTIAL_BLOCKS {
                    // In proportion to the length of the run, as reserved space is lost to other images on the file
                    // system.
                    true => {
                        (MAX_WHOLE_BYTES / u64::from(block_size.bytes())).min(u64::from(tail.neighbor_run / 16)).max(1)
                    }
                    false => MAX_RESERVED_BYTES / bitmap,
                };
                (FIRST_RESERVED_BLOCKS << tail.reservations.min(16)).min(most)
            }
        }
    }

    /// Whether the guest writes whole blocks in sequence. The next blocks are then reserved whole: that is faster, and
    /// takes only space that the guest is about to use.
    pub(super) fn writes_whole_blocks(&self, tail: &FreeTail) -> bool {
        let Some(bitmaps) = self.bitmaps().filter(|_| tail.neighbor_run >= SEQUENTIAL_BLOCKS) else { return false };
        let index = bitmaps.first_sector_of(tail.last_placed.saturating_sub(IN_FLIGHT_BLOCKS));
        let mut all = true;
        // In a root all bits of a new block are set, so the lengths of its writes do not matter.
        bitmaps.each_run(index, 0, bitmaps.bits_per_sector(), |is_set, _| all &= is_set) && all
    }

    /// Whether blocks without a place exist, and the free tail has reserved space for fewer than a quarter of the
    /// blocks of the next reservation.
    pub fn is_short(&self, tail: &FreeTail) -> bool {
        let needed = (self.reserved_blocks(tail) / 4).max(1).min(tail.unplaced);
        needed > 0 && self.end_after(tail.next, needed, tail.unplaced).is_none_or(|end| end > tail.usable_end())
    }

    /// Whether a step of growth makes footer and zeros durable by syncs of the file instead of write-throughs
    /// (`growth.rs`).
    pub(super) fn is_growth_by_sync(&self) -> bool {
        self.allocation_mode == AllocationMode::CopyOnWrite || self.file().is_on_shared_file_system()
    }

    /// Whether a sync of a step of growth is in flight.
    pub fn is_growth_syncing(&self) -> bool {
        self.image().block_size().is_some() && self.free_tail().syncing
    }

    /// Whether a step of growth is in progress.
    pub fn is_growing(&self) -> bool {
        self.free_tail().growing
    }

    /// Whether a step of growth should begin.
    pub fn is_growth_due(&self) -> bool {
        self.sparse.is_some() && self.is_short(&self.free_tail())
    }

    /// An upper bound of the file sector at which `blocks` > 0 more blocks end if they are placed at or after sector
    /// `from`. `None` if no BAT entry can contain even the first place.
    ///
    /// The result assumes that all blocks are aligned: `next_place` never places a block after its aligned position. If
    /// blocks are not aligned, the result is too large by at most one [alignment](layout::alignment) per block.
    pub(super) fn end_after(&self, from: FileSector, blocks: u64, unplaced: u64) -> Option<FileSector> {
        let block_size = self.sparse().block_size;
        layout::next_place(from, block_size, unplaced).ok()?;
        let first = layout::place_from(from, block_size, layout::alignment(block_size))?;
        first.checked_add(blocks.checked_mul(layout::aligned_stride(block_size))?)
    }
}
