//! Plans: a range of the disk as runs of sectors that have one source each.

use super::frozen_cache::CacheHandle;
use crate::storage::FileSlot;
use crate::units::SectorRange;

/// Where the bytes of a run are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nowhere: they read as zeros.
    Zero,
    /// In a file.
    File {
        /// Which file of the chain.
        slot: FileSlot,
        /// Byte offset of the run's first sector.
        offset: u64,
    },
}

impl Source {
    /// The source of what follows `sectors` further on in the same run.
    #[must_use]
    pub fn advanced_by(self, sectors: u64) -> Source {
        match self {
            Source::Zero => Source::Zero,
            Source::File { slot, offset } => Source::File { slot, offset: offset + sectors * crate::units::SECTOR },
        }
    }
}

/// A run of virtual sectors with one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The run.
    pub range: SectorRange,
    /// Where its bytes are, or go.
    pub source: Source,
}

impl Extent {
    /// Both as one, where `next` begins where this ends, in both worlds.
    #[inline]
    pub fn try_join(self, next: Extent) -> Option<Extent> {
        let adjoins =
            self.range.end() == next.range.start() && self.source.advanced_by(self.range.count()) == next.source;
        adjoins.then(|| Extent { range: SectorRange::between(self.range.start(), next.range.end()), ..self })
    }

    /// What is left after its first `sectors`.
    #[must_use]
    pub fn skip(self, sectors: u64) -> Extent {
        Extent { range: self.range.skip(sectors), source: self.source.advanced_by(sectors) }
    }
}

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
/// One is kept by each queue and used again and again, so that planning allocates nothing once it is warm.
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
        if range.is_empty() {
            return;
        }
        let next = Extent { range, source };
        if let Some(last) = self.extents.last_mut()
            && let Some(both) = last.try_join(next)
        {
            *last = both;
            return;
        }
        self.extents.push(next);
    }

    /// Notes something to load; what was noted lately, once. (A range may miss more than can be compared, and what is loaded
    /// twice does no harm.)
    pub fn add_missing(&mut self, what: Missing) {
        if !self.missing.iter().rev().take(DEDUPLICATED).any(|known| *known == what) {
            self.missing.push(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join() {
        let mut plan = PlanBuffer::default();
        let file = |offset| Source::File { slot: FileSlot(1), offset };
        plan.push(SectorRange::between(0, 8), file(4096));
        plan.push(SectorRange::between(8, 16), file(8192));
        plan.push(SectorRange::between(16, 17), file(8192));
        plan.push(SectorRange::between(17, 18), Source::Zero);
        plan.push(SectorRange::between(18, 18), file(1));
        plan.push(SectorRange::between(18, 20), Source::Zero);
        let got: Vec<_> = plan.extents.iter().map(|e| (e.range.start(), e.range.end(), e.source)).collect();
        assert_eq!(got, [(0, 16, file(4096)), (16, 17, file(8192)), (17, 20, Source::Zero)]);
    }
}
