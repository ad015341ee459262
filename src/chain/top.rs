//! Top: the one writable layer. It answers first, and everything new goes here.

use std::sync::Arc;

use super::extent::{Missing, Plan, Source};
use super::frozen::Frozen;
use crate::image::{NoRoom, Writable};
use crate::storage::Slot;
use crate::units::{BlockSize, SECTOR, SectorRange};

/// The youngest layer, open for writing.
pub struct Top {
    /// Its place in the engines' tables of files.
    pub slot: Slot,
    /// The image.
    pub image: Arc<Writable>,
}

impl Top {
    /// Appends where `range` is to `plan`: here, or in what lies beneath.
    #[inline]
    pub fn split(&self, range: SectorRange, beneath: &Frozen, plan: &mut Plan) {
        let Some((block_size, table)) = self.table() else {
            return plan.push(range, self.at(range.start() * SECTOR)); // fixed
        };
        let mut rest = range;
        while !rest.is_empty() {
            let block = block_size.block_of(rest.start());
            let part = rest.clip(block_size.range_of(block));
            rest = rest.skip(part.count());
            match table.place(block) {
                None => beneath.split(part, plan),
                Some(place) => self.each_run(part, plan, |plan, run, set| match set {
                    true => plan.push(run, self.data(block_size, place, run)),
                    false => beneath.split(run, plan),
                }),
            }
        }
    }

    /// Where a write of `range` goes, giving places to blocks that have none.
    ///
    /// # Errors
    /// [`NoRoom`] where the prepared tail is used up; asking again later is safe.
    pub fn place(&self, range: SectorRange, plan: &mut Plan) -> Result<(), NoRoom> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.at(range.start() * SECTOR));
            return Ok(());
        };
        // Bits can be set only in bitmaps that are known: load before anything is reserved.
        each_block(block_size, range, |block, part| {
            if table.place(block).is_some() {
                self.each_run(part, plan, |_, _, _| ());
            }
        });
        if !plan.missing.is_empty() {
            return Ok(());
        }
        let mut room = Ok(());
        each_block(block_size, range, |block, part| {
            plan.reserved |= table.place(block).is_none();
            room = room.and_then(|()| self.image.reserve(block)).map(|place| {
                plan.push(part, self.data(block_size, place, part));
            });
        });
        room
    }

    /// What it takes to make `range` read as zeros: extents to zero in the file, ranges to mark.
    ///
    /// A block without a place gets one only where something beneath would shine through; its room is durably zero, so
    /// marking is all.
    ///
    /// # Errors
    /// As for `place`.
    pub fn zero(&self, range: SectorRange, beneath: &Frozen, plan: &mut Plan) -> Result<(), NoRoom> {
        let Some((block_size, table)) = self.table() else {
            plan.push(range, self.at(range.start() * SECTOR));
            plan.marks.push(range);
            return Ok(());
        };
        let mut shining = Vec::new();
        each_block(block_size, range, |block, part| match table.place(block) {
            Some(place) => {
                self.each_run(part, plan, |_, _, _| ());
                plan.push(part, self.data(block_size, place, part));
                plan.marks.push(part);
            }
            None => {
                let mut look = Plan::default();
                beneath.split(part, &mut look);
                look.missing.iter().for_each(|m| plan.miss(*m));
                if look.extents.iter().any(|e| e.source != Source::Zero) {
                    shining.push((block, part));
                }
            }
        });
        if !plan.missing.is_empty() {
            return Ok(());
        }
        plan.reserved = !shining.is_empty();
        for (block, part) in shining {
            self.image.reserve(block)?;
            plan.marks.push(part);
        }
        Ok(())
    }

    /// What of `range` is here, to be punched. Sectors that are not here stay as they are: their bits are clear, and the
    /// parents' data must not be hidden, nor (where bits are set) come back.
    pub fn present(&self, range: SectorRange, plan: &mut Plan) {
        let Some((block_size, table)) = self.table() else {
            return plan.push(range, self.at(range.start() * SECTOR));
        };
        each_block(block_size, range, |block, part| {
            if let Some(place) = table.place(block) {
                self.each_run(part, plan, |plan, run, set| {
                    if set {
                        plan.push(run, self.data(block_size, place, run));
                    }
                });
            }
        });
    }

    fn table(&self) -> Option<(BlockSize, &crate::image::Bat)> {
        Some((self.image.image().block_size()?, self.image.image().bat()?))
    }

    fn at(&self, offset: u64) -> Source {
        Source::File { slot: self.slot, offset }
    }

    /// Where the data of a run of one block is.
    #[inline]
    fn data(&self, block_size: BlockSize, place: u32, run: SectorRange) -> Source {
        let sectors = u64::from(block_size.bitmap_sectors()) + u64::from(block_size.within(run.start()));
        self.at((u64::from(place) + sectors) * SECTOR)
    }

    /// Calls `f` for each run of equal bits in a range of one block that has a place; notes bitmaps to be loaded.
    #[inline]
    fn each_run(&self, range: SectorRange, plan: &mut Plan, mut f: impl FnMut(&mut Plan, SectorRange, bool)) {
        let bitmaps = self.image.bitmaps().expect("it has blocks");
        let mut rest = range;
        while !rest.is_empty() {
            let (index, bit) = (bitmaps.index_of(rest.start()), bitmaps.bit_of(rest.start()));
            let group = rest.first(u64::from(bitmaps.sectors_per_granule() - bit));
            rest = rest.skip(group.count());
            let Some(granule) = bitmaps.get(index) else {
                plan.miss(Missing::Granule(index));
                continue;
            };
            let mut left = group;
            while !left.is_empty() {
                let from = bitmaps.bit_of(left.start());
                let (set, count) = granule.run(from, from + u32::try_from(left.count()).expect("inside a granule"));
                let run = left.first(u64::from(count));
                left = left.skip(run.count());
                f(plan, run, set);
            }
        }
    }
}

/// Calls `f(block, part)` for each block of a range.
fn each_block(block_size: BlockSize, range: SectorRange, mut f: impl FnMut(u32, SectorRange)) {
    let mut rest = range;
    while !rest.is_empty() {
        let block = block_size.block_of(rest.start());
        let part = rest.clip(block_size.range_of(block));
        rest = rest.skip(part.count());
        f(block, part);
    }
}
