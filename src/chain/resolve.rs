//! Planning: a range of the disk in, extents out. Pure look-ups; what is not in memory is named, loaded, and asked again.
//!
//! ```text
//!   plan_* ──> extents                        (nearly always)
//!      └─────> missing ─> Load ─> read its pieces ─> supply ─> plan_* again
//! ```
//!
//! That is the only loop. It may turn twice, for what lies beneath a block is asked for only when the block's own bits are
//! known; and again where memory is short and others need it, too. It ends: what is supplied is held for who asked.

use super::frozen::CellRead;
use super::frozen_cache::CELL_SECTORS;
use super::plan::{Missing, PlanBuffer};
use super::version::Version;
use crate::error::Result;
use crate::format::bitmap;
use crate::image::{NeedsGrowth, Pins};
use crate::storage::FileSlot;
use crate::units::{SECTOR_BYTES, SectorRange};

/// Bitmap sectors under way for a question that could not be answered. Each piece is one sector of a file.
#[derive(Debug, Default)]
pub struct Load {
    bitmap_sectors: Vec<(usize, BitmapRead)>,
    /// Granules that others have loaded meanwhile.
    already_loaded: Vec<usize>,
    cells: Vec<(usize, Vec<CellRead>)>,
    reads: Vec<BitmapRead>,
}

/// Where a piece is, and (granules only) what was read, and how often it had left memory before.
#[derive(Debug, Clone)]
struct BitmapRead {
    slot: FileSlot,
    at: u64,
    evictions: u32,
    bytes: Option<Box<[u8; SECTOR_BYTES]>>,
}

impl Load {
    /// The pieces to read: slot and byte offset of a sector each, numbered from 0.
    pub fn reads(&self) -> impl Iterator<Item = (FileSlot, u64)> {
        self.reads.iter().map(|p| (p.slot, p.at))
    }

    /// Takes in piece `number`, a sector long.
    pub fn complete(&mut self, number: usize, sector: &[u8]) {
        let mut rest = number;
        if let Some((_, piece)) = self.bitmap_sectors.get_mut(rest) {
            piece.bytes = Some(Box::new(sector.try_into().expect("a piece is a sector long")));
            return;
        }
        rest -= self.bitmap_sectors.len();
        for (_, pieces) in &mut self.cells {
            match pieces.get_mut(rest) {
                Some(piece) => {
                    let mut words = Box::new([0; SECTOR_BYTES / 8]);
                    crate::format::bitmap::decode(sector, words.as_mut_slice());
                    piece.words = Some(words);
                    return;
                }
                None => rest -= pieces.len(),
            }
        }
        unreachable!("a number below the count of pieces");
    }
}

impl Version {
    /// Where `range` is read from. The range lies on the disk.
    #[inline]
    pub fn plan_read(&self, range: SectorRange, plan: &mut PlanBuffer) {
        plan.clear();
        match self.top() {
            Some(top) => top.plan_read(range, self.frozen(), plan),
            None => self.frozen().plan_read(range, plan),
        }
    }

    /// Has the processor fetch what a look-up of the beginning of `range` will need and has in none of its caches.
    #[inline]
    pub fn prefetch(&self, range: SectorRange, plan: &mut PlanBuffer) {
        self.frozen().prefetch(range.start(), plan);
    }

    /// Where a write of `range` goes; blocks get places. Only on a disk with a top.
    ///
    /// # Errors
    /// [`NeedsGrowth`]: ask again when the file has grown.
    pub fn plan_write(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        plan.clear();
        self.top().expect("only writable disks write").plan_write(range, plan)
    }

    /// What to zero and mark so that `range` reads as zeros. Only on a disk with a top.
    ///
    /// # Errors
    /// As for `plan_write`.
    pub fn plan_zero(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        plan.clear();
        self.top().expect("only writable disks write").plan_zero(range, self.frozen(), plan)
    }

    /// What to punch when the guest needs `range` no more. Only on a disk with a top.
    pub fn plan_discard(&self, range: SectorRange, plan: &mut PlanBuffer) {
        plan.clear();
        self.top().expect("only writable disks write").plan_discard(range, plan);
    }

    /// What must be read before the question that left `missing` can be asked again.
    pub fn load(&self, missing: &[Missing]) -> Load {
        let mut load = Load::default();
        for what in missing {
            match *what {
                Missing::BitmapSector(granule) => {
                    let top = self.top().expect("only a top has granules");
                    // Asked before the file is read: what comes and goes meanwhile makes the piece worthless.
                    let Some(times) = top.image.bitmaps().and_then(|b| b.eviction_count(granule)) else {
                        load.already_loaded.push(granule);
                        continue;
                    };
                    let at = top.image.bitmap_sector_offset(granule);
                    load.bitmap_sectors
                        .push((granule, BitmapRead { slot: top.slot, at, evictions: times, bytes: None }));
                }
                Missing::Cell(cell) => load.cells.push((cell, self.frozen().cell_reads(cell))),
            }
        }
        load.reads = load.bitmap_sectors.iter().map(|(_, p)| p.clone()).collect();
        for piece in load.cells.iter().flat_map(|(_, pieces)| pieces) {
            let slot = self.frozen().layers()[piece.layer].slot;
            load.reads.push(BitmapRead { slot, at: piece.at, evictions: 0, bytes: None });
        }
        load
    }

    /// Takes in a load whose pieces are all there. Granules of the top stay in memory as long as `held` does.
    pub fn supply(&self, load: &Load, held: &mut Pins) {
        let image = || &self.top().expect("only a top has granules").image;
        for (granule, piece) in &load.bitmap_sectors {
            let bytes = piece.bytes.as_ref().expect("all pieces were read");
            held.insert(image(), *granule, Some((piece.evictions, &bytes[..])));
        }
        load.already_loaded.iter().for_each(|granule| held.insert(image(), *granule, None));
        for (cell, pieces) in &load.cells {
            self.frozen().supply(*cell, pieces);
        }
    }

    /// Reads what a plan missed, here and now; for tools and jobs, which have a thread of their own. `held` as in `supply`.
    ///
    /// # Errors
    /// `Io`, naming file and offset.
    pub fn load_now(&self, missing: &[Missing], held: &mut Pins) -> Result<()> {
        let mut load = self.load(missing);
        let pieces: Vec<_> = load.reads().collect();
        for (number, (slot, at)) in pieces.into_iter().enumerate() {
            let mut sector = [0; SECTOR_BYTES];
            self.file(slot).read_at(&mut sector, at)?;
            load.complete(number, &sector);
        }
        self.supply(&load, held);
        Ok(())
    }

    /// Marks what was written, as `Writable::mark`, and reads what that misses here and now.
    ///
    /// # Errors
    /// As `load_now`.
    pub fn mark_now(&self, range: SectorRange) -> Result<bool> {
        let image = &self.top().expect("only writable disks write").image;
        let mut held = Pins::default();
        loop {
            match image.mark(range) {
                Ok(kept) => return Ok(kept),
                Err(absent) => self.load_now(&Missing::bitmap_sectors(&absent), &mut held)?,
            }
        }
    }

    /// `plan_read`, with what it misses read here and now.
    ///
    /// # Errors
    /// As `load_now`.
    pub fn plan_read_now(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<()> {
        self.plan_read(range, plan);
        // Mostly twice at most: what the top's bits leave open may need the bitmaps of what lies beneath.
        let mut held = Pins::default();
        while !plan.missing.is_empty() {
            self.load_now(&plan.missing, &mut held)?;
            self.plan_read(range, plan);
        }
        Ok(())
    }

    /// As `plan_read_now` on a disk without a top, for who passes each place once: what is read is forgotten.
    ///
    /// # Errors
    /// As `load_now`.
    pub fn plan_read_uncached(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<()> {
        assert!(self.top().is_none(), "only what does not change is passed once");
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

    /// Reads `range` into `into`, here and now.
    ///
    /// # Errors
    /// As `load_now`.
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
    fn pieces_of_granules_and_cells_come_in_any_order() {
        let rig = ChainFolder::new();
        rig.dynamic("root", 64 << 10, 20_000);
        rig.fill("root", &[(0, 20_000, 1)]);
        rig.child("middle", "root", 2 << 20, 20_000);
        rig.fill("middle", &[(100, 200, 2), (5_000, 5_100, 3), (9_000, 9_001, 4)]);
        rig.child("leaf", "middle", 2 << 20, 20_000);
        rig.fill("leaf", &[(150, 160, 5), (8_200, 8_201, 6)]);
        let version = rig.write("leaf");
        let (whole, mut plan) = (SectorRange::between(0, 20_000), PlanBuffer::default());
        // The granules of the top first; what they leave open asks for cells.
        for round in 0.. {
            version.plan_read(whole, &mut plan);
            if plan.missing.is_empty() {
                assert!(round > 0, "something had to be read");
                break;
            }
            let mut load = version.load(&plan.missing);
            let mut pieces: Vec<_> = load.reads().enumerate().collect();
            pieces.reverse();
            for (number, (slot, at)) in pieces {
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
    fn granules_and_cells_are_loaded_together() {
        let rig = ChainFolder::new();
        rig.dynamic("root", 2 << 20, 20_000);
        rig.fill("root", &[(0, 20_000, 1)]);
        rig.child("leaf", "root", 2 << 20, 20_000);
        rig.fill("leaf", &[(4_000, 4_001, 2)]);
        let version = rig.write("leaf");
        let mut plan = PlanBuffer::default();
        version.plan_read(SectorRange::between(4_000, 4_100), &mut plan);
        assert_eq!(plan.missing, [Missing::BitmapSector(0), Missing::Cell(1)]);
        let load = version.load(&plan.missing);
        let slots: Vec<_> = load.reads().map(|(slot, _)| slot).collect();
        assert_eq!(slots, [FileSlot(0), FileSlot(1)]);
        assert_eq!(read_sector_bytes(&version, 3_999, 4_098), [[1].as_slice(), &[2], &[1; 97]].concat());
    }
}
