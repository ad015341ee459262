//! Deliberate mistakes of a writable image, which the crash tests must find; only with the feature `mutants`.

use super::writable::Writable;
use crate::format::bat;
use crate::mutant::{self, Mutant};

impl Writable {
    /// Mutant `EagerMetadata`: writes dirty bitmap sectors, and the BAT entries of their blocks, before the data of
    /// these blocks is durable.
    pub(super) fn mutate_metadata(&self) {
        if !mutant::enabled(Mutant::EagerMetadata) {
            return;
        }
        for index in self.dirty().clone() {
            let (block, _, at) = self.bitmap_sector_place(index);
            let _ = self.file().write_at(&self.lock_dirty(index).to_bytes(), at);
            if let Some((at, bytes)) = self.bat_sector(bat::sector_of(block), &[block]) {
                let _ = self.file().write_at(&bytes, at);
            }
        }
    }

    /// Mutant `AllBlocksPlaced`: a commit treats all BAT entries as written, also those that it did not write.
    pub(super) fn mutate_places(&self) {
        if mutant::enabled(Mutant::AllBlocksPlaced) {
            self.free_tail().fresh.clear();
        }
    }
}
