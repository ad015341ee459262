//! The extents of a chain in ascending order.
//!
//! If no layer has a block for a range, the block tables show that the range is zero, and no bitmap is read for it. So
//! the cost depends on the number of allocated blocks and not on the size of the disk.

use crate::chain::{Extent, Layer, PlanBuffer, Source, Version};
use crate::error::Result;
use crate::storage::{File, FileSlot};
use crate::units::{SECTOR, SectorRange};

/// Maximum number of sectors that are planned at once: 64 MiB.
pub(super) const WINDOW_SECTORS: u64 = 1 << 17;

/// Iterator over the extents of a version without a top, ascending and without gaps.
pub(super) struct Extents<'a> {
    version: &'a Version,
    /// The first sector that no returned or planned extent covers.
    at: u64,
    /// For each layer the first sector of an allocated block, at or after the sector of the last look-up in the layer.
    next_allocated: Vec<u64>,
    plan: PlanBuffer,
    /// The next extent of `plan` to return.
    next: usize,
    /// Whether bitmap sectors are read without being added to the frozen cache.
    uncached: bool,
}

impl<'a> Extents<'a> {
    /// Creates an iterator that starts at the first sector of the disk.
    pub(super) fn new(version: &'a Version) -> Extents<'a> {
        Extents::from(version, 0)
    }

    /// Creates an iterator that starts at sector `at`.
    pub(super) fn from(version: &'a Version, at: u64) -> Extents<'a> {
        let next_allocated = version.frozen().layers().iter().map(|layer| next_allocated(layer, at)).collect();
        Extents { version, at, next_allocated, plan: PlanBuffer::default(), next: 0, uncached: false }
    }

    /// Converts the iterator to one that adds nothing to the frozen cache, for callers that make no other look-up in
    /// the version. The version must have no top.
    pub(super) fn uncached(self) -> Extents<'a> {
        Extents { uncached: true, ..self }
    }

    /// Returns the file at the slot of an extent.
    pub(super) fn file(&self, slot: FileSlot) -> &'a File {
        self.version.file(slot)
    }

    /// Returns the next extent, or `None` at the end of the disk.
    ///
    /// # Errors
    /// `Io`.
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

    /// Returns the first sector at or after `from` that is in an allocated block of any layer. During an iteration,
    /// each block table is read once in total.
    fn first_allocated(&mut self, from: u64) -> u64 {
        for (next, layer) in self.next_allocated.iter_mut().zip(self.version.frozen().layers()) {
            if *next < from {
                *next = next_allocated(layer, from);
            }
        }
        self.next_allocated.iter().copied().min().unwrap_or(u64::MAX).max(from)
    }
}

/// Returns the first sector at or after `from` that is in an allocated block of the layer, or `u64::MAX` if there is
/// none.
pub(super) fn next_allocated(layer: &Layer, from: u64) -> u64 {
    if from >= layer.image.size() / SECTOR {
        return u64::MAX;
    }
    let (Some(table), Some(block_size)) = (layer.image.bat(), layer.image.block_size()) else { return from };
    let block = table.next_used(block_size.block_at(from));
    block.map_or(u64::MAX, |block| block_size.sectors_of(block).start().max(from))
}
