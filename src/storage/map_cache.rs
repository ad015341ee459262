//! The regions of files that a ring copied from last: found by one look, where the way through the tables of 64 files is a miss
//! at each step (reads of a chain of 64 over those of a chain of 1: 0.93 without, 0.98 with).

use std::sync::Arc;

use super::host::MapRegion;
use super::op::FileSlot;

/// Regions that are remembered: 2 KiB. One that is not here is looked up in its file.
const COUNT: usize = 128;

/// Regions by slot and number, each in its one place.
pub(super) struct MapCache(Box<[Option<Entry>]>);

struct Entry {
    slot: FileSlot,
    index: u16,
    region: Arc<MapRegion>,
}

impl MapCache {
    pub(super) fn new() -> MapCache {
        MapCache((0..COUNT).map(|_| None).collect())
    }

    /// Region `index` of the file that has the slot.
    #[inline]
    pub(super) fn get(&self, slot: FileSlot, index: usize) -> Option<&MapRegion> {
        let entry = self.0[place(slot, index)].as_ref()?;
        (entry.slot == slot && usize::from(entry.index) == index).then_some(&*entry.region)
    }

    /// Remembers a region, in the place of another.
    pub(super) fn insert(&mut self, slot: FileSlot, index: usize, region: &Arc<MapRegion>) {
        if let Ok(number) = u16::try_from(index) {
            self.0[place(slot, index)] = Some(Entry { slot, index: number, region: region.clone() });
        }
    }

    /// The slot gets another file, or none.
    pub(super) fn invalidate(&mut self, slot: FileSlot) {
        self.0
            .iter_mut()
            .filter(|entry| entry.as_ref().is_some_and(|e| e.slot == slot))
            .for_each(|entry| *entry = None);
    }
}

/// The regions of a file, and the first regions of the files of a chain, lie side by side.
#[inline]
fn place(slot: FileSlot, index: usize) -> usize {
    (usize::from(slot.0) + index * 29) % COUNT
}
