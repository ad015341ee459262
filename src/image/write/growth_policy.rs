//! When a file grows, by how much, and for how much of that it takes room on the host.

use super::allocation::Allocation;
use super::free_tail::FreeTail;
use super::writable::Writable;
use crate::format::layout;
use crate::storage::AllocationMode;
use crate::units::SECTOR;

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

    /// Whether a step of growth is due.
    pub fn is_growth_due(&self) -> bool {
        self.sparse.is_some() && self.is_short(&self.free_tail())
    }

    /// A file sector behind which `blocks` > 0 more blocks, placed from sector `from` on, do not reach; `None` where not
    /// even one of them could be named by an entry. All are taken as aligned, as `next_place` never goes farther;
    /// where they are not, the room is at most their [unit](layout::alignment) a block too large.
    pub(super) fn end_after(&self, from: u64, blocks: u64, unplaced: u64) -> Option<u64> {
        let block_size = self.sparse().block_size;
        layout::next_place(from, block_size, unplaced).ok()?;
        let first = layout::place_from(from, block_size, layout::alignment(block_size))?;
        first.checked_add(blocks.checked_mul(layout::aligned_stride(block_size))?)
    }
}
