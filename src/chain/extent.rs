//! Extents: runs of sectors that have one source each.

use crate::storage::FileSlot;
use crate::units::SectorRange;

/// The location of the bytes of a run of sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// In no file: the sectors read as zeros.
    Zero,
    /// In a file.
    File {
        /// The file of the chain.
        slot: FileSlot,
        /// Byte offset of the first sector of the run.
        offset: u64,
    },
}

impl Source {
    /// The source of the same run without its first `sectors`.
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
    /// The location from which its bytes are read, or to which they are written.
    pub source: Source,
}

impl Extent {
    /// Joins two extents if `next` follows this one both on the disk and in the source.
    #[inline]
    pub fn try_join(self, next: Extent) -> Option<Extent> {
        let adjoins =
            self.range.end() == next.range.start() && self.source.advanced_by(self.range.count()) == next.source;
        adjoins.then(|| Extent { range: SectorRange::between(self.range.start(), next.range.end()), ..self })
    }

    /// Returns the extent without its first `sectors`.
    #[must_use]
    pub fn skip(self, sectors: u64) -> Extent {
        Extent { range: self.range.skip(sectors), source: self.source.advanced_by(sectors) }
    }
}

/// Appends a run to `extents`. Joins the run to the last extent if it follows that extent both on the disk and in the
/// source.
#[inline]
pub(super) fn push(extents: &mut Vec<Extent>, range: SectorRange, source: Source) {
    if range.is_empty() {
        return;
    }
    let next = Extent { range, source };
    if let Some(last) = extents.last_mut()
        && let Some(both) = last.try_join(next)
    {
        *last = both;
        return;
    }
    extents.push(next);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join() {
        let mut extents = Vec::new();
        let file = |offset| Source::File { slot: FileSlot(1), offset };
        push(&mut extents, SectorRange::between(0, 8), file(4096));
        push(&mut extents, SectorRange::between(8, 16), file(8192));
        push(&mut extents, SectorRange::between(16, 17), file(8192));
        push(&mut extents, SectorRange::between(17, 18), Source::Zero);
        push(&mut extents, SectorRange::between(18, 18), file(1));
        push(&mut extents, SectorRange::between(18, 20), Source::Zero);
        let got: Vec<_> = extents.iter().map(|e| (e.range.start(), e.range.end(), e.source)).collect();
        assert_eq!(got, [(0, 16, file(4096)), (16, 17, file(8192)), (17, 20, Source::Zero)]);
    }
}
