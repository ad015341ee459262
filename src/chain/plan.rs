//! Plans: a range of the disk as extents, or what must be loaded before they are known.

use super::extent::{self, Extent, Source};
use super::frozen_cache::CacheHandle;
use crate::units::SectorRange;

/// What must be read from the files before a range can be planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// A granule of the top's bitmaps.
    BitmapSector(usize),
    /// The bitmaps that decide a cell of the frozen map.
    Cell(usize),
}

impl Missing {
    /// These granules of the top.
    pub fn bitmap_sectors(granules: &[usize]) -> Vec<Missing> {
        granules.iter().copied().map(Missing::BitmapSector).collect()
    }
}

/// The answer to "where is this range": extents in ascending order without gaps, unless something is missing.
///
/// One is kept by each queue and used again and again, so that planning allocates nothing once it is warm. It also holds a
/// handle to the cache of the frozen layers, so that look-ups share no counter between queues.
#[derive(Debug, Default)]
pub struct PlanBuffer {
    /// The runs. For writes where data goes, for zeroing and discarding where the file is punched.
    pub extents: Vec<Extent>,
    /// Ranges to mark when all is done (zeroing only; a write marks its whole range).
    pub marks: Vec<SectorRange>,
    /// What to load before asking again. If there is any, the rest of the plan means nothing.
    pub missing: Vec<Missing>,
    /// Whether a block got a place: room may be short now.
    pub reserved: bool,
    /// Of the last look-up beneath the top.
    pub(super) cache: Option<CacheHandle>,
}

/// Layers of the deepest chain, and some more: what one place of the disk can miss.
const DEDUPLICATED: usize = 128;

impl PlanBuffer {
    /// Forgets everything, keeps the memory.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.marks.clear();
        self.missing.clear();
        self.reserved = false;
    }

    /// Lets go of what look-ups remember of a chain, perhaps the last that keep it in memory. To be called by who may not ask
    /// again soon.
    pub fn release_cache(&mut self) {
        self.cache = None;
    }

    /// Appends a run, joining it to the last where they are neighbours in both worlds.
    #[inline]
    pub fn push(&mut self, range: SectorRange, source: Source) {
        extent::push(&mut self.extents, range, source);
    }

    /// Notes something to load; what was noted lately, once. (A range may miss more than can be compared, and what is loaded
    /// twice does no harm.)
    pub fn add_missing(&mut self, what: Missing) {
        if !self.missing.iter().rev().take(DEDUPLICATED).any(|known| *known == what) {
            self.missing.push(what);
        }
    }
}
