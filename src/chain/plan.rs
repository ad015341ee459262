//! Plans: the extents of a range of the disk, or the bitmaps that must be loaded to find them.

use super::extent::{self, Extent, Source};
use crate::storage::FileSlot;
use crate::units::{BitmapSectorIndex, SectorRange};

/// Bitmaps that must be loaded before a range can be planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// A sector of the bitmaps of the top or the sealed layer, by the slot of the layer.
    BitmapSector(FileSlot, BitmapSectorIndex),
    /// The bitmaps of a cell of the frozen map.
    Cell(usize),
}

impl Missing {
    /// Converts the indices of bitmap sectors of the top in `slot`.
    pub fn bitmap_sectors(slot: FileSlot, indices: &[BitmapSectorIndex]) -> Vec<Missing> {
        indices.iter().map(|index| Missing::BitmapSector(slot, *index)).collect()
    }
}

/// The plan of a range: extents in ascending order, or the bitmaps that are missing. The extents of a read or a write
/// have no gaps.
///
/// Each queue reuses one plan, so that planning allocates nothing once its vectors have grown.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PlanBuffer {
    /// The extents to read or to write; in a plan of zeroing or discarding, the extents to punch.
    pub extents: Vec<Extent>,
    /// Ranges to mark after the operations (only in a plan of zeroing; a write marks its whole range).
    pub marks: Vec<SectorRange>,
    /// Bitmaps to load before the range is planned again. If there are any, the rest of the plan is invalid.
    pub missing: Vec<Missing>,
    /// Whether a block got a place, so that the file may need to grow.
    pub reserved: bool,
}

/// Number of the most recently added bitmaps with which a new one is compared: more than the default maximum number of
/// layers.
const DEDUPLICATED: usize = 128;

impl PlanBuffer {
    /// Empties the plan, but keeps its memory.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.marks.clear();
        self.missing.clear();
        self.reserved = false;
    }

    /// Appends a run. Joins the run to the last extent if it follows that extent both on the disk and in the source.
    #[inline]
    pub fn push(&mut self, range: SectorRange, source: Source) {
        extent::push(&mut self.extents, range, source);
    }

    /// Adds a missing bitmap, unless it is among the most recently added ones. A duplicate is harmless: the bitmap is
    /// then loaded twice.
    pub fn add_missing(&mut self, what: Missing) {
        if !self.missing.iter().rev().take(DEDUPLICATED).any(|other| *other == what) {
            self.missing.push(what);
        }
    }
}
