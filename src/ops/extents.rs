//! The extents of a chain, in order, past the ranges for which no layer has a block.

use crate::chain::{Extent, Layer, PlanBuffer, Source, Version};
use crate::error::Result;
use crate::storage::{File, FileSlot};
use crate::units::{SECTOR, SectorRange};

/// Sectors planned at once: 64 MiB.
pub(super) const WINDOW_SECTORS: u64 = 1 << 17;

/// The extents of a chain from its first sector to its last, without gaps.
pub(super) struct Extents<'a> {
    version: &'a Version,
    at: u64,
    /// Per layer: the first sector at or after `at`, when it was last asked, that the layer has a place for.
    next_allocated: Vec<u64>,
    plan: PlanBuffer,
    next: usize,
    /// What is read on the way is forgotten.
    uncached: bool,
}

impl<'a> Extents<'a> {
    pub(super) fn new(version: &'a Version) -> Extents<'a> {
        Extents::from(version, 0)
    }

    /// As [`Extents::new`], from sector `at` on.
    pub(super) fn from(version: &'a Version, at: u64) -> Extents<'a> {
        let placed = version.frozen().layers().iter().map(|layer| next_allocated(layer, at)).collect();
        Extents { version, at, next_allocated: placed, plan: PlanBuffer::default(), next: 0, uncached: false }
    }

    /// For who asks nothing else of the version: what is read on the way is forgotten.
    pub(super) fn uncached(self) -> Extents<'a> {
        Extents { uncached: true, ..self }
    }

    /// Returns the file of a slot that an extent names.
    pub(super) fn file(&self, slot: FileSlot) -> &'a File {
        self.version.file(slot)
    }

    pub(super) fn next(&mut self) -> Result<Option<Extent>> {
        loop {
            if let Some(extent) = self.plan.extents.get(self.next) {
                self.next += 1;
                return Ok(Some(*extent));
            }
            let (from, sectors) = (self.at, self.version.sectors());
            if from >= sectors {
                return Ok(None);
            }
            self.at = self.first_allocated(from).min(sectors);
            if self.at > from {
                return Ok(Some(Extent { range: SectorRange::between(from, self.at), source: Source::Zero }));
            }
            self.at = (from + WINDOW_SECTORS).min(sectors);
            let window = SectorRange::between(from, self.at);
            match self.uncached {
                true => self.version.plan_read_uncached(window, &mut self.plan)?,
                false => self.version.plan_read_now(window, &mut self.plan)?,
            }
            self.next = 0;
        }
    }

    /// The first sector at or after `from` that any layer has a place for. Each table is passed once in all.
    fn first_allocated(&mut self, from: u64) -> u64 {
        for (placed, layer) in self.next_allocated.iter_mut().zip(self.version.frozen().layers()) {
            if *placed < from {
                *placed = next_allocated(layer, from);
            }
        }
        self.next_allocated.iter().copied().min().unwrap_or(u64::MAX).max(from)
    }
}

/// The first sector at or after `from` that a layer has a place for; the largest number where there is none.
pub(super) fn next_allocated(layer: &Layer, from: u64) -> u64 {
    if from >= layer.image.size() / SECTOR {
        return u64::MAX;
    }
    let (Some(table), Some(block_size)) = (layer.image.bat(), layer.image.block_size()) else { return from };
    let block = table.next_used(block_size.block_at(from));
    block.map_or(u64::MAX, |block| block_size.sectors_of(block).start().max(from))
}
