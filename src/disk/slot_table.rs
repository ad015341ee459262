//! The file slots that a disk uses.

use std::collections::BTreeSet;

use crate::storage::{FILE_SLOTS, FileSlot};

/// The file slots in use by any version of a disk.
#[derive(Debug, Default)]
pub(super) struct SlotTable {
    used: BTreeSet<FileSlot>,
    /// Slots that the current version does not use, but operations of older versions may. With each slot: the oldest
    /// version that does not use it.
    retired: Vec<(FileSlot, u32)>,
}

impl SlotTable {
    pub(super) fn new(used: impl Iterator<Item = FileSlot>) -> SlotTable {
        SlotTable { used: used.collect(), retired: Vec::new() }
    }

    /// Takes the lowest free slot; `None` if all are in use.
    pub(super) fn take(&mut self) -> Option<FileSlot> {
        let free = (0..FILE_SLOTS).map(FileSlot).find(|slot| !self.used.contains(slot))?;
        self.used.insert(free);
        Some(free)
    }

    /// Frees a slot.
    pub(super) fn free(&mut self, slot: FileSlot) {
        assert!(self.used.remove(&slot), "only a slot in use is freed");
    }

    /// Records that no version from `epoch` on uses a slot.
    pub(super) fn retire(&mut self, slot: FileSlot, epoch: u32) {
        self.retired.push((slot, epoch));
    }

    /// Removes and returns the retired slots that no operation uses: all operations in flight are of version `oldest`
    /// or later. The caller has to free these slots.
    pub(super) fn take_unused(&mut self, oldest: u32) -> Vec<FileSlot> {
        self.retired.extract_if(.., |(_, epoch)| *epoch <= oldest).map(|(slot, _)| slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retired_slot_is_not_used_again_while_an_older_version_is_in_use() {
        let mut slots = SlotTable::new([0, 1, 3].map(FileSlot).into_iter());
        assert_eq!([slots.take(), slots.take()], [Some(FileSlot(2)), Some(FileSlot(4))]);
        slots.retire(FileSlot(3), 7);
        assert_eq!(slots.take_unused(6), []);
        assert_eq!(slots.take(), Some(FileSlot(5)));
        assert_eq!(slots.take_unused(7), [FileSlot(3)]);
        assert_eq!(slots.take_unused(7), []);
        slots.free(FileSlot(3));
        assert_eq!(slots.take(), Some(FileSlot(3)));
        let rest = std::iter::from_fn(|| slots.take()).count();
        assert_eq!(rest, usize::from(FILE_SLOTS) - 6);
    }
}
