//! Top: the one writable layer. It answers first, and everything new goes here.

use std::sync::Arc;

use super::extent::Source;
use super::frozen::Frozen;
use super::plan::{Missing, PlanBuffer};
use crate::image::{NeedsGrowth, Writable};
use crate::storage::FileSlot;
use crate::units::{BlockSize, SECTOR, SectorRange};

/// The youngest layer, open for writing.
pub struct Top {
    /// Its place in the engines' tables of files.
    pub slot: FileSlot,
    /// The image.
    pub image: Arc<Writable>,
}

impl Top {
    /// Appends where `range` is to `plan`: here, or in what lies beneath.
    #[inline]
    pub fn plan_read(&self, range: SectorRange, beneath: &Frozen, plan: &mut PlanBuffer) {
        let Some((block_size, table)) = self.table() else {
            return plan.push(range, self.source_at(range.start() * SECTOR)); // fixed
        };
        for (block, part) in block_size.split_at_blocks(range) {
            match table.place(block) {
                None => beneath.plan_read(part, plan),
                Some(place) => self.for_each_run(part, plan, |plan, run, set| match set {
                    true => plan.push(run, self.data_source(block_size, place, run)),
                    false => beneath.plan_read(run, plan),
                }),
            }
        }
    }

    /// Where a write of `range` goes, giving places to blocks that have none.
    ///
    /// # Errors
    /// [`NeedsGrowth`] where the prepared tail is used up; asking again later is safe.
    pub fn plan_write(&self, range: SectorRange, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.source_at(range.start() * SECTOR));
            self.image.note_content_change();
            return Ok(());
        };
        // Bits can be set only in bitmaps that are known: load before anything is reserved.
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

    /// What it takes to make `range` read as zeros: extents to zero in the file, ranges to mark.
    ///
    /// A block without a place gets one only where something beneath would shine through; its room is durably zero, so
    /// marking is all.
    ///
    /// # Errors
    /// As for `place`.
    pub fn plan_zero(&self, range: SectorRange, beneath: &Frozen, plan: &mut PlanBuffer) -> Result<(), NeedsGrowth> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.source_at(range.start() * SECTOR));
            plan.marks.push(range);
            self.image.note_content_change();
            return Ok(());
        };
        let (mut shining, mut look) = (Vec::new(), PlanBuffer::default());
        for (block, part) in block_size.split_at_blocks(range) {
            match table.place(block) {
                Some(place) => {
                    self.for_each_run(part, plan, |_, _, _| ());
                    plan.push(part, self.data_source(block_size, place, part));
                    plan.marks.push(part);
                }
                None => {
                    look.clear();
                    beneath.plan_read(part, &mut look);
                    look.missing.iter().for_each(|m| plan.add_missing(*m));
                    if look.extents.iter().any(|e| e.source != Source::Zero) {
                        shining.push((block, part));
                    }
                }
            }
        }
        if !plan.missing.is_empty() {
            return Ok(());
        }
        plan.reserved = !shining.is_empty();
        for (block, part) in shining {
            self.image.reserve(block)?;
            plan.marks.push(part);
        }
        if !plan.marks.is_empty() {
            self.image.note_content_change();
        }
        Ok(())
    }

    /// What of `range` is here, to be punched. Sectors that are not here stay as they are: their bits are clear, and the
    /// parents' data must not be hidden, nor (where bits are set) come back.
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

    /// Where the data of a run of one block is.
    #[inline]
    fn data_source(&self, block_size: BlockSize, place: u32, run: SectorRange) -> Source {
        let sectors = u64::from(block_size.bitmap_sectors()) + u64::from(block_size.sector_in_block(run.start()));
        self.source_at((u64::from(place) + sectors) * SECTOR)
    }

    /// Calls `f` for each run of equal bits in a range of one block that has a place; notes bitmaps to be loaded.
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
            let (mut left, end) = (group, bit + u32::try_from(group.count()).expect("inside a granule"));
            let known = bitmaps.each_run(index, bit, end, |set, count| {
                let run = left.first(u64::from(count));
                left = left.skip(run.count());
                f(plan, run, set);
            });
            if !known {
                plan.add_missing(Missing::BitmapSector(index));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, plan_loaded, read_sector_bytes, write};
    use super::super::{OpenMode, Version};
    use super::*;

    fn ranges(plan: &PlanBuffer) -> Vec<(u64, u64)> {
        plan.extents.iter().map(|e| (e.range.start(), e.range.end())).collect()
    }

    fn range(from: u64, to: u64) -> SectorRange {
        SectorRange::between(from, to)
    }

    /// Two blocks over a parent that has sectors 0 to 100 of the first one only.
    fn child(rig: &ChainFolder) -> Version {
        rig.dynamic("root", 2 << 20, 8_192);
        rig.fill("root", &[(0, 100, 1)]);
        // A dynamic root's whole block is there: the other sectors of block 0 are zeros of its own.
        rig.child("leaf", "root", 2 << 20, 8_192);
        rig.write("leaf")
    }

    #[test]
    fn clear_bits_ask_beneath() {
        let rig = ChainFolder::new();
        let version = child(&rig);
        write(&version, range(10, 12), 2);
        write(&version, range(5_000, 5_001), 3);
        assert_eq!(read_sector_bytes(&version, 8, 14), [1, 1, 2, 2, 1, 1]);
        assert_eq!(read_sector_bytes(&version, 98, 102), [1, 1, 0, 0]);
        assert_eq!(read_sector_bytes(&version, 4_999, 5_002), [0, 3, 0]);
    }

    #[test]
    fn zeros_hide_what_is_beneath_and_take_no_room_where_nothing_is() {
        let rig = ChainFolder::new();
        let version = child(&rig);
        let top = version.top().unwrap();
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(6_000, 6_100), plan).unwrap());
        assert!(plan.extents.is_empty() && plan.marks.is_empty() && !plan.reserved, "zeros over nothing: {plan:?}");
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(50, 5_000), plan).unwrap());
        assert!(plan.extents.is_empty() && plan.reserved, "the new block's room is zero already: {plan:?}");
        assert_eq!(plan.marks, [range(50, 4_096)], "the second block has nothing to hide");
        assert!(plan.marks.iter().all(|marked| top.image.mark(*marked) == Ok(true)));
        assert_eq!(read_sector_bytes(&version, 48, 52), [1, 1, 0, 0]);
        // In a block that has a place, bits are set and the file is zeroed, whether they were set or not.
        let plan = plan_loaded(&version, |plan| version.plan_zero(range(40, 60), plan).unwrap());
        assert_eq!((ranges(&plan), plan.marks), (vec![(40, 60)], vec![range(40, 60)]));
    }

    #[test]
    fn only_what_is_here_is_punched() {
        let rig = ChainFolder::new();
        let version = child(&rig);
        write(&version, range(10, 20), 2);
        write(&version, range(30, 31), 2);
        let plan = plan_loaded(&version, |plan| version.plan_discard(range(15, 5_000), plan));
        assert_eq!((ranges(&plan), plan.marks.len()), (vec![(15, 20), (30, 31)], 0));
    }

    #[test]
    fn a_write_of_two_blocks_gives_both_a_place() {
        let rig = ChainFolder::new();
        let version = child(&rig);
        let bat = version.top().unwrap().image.image().bat().unwrap();
        let plan = plan_loaded(&version, |plan| version.plan_write(range(4_090, 4_100), plan).unwrap());
        assert!(plan.reserved);
        let (a, b) = (bat.place(0).unwrap(), bat.place(1).unwrap());
        assert!(b >= a + BlockSize::DEFAULT.stride_sectors(), "{a} and {b} overlap");
        let at = |place: u32, within: u64| Source::File {
            slot: FileSlot(0),
            offset: (u64::from(place) + 1 + within) * SECTOR,
        };
        let got: Vec<_> = plan.extents.iter().map(|e| e.source).collect();
        assert_eq!((ranges(&plan), got), (vec![(4_090, 4_096), (4_096, 4_100)], vec![at(a, 4_090), at(b, 0)]));
        let again = plan_loaded(&version, |plan| version.plan_write(range(4_090, 4_100), plan).unwrap());
        assert!(!again.reserved && again.extents == plan.extents);
    }

    #[test]
    fn bitmaps_are_loaded_before_anything_is_reserved() {
        let rig = ChainFolder::new();
        drop(child(&rig));
        rig.fill("leaf", &[(0, 1, 9)]);
        let version = rig.write("leaf");
        let mut plan = PlanBuffer::default();
        version.plan_write(range(4_000, 4_200), &mut plan).unwrap();
        assert_eq!((plan.missing.as_slice(), plan.reserved), (&[Missing::BitmapSector(0)][..], false));
        assert_eq!(version.top().unwrap().image.image().bat().unwrap().place(1), None);
        drop(version);
        // Read-only, the same file is a layer as any other.
        assert_eq!(read_sector_bytes(&rig.chain("leaf", OpenMode::Read).unwrap().into_frozen(), 0, 2), [9, 1]);
    }
}
