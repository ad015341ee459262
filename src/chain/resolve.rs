//! Planning: converts a range of the disk to extents. Planning reads no file (except `plan_read_now` and
//! `plan_read_uncached`): it returns the bitmaps that are missing, and the caller loads these bitmaps and plans again.
//!
//! ```text
//!   plan_* ──> extents                        (nearly always)
//!      └─────> missing ─> Load ─> read its sectors ─> supply ─> plan_* again
//! ```
//!
//! Bitmaps are usually loaded at most twice: the lower layers of a block are looked up only after its bits in the top
//! are loaded. They are loaded more often if other queues evict bitmaps because memory is short. The caller pins the
//! bitmap sectors of the top that it has loaded. Cells are not pinned: a cell is loaded again if other queues have
//! filled the frozen cache meanwhile.

use super::frozen::CellRead;
use super::frozen_cache::{CELL_SECTORS, FrozenCacheHandle};
use super::plan::{Missing, PlanBuffer};
use super::version::Version;
use crate::error::Result;
use crate::format::bitmap;
use crate::image::{NeedsGrowth, Pins};
use crate::storage::FileSlot;
use crate::units::{BitmapSectorIndex, SECTOR_BYTES, SectorRange};

/// The reads of the bitmap sectors that a plan missed. Each read is one sector of a file.
#[derive(Debug, Default)]
pub struct Load {
    bitmap_sectors: Vec<(BitmapSectorIndex, BitmapRead)>,
    /// Bitmap sectors of a top, with its slot, that other queues have loaded in the meantime.
    already_loaded: Vec<(FileSlot, BitmapSectorIndex)>,
    cells: Vec<(usize, Vec<CellRead>)>,
    reads: Vec<BitmapRead>,
}

/// One bitmap sector to read. Only bitmap sectors of the top and the sealed layer use `evictions`, the number of evictions before the read,
/// and `bytes`, the bytes once they were read.
#[derive(Debug, Clone)]
struct BitmapRead {
    slot: FileSlot,
    at: u64,
    evictions: u32,
    bytes: Option<Box<[u8; SECTOR_BYTES]>>,
}

impl Load {
    /// The sectors to read, as file slot and byte offset, numbered from 0.
    pub fn reads(&self) -> impl Iterator<Item = (FileSlot, u64)> {
        self.reads.iter().map(|p| (p.slot, p.at))
    }

    /// Records the bytes of read `number`, one sector.
    pub fn complete(&mut self, number: usize, sector: &[u8]) {
        let mut rest = number;
        if let Some((_, read)) = self.bitmap_sectors.get_mut(rest) {
            read.bytes = Some(Box::new(sector.try_into().expect("a read is a sector long")));
            return;
        }
        rest -= self.bitmap_sectors.len();
        for (_, reads) in &mut self.cells {
            match reads.get_mut(rest) {
                Some(read) => {
                    let mut words = Box::new([0; SECTOR_BYTES / 8]);
                    crate::format::bitmap::decode(sector, words.as_mut_slice());
                    read.words = Some(words);
                    return;
                }
                None => rest -= reads.len(),
            }
        }
        unreachable!("a number below the count of reads");
    }
}

impl Version {
    /// Plans a read of `range`, which lies on the disk. `cache` is the handle of the calling thread.
    #[inline]
    pub fn plan_read(&self, range: SectorRange, cache: &mut FrozenCacheHandle, plan: &mut PlanBuffer) {
        plan.clear();
        match self.top() {
            Some(top) => top.plan_read(range, self.lower(), cache, plan),
            None => self.frozen().plan_read(range, cache, plan),
        }
    }

    /// Prefetches, into the processor's cache, the run that a look-up of the first sector of `range` in the frozen
    /// cache tries first. Does nothing if the sector's cell is not cached as a list of runs. Memory of the top is not
    /// prefetched.
    #[inline]
    pub fn prefetch(&self, range: SectorRange, cache: &mut FrozenCacheHandle) {
        self.frozen().prefetch(range.start(), cache);
    }

    /// Plans a write of `range`, and reserves places for blocks. Only for a disk with a top.
    ///
    /// # Errors
    /// [`NeedsGrowth`] if the file must grow before the write can be planned.
    pub fn plan_write(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        plan.clear();
        self.top().expect("only writable disks write").plan_write(range, plan)
    }

    /// Plans the ranges to zero and to mark so that `range` reads as zeros. Reserves places for blocks. Only for a disk
    /// with a top.
    ///
    /// # Errors
    /// [`NeedsGrowth`] if the file must grow before the ranges can be planned.
    pub fn plan_zero(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        plan.clear();
        self.top().expect("only writable disks write").plan_zero(range, self.lower(), plan)
    }

    /// Plans the ranges to punch when the guest discards `range`. Only for a disk with a top.
    pub fn plan_discard(&self, range: SectorRange, plan: &mut PlanBuffer) {
        plan.clear();
        self.top().expect("only writable disks write").plan_discard(range, plan);
    }

    /// Lists the reads that a plan with these `missing` bitmaps needs.
    pub fn load(&self, missing: &[Missing]) -> Load {
        let mut load = Load::default();
        for what in missing {
            match *what {
                Missing::BitmapSector(slot, index) => {
                    let top = self.writable_in(slot);
                    // The count is taken before the read: if the sector is loaded and evicted during the read, the
                    // bytes of the read are stale.
                    let Some(evictions) = top.image.bitmaps().and_then(|b| b.eviction_count(index)) else {
                        load.already_loaded.push((slot, index));
                        continue;
                    };
                    let at = top.image.bitmap_sector_offset(index);
                    load.bitmap_sectors.push((index, BitmapRead { slot, at, evictions, bytes: None }));
                }
                Missing::Cell(cell) => load.cells.push((cell, self.frozen().cell_reads(cell))),
            }
        }
        load.reads = load.bitmap_sectors.iter().map(|(_, p)| p.clone()).collect();
        for read in load.cells.iter().flat_map(|(_, reads)| reads) {
            let slot = self.frozen().layers()[read.layer].slot;
            load.reads.push(BitmapRead { slot, at: read.at, evictions: 0, bytes: None });
        }
        load
    }

    /// Supplies the bitmaps of a load whose reads are complete. `pins` keeps the bitmap sectors of the top in memory.
    pub fn supply(&self, load: &Load, pins: &mut Pins) {
        for (index, read) in &load.bitmap_sectors {
            let bytes = read.bytes.as_ref().expect("all reads are complete");
            pins.insert(&self.writable_in(read.slot).image, *index, Some((read.evictions, &bytes[..])));
        }
        for (slot, index) in &load.already_loaded {
            pins.insert(&self.writable_in(*slot).image, *index, None);
        }
        for (cell, reads) in &load.cells {
            self.frozen().supply(*cell, reads);
        }
    }

    /// Loads missing bitmaps with blocking reads, for tools and jobs that have their own thread. `pins` keeps the
    /// bitmap sectors of the top in memory.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn load_now(&self, missing: &[Missing], pins: &mut Pins) -> Result<()> {
        let mut load = self.load(missing);
        let reads: Vec<_> = load.reads().collect();
        for (number, (slot, at)) in reads.into_iter().enumerate() {
            let mut sector = [0; SECTOR_BYTES];
            self.file(slot).read_at(&mut sector, at)?;
            load.complete(number, &sector);
        }
        self.supply(&load, pins);
        Ok(())
    }

    /// Marks written sectors, and loads missing bitmaps with blocking reads. Returns the result of `Writable::mark`:
    /// whether the write may be acknowledged before a commit.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn mark_now(&self, range: SectorRange) -> Result<bool> {
        let top = self.top().expect("only writable disks write");
        let mut pins = Pins::default();
        loop {
            match top.image.mark(range) {
                Ok(kept) => return Ok(kept),
                Err(absent) => self.load_now(&Missing::bitmap_sectors(top.slot, &absent), &mut pins)?,
            }
        }
    }

    /// Plans a read as `plan_read` does, and loads missing bitmaps with blocking reads.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn plan_read_now(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<()> {
        let mut cache = FrozenCacheHandle::default();
        self.plan_read(range, &mut cache, plan);
        // Usually at most twice: sectors that the top does not hold may need bitmaps of lower layers.
        let mut pins = Pins::default();
        while !plan.missing.is_empty() {
            self.load_now(&plan.missing, &mut pins)?;
            self.plan_read(range, &mut cache, plan);
        }
        Ok(())
    }

    /// Returns the parts of a range that may be nonzero. Loads missing bitmaps with blocking reads.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn data_ranges_now(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<Vec<SectorRange>> {
        self.plan_read_now(range, plan)?;
        Ok(plan.extents.iter().filter(|e| e.source != super::Source::Zero).map(|e| e.range).collect())
    }

    /// Plans a read as `plan_read_now` does, but caches nothing: for callers that plan each sector once. Only for a
    /// disk without a top.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn plan_read_uncached(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<()> {
        assert!(self.top().is_none(), "only a disk without a top is planned uncached");
        plan.clear();
        let (frozen, mut rest) = (self.frozen(), range);
        frozen.layers().iter().for_each(|layer| layer.image.prefetch_bitmaps(range));
        while !rest.is_empty() {
            let cell = rest.start() / CELL_SECTORS;
            let start = cell * CELL_SECTORS;
            let part = rest.clip(SectorRange::between(start, start + CELL_SECTORS));
            rest = rest.skip(part.count());
            let mut failed = None;
            let mut words = |layer: usize, at: u64| {
                let (mut bytes, mut words) = ([0; SECTOR_BYTES], [0; SECTOR_BYTES / 8]);
                let read = frozen.layers()[layer].image.file().read_at(&mut bytes, at);
                read.map_err(|e| failed = Some(e)).ok()?;
                bitmap::decode(&bytes, &mut words);
                Some(words)
            };
            let decided = frozen.decide_cell(usize::try_from(cell).expect("at most 2^20 cells"), &mut words);
            if let Some(e) = failed {
                return Err(e);
            }
            decided.expect("all bitmaps were read").append_to(start, part, &mut plan.extents);
        }
        Ok(())
    }

    /// Reads `range` into `into`, with blocking reads.
    ///
    /// # Errors
    /// `Io`, with file and offset.
    pub fn read_now(&self, range: SectorRange, into: &mut [u8], plan: &mut PlanBuffer) -> Result<()> {
        assert_eq!(into.len() as u64, range.bytes(), "a buffer of the range's length");
        self.plan_read_now(range, plan)?;
        let mut rest = into;
        for extent in &plan.extents {
            let len = usize::try_from(extent.range.bytes()).expect("a part of a buffer");
            let (now, later) = rest.split_at_mut(len);
            rest = later;
            match extent.source {
                super::Source::Zero => now.fill(0),
                super::Source::File { slot, offset } => self.file(slot).read_at(now, offset)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, read_sector_bytes};
    use super::*;

    #[test]
    fn reads_complete_in_any_order() {
        let chains = ChainFolder::new();
        chains.dynamic("root", 64 << 10, 20_000);
        chains.fill("root", &[(0, 20_000, 1)]);
        chains.child("middle", "root", 2 << 20, 20_000);
        chains.fill("middle", &[(100, 200, 2), (5_000, 5_100, 3), (9_000, 9_001, 4)]);
        chains.child("leaf", "middle", 2 << 20, 20_000);
        chains.fill("leaf", &[(150, 160, 5), (8_200, 8_201, 6)]);
        let version = chains.write("leaf");
        let (whole, mut plan) = (SectorRange::between(0, 20_000), PlanBuffer::default());
        // The bitmap sectors of the top come first; sectors that the top does not hold need cells.
        for round in 0.. {
            version.plan_read(whole, &mut FrozenCacheHandle::default(), &mut plan);
            if plan.missing.is_empty() {
                assert!(round > 0, "bitmaps had to be read");
                break;
            }
            let mut load = version.load(&plan.missing);
            let mut reads: Vec<_> = load.reads().enumerate().collect();
            reads.reverse();
            for (number, (slot, at)) in reads {
                let mut sector = [0; SECTOR_BYTES];
                version.file(slot).read_at(&mut sector, at).unwrap();
                load.complete(number, &sector);
            }
            version.supply(&load, &mut Pins::default());
        }
        let mut want = vec![1; 20_000];
        for (from, to, byte) in [(100, 200, 2), (150, 160, 5), (5_000, 5_100, 3), (8_200, 8_201, 6), (9_000, 9_001, 4)]
        {
            want[from..to].fill(byte);
        }
        assert_eq!(read_sector_bytes(&version, 0, 20_000), want);
    }

    #[test]
    fn bitmap_sectors_and_cells_are_loaded_together() {
        let chains = ChainFolder::new();
        chains.dynamic("root", 2 << 20, 20_000);
        chains.fill("root", &[(0, 20_000, 1)]);
        chains.child("leaf", "root", 2 << 20, 20_000);
        chains.fill("leaf", &[(4_000, 4_001, 2)]);
        let version = chains.write("leaf");
        let mut plan = PlanBuffer::default();
        version.plan_read(SectorRange::between(4_000, 4_100), &mut FrozenCacheHandle::default(), &mut plan);
        assert_eq!(
            plan.missing,
            [Missing::BitmapSector(version.top().unwrap().slot, BitmapSectorIndex::new(0)), Missing::Cell(1)]
        );
        let load = version.load(&plan.missing);
        let slots: Vec<_> = load.reads().map(|(slot, _)| slot).collect();
        assert_eq!(slots, [FileSlot(1), FileSlot(0)]);
        assert_eq!(read_sector_bytes(&version, 3_999, 4_098), [[1].as_slice(), &[2], &[1; 97]].concat());
    }
}
