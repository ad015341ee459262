//! Mistakes of a writable image that the tests of crash safety must find; only with the feature `mutants`.

use super::writable::Writable;
use crate::format::bat;
use crate::mutant::{self, Mutant};

impl Writable {
    /// What is dirty goes to the file before its data is durable.
    pub(super) fn mutate_metadata(&self) {
        if !mutant::enabled(Mutant::EagerMetadata) {
            return;
        }
        for granule in self.dirty().clone() {
            let (block, _, at) = self.bitmap_sector_place(granule);
            let _ = self.file().write_at(&self.lock_dirty(granule).to_bytes(), at);
            if let Some((at, bytes)) = self.bat_sector(block / bat::ENTRIES_PER_SECTOR, &[block]) {
                let _ = self.file().write_at(&bytes, at);
            }
        }
    }

    /// A commit counts places that it did not cover as known to the file.
    pub(super) fn mutate_places(&self) {
        if mutant::enabled(Mutant::AllBlocksPlaced) {
            self.free_tail().fresh.clear();
        }
    }
}
