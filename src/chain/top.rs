//! Top: the one writable layer. A look-up reads this layer first, and all writes go to this layer. A sealed layer,
//! which was the top before, has the same type.

use std::sync::Arc;

use super::extent::Source;
use super::frozen::Frozen;
use super::frozen_cache::FrozenCacheHandle;
use super::plan::{Missing, PlanBuffer};
use crate::format::bat::BlockPlace;
use crate::image::{NeedsGrowth, Writable};
use crate::storage::FileSlot;
use crate::units::{BlockSize, SECTOR, SectorRange};

/// The layers below a top.
#[derive(Clone, Copy)]
pub(super) struct LowerLayers<'a> {
    /// The sealed layer, which was the top before; `None` if the disk has none.
    pub(super) sealed: Option<&'a Top>,
    pub(super) frozen: &'a Frozen,
}

impl LowerLayers<'_> {
    /// Appends the extents of `range` to `plan`.
    #[inline]
    pub(super) fn plan_read(&self, range: SectorRange, cache: &mut FrozenCacheHandle, plan: &mut PlanBuffer) {
        match self.sealed {
            None => self.frozen.plan_read(range, cache, plan),
            Some(sealed) => self.plan_read_sealed(sealed, range, cache, plan),
        }
    }

    #[cold]
    fn plan_read_sealed(&self, sealed: &Top, range: SectorRange, cache: &mut FrozenCacheHandle, plan: &mut PlanBuffer) {
        // The disk has the same size in both tops, so `range` is inside the sealed layer.
        sealed.plan_read(range, LowerLayers { sealed: None, ..*self }, cache, plan);
    }
}

/// The youngest layer, open for writing, or the sealed layer, which was the youngest before. Clones share the image.
#[derive(Clone)]
pub struct Top {
    /// The slot of the image's file in the engines.
    pub slot: FileSlot,
    /// The image.
    pub image: Arc<Writable>,
}

impl Top {
    /// Appends the extents of `range` to `plan`: from this layer, or from the layers below. Also adds the bitmaps and
    /// cells that must be loaded first.
    #[inline]
    pub(super) fn plan_read(
        &self,
        range: SectorRange,
        beneath: LowerLayers<'_>,
        cache: &mut FrozenCacheHandle,
        plan: &mut PlanBuffer,
    ) {
        let Some((block_size, table)) = self.table() else {
            return plan.push(range, self.source_at(range.start() * SECTOR)); // fixed
        };
        for (block, part) in block_size.split_at_blocks(range) {
            match table.place(block) {
                None => beneath.plan_read(part, cache, plan),
                Some(place) => self.for_each_run(part, plan, |plan, run, set| match set {
                    true => plan.push(run, self.data_source(block_size, place, run)),
                    false => beneath.plan_read(run, cache, plan),
                }),
            }
        }
    }

    /// Appends the extents of a write of `range` to `plan`, and reserves places for blocks that have none. If bitmaps
    /// are missing, only adds these to `plan`.
    ///
    /// # Errors
    /// [`NeedsGrowth`] if the free tail has no space for a block. The call may be repeated after the file has grown.
    pub fn plan_write(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.source_at(range.start() * SECTOR));
            self.image.note_content_change();
            return Ok(());
        };
        // Bits can be set only in loaded bitmaps: load them before a block is reserved.
        for (block, part) in block_size.split_at_blocks(range) {
            if table.place(block).is_some() {
                self.for_each_run(part, plan, |_, _, _| ());
            }
        }
        if !plan.missing.is_empty() {
            return Ok(());
        }
        for (block, part) in block_size.split_at_blocks(range) {
            plan.reserved |= table.place(block).is_none();
            let place = self.image.reserve(block)?;
            plan.push(part, self.data_source(block_size, place, part));
        }
        self.image.note_content_change();
        Ok(())
    }

    /// Appends to `plan` the changes that make `range` read as zeros: extents to zero in the file, and ranges to mark.
    ///
    /// A block without a place gets one only if a lower layer has data in the range. The space of such a block is
    /// durably zero, so its sectors need only be marked. If bitmaps are missing, adds these to `plan` and reserves
    /// nothing.
    ///
    /// # Errors
    /// [`NeedsGrowth`] if the free tail has no space for a block. The call may be repeated after the file has grown.
    pub(super) fn plan_zero(
        &self,
        range: SectorRange,
        beneath: LowerLayers<'_>,
        plan: &mut PlanBuffer,
    ) -> Result<(), NeedsGrowth> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.source_at(range.start() * SECTOR));
            plan.marks.push(range);
            self.image.note_content_change();
            return Ok(());
        };
        let (mut exposed, mut beneath_plan) = (Vec::new(), PlanBuffer::default());
        let mut cache = FrozenCacheHandle::default();
        for (block, part) in block_size.split_at_blocks(range) {
            match table.place(block) {
                Some(place) => {
                    self.for_each_run(part, plan, |_, _, _| ());
                    plan.push(part, self.data_source(block_size, place, part));
                    plan.marks.push(part);
                }
                None => {
                    beneath_plan.clear();
                    beneath.plan_read(part, &mut cache, &mut beneath_plan);
                    beneath_plan.missing.iter().for_each(|m| plan.add_missing(*m));
                    if beneath_plan.extents.iter().any(|e| e.source != Source::Zero) {
                        exposed.push((block, part));
                    }
                }
            }
        }
        if !plan.missing.is_empty() {
            return Ok(());
        }
        plan.reserved = !exposed.is_empty();
        for (block, part) in exposed {
            self.image.reserve(block)?;
            plan.marks.push(part);
        }
        if !plan.marks.is_empty() {
            self.image.note_content_change();
        }
        Ok(())
    }

    /// Appends the extents of `range` that this layer holds to `plan`, to be punched. No bit changes: setting a clear
    /// bit would hide data of the parents, and clearing a set bit would expose that data. Adds bitmaps that are not
    /// loaded to `plan`.
    pub fn plan_discard(&self, range: SectorRange, plan: &mut PlanBuffer) {
        let Some((block_size, table)) = self.table() else {
            self.image.note_content_change();
            return plan.push(range, self.source_at(range.start() * SECTOR));
        };
        for (block, part) in block_size.split_at_blocks(range) {
            if let Some(place) = table.place(block) {
                self.for_each_run(part, plan, |plan, run, set| {
                    if set {
                        plan.push(run, self.data_source(block_size, place, run));
                    }
                });
            }
        }
        if !plan.extents.is_empty() {
            self.image.note_content_change();
        }
    }

    fn table(&self) -> Option<(BlockSize, &crate::image::Bat)> {
        Some((self.image.image().block_size()?, self.image.image().bat()?))
    }

    fn source_at(&self, offset: u64) -> Source {
        Source::File { slot: self.slot, offset }
    }

    /// The source of a run of sectors of one block.
    #[inline]
    fn data_source(&self, block_size: BlockSize, place: BlockPlace, run: SectorRange) -> Source {
        let within = u64::from(block_size.sector_in_block(run.start()));
        self.source_at((place.data(block_size) + within).byte_offset())
    }

    /// Calls `f` for each run of equal bits in a range of one block that has a place. Adds bitmaps that are not loaded
    /// to `plan`, and does not call `f` for their sectors.
    #[inline]
    fn for_each_run(
        &self,
        range: SectorRange,
        plan: &mut PlanBuffer,
        mut f: impl FnMut(&mut PlanBuffer, SectorRange, bool),
    ) {
        let bitmaps = self.image.bitmaps().expect("it has blocks");
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (bitmaps.bitmap_sector_of(rest.start()), bitmaps.bit_of(rest.start()));
            let group = rest.first(u64::from(bitmaps.bits_per_sector() - bit));
            rest = rest.skip(group.count());
            let (mut left, end) = (group, bit + u32::try_from(group.count()).expect("inside a bitmap sector"));
            let loaded = bitmaps.each_run(index, bit, end, |set, count| {
                let run = left.first(u64::from(count));
                left = left.skip(run.count());
                f(plan, run, set);
            });
            if !loaded {
                plan.add_missing(Missing::BitmapSector(self.slot, index));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, plan_loaded, read_sector_bytes, write};
    use super::super::{OpenMode, Version};
    use super::*;
    use crate::units::{BitmapSectorIndex, BlockIndex};

    fn ranges(plan: &PlanBuffer) -> Vec<(u64, u64)> {
        plan.extents.iter().map(|e| (e.range.start(), e.range.end())).collect()
    }

    fn range(from: u64, to: u64) -> SectorRange {
        SectorRange::between(from, to)
    }

    /// Two blocks over a parent that has data only in sectors 0 to 100 of the first one.
    fn child(chains: &ChainFolder) -> Version {
        chains.dynamic("root", 2 << 20, 8_192);
        chains.fill("root", &[(0, 100, 1)]);
        // A dynamic root has whole blocks: the other sectors of its block 0 are zeros of the root itself.
        chains.child("leaf", "root", 2 << 20, 8_192);
        chains.write("leaf")
    }

    #[test]
    fn clear_bits_read_lower_layers() {
        let chains = ChainFolder::new();
        let version = child(&chains);
        write(&version, range(10, 12), 2);
        write(&version, range(5_000, 5_001), 3);
        assert_eq!(read_sector_bytes(&version, 8, 14), [1, 1, 2, 2, 1, 1]);
        assert_eq!(read_sector_bytes(&version, 98, 102), [1, 1, 0, 0]);
        assert_eq!(read_sector_bytes(&version, 4_999, 5_002), [0, 3, 0]);
    }

    #[test]
    fn zeroing_hides_lower_layers_and_takes_no_space_over_nothing() {
        let chains = ChainFolder::new();
        let version = child(&chains);
        let top = version.top().unwrap();
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(6_000, 6_100), plan).unwrap());
        assert!(plan.extents.is_empty() && plan.marks.is_empty() && !plan.reserved, "zeros over nothing: {plan:?}");
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(50, 5_000), plan).unwrap());
        assert!(plan.extents.is_empty() && plan.reserved, "the space of the new block is already zero: {plan:?}");
        assert_eq!(plan.marks, [range(50, 4_096)], "the second block has nothing to hide");
        assert!(plan.marks.iter().all(|marked| top.image.mark(*marked) == Ok(true)));
        assert_eq!(read_sector_bytes(&version, 48, 52), [1, 1, 0, 0]);
        // In a block with a place, the file is zeroed and the bits are set, regardless of their state before.
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(40, 60), plan).unwrap());
        assert_eq!((ranges(&plan), plan.marks), (vec![(40, 60)], vec![range(40, 60)]));
    }

    #[test]
    fn only_sectors_of_the_top_are_punched() {
        let chains = ChainFolder::new();
        let version = child(&chains);
        write(&version, range(10, 20), 2);
        write(&version, range(30, 31), 2);
        let plan = plan_loaded(&version, |plan| version.plan_discard(range(15, 5_000), plan));
        assert_eq!((ranges(&plan), plan.marks.len()), (vec![(15, 20), (30, 31)], 0));
    }

    #[test]
    fn a_write_of_two_blocks_gives_both_a_place() {
        let chains = ChainFolder::new();
        let version = child(&chains);
        let bat = version.top().unwrap().image.image().bat().unwrap();
        let plan = plan_loaded(&version, |plan| version.plan_write(range(4_090, 4_100), plan).unwrap());
        assert!(plan.reserved);
        let (a, b) = (bat.place(BlockIndex::new(0)).unwrap(), bat.place(BlockIndex::new(1)).unwrap());
        assert!(b.sector() >= a.end(BlockSize::DEFAULT), "{a} and {b} overlap");
        let at = |place: BlockPlace, within: u64| Source::File {
            slot: version.top().unwrap().slot,
            offset: (place.sector() + 1 + within).byte_offset(),
        };
        let got: Vec<_> = plan.extents.iter().map(|e| e.source).collect();
        assert_eq!((ranges(&plan), got), (vec![(4_090, 4_096), (4_096, 4_100)], vec![at(a, 4_090), at(b, 0)]));
        let again = plan_loaded(&version, |plan| version.plan_write(range(4_090, 4_100), plan).unwrap());
        assert!(!again.reserved && again.extents == plan.extents);
    }

    #[test]
    fn bitmaps_are_loaded_before_anything_is_reserved() {
        let chains = ChainFolder::new();
        drop(child(&chains));
        chains.fill("leaf", &[(0, 1, 9)]);
        let version = chains.write("leaf");
        let mut plan = PlanBuffer::default();
        version.plan_write(range(4_000, 4_200), &mut plan).unwrap();
        let missing = [Missing::BitmapSector(FileSlot(1), BitmapSectorIndex::new(0))];
        assert_eq!((plan.missing.as_slice(), plan.reserved), (&missing[..], false));
        assert_eq!(version.top().unwrap().image.image().bat().unwrap().place(BlockIndex::new(1)), None);
        drop(version);
        // Opened read-only, the same file is a frozen layer.
        assert_eq!(read_sector_bytes(&chains.chain("leaf", OpenMode::Read).unwrap().into_frozen(), 0, 2), [9, 1]);
    }
}
