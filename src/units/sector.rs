//! Ranges of sectors of the disk, and sectors of a file.

use std::fmt;
use std::ops::{Add, Sub};

use super::SECTOR;

/// A range of virtual sectors: `start .. start + count`. The end of the range in bytes fits in 64 bits; `new` checks
/// this.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SectorRange {
    pub(super) start: u64,
    pub(super) count: u64,
}

impl SectorRange {
    /// Creates the range of `count` sectors from `start`; `None` if the end of the range in bytes does not fit in 64
    /// bits.
    pub fn new(start: u64, count: u64) -> Option<SectorRange> {
        start.checked_add(count)?.checked_mul(SECTOR)?;
        Some(SectorRange { start, count })
    }

    /// Creates the range from `start` up to, not including, `end`; empty if `end <= start`. Does not check that the end
    /// in bytes fits in 64 bits.
    pub fn between(start: u64, end: u64) -> SectorRange {
        SectorRange { start, count: end.saturating_sub(start) }
    }

    /// Returns the first sector.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Returns the number of sectors.
    pub fn count(self) -> u64 {
        self.count
    }

    /// Returns the first sector after the range.
    pub fn end(self) -> u64 {
        self.start + self.count
    }

    /// Returns whether the range is empty.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Returns the length in bytes.
    pub fn bytes(self) -> u64 {
        self.count * SECTOR
    }

    /// Returns the intersection with `other`; if there is none, an empty range at the start of `self`.
    pub fn clip(self, other: SectorRange) -> SectorRange {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        if start >= end { SectorRange { start: self.start, count: 0 } } else { SectorRange::between(start, end) }
    }

    /// Returns the first `count` sectors, or all if there are fewer.
    pub fn first(self, count: u64) -> SectorRange {
        SectorRange { start: self.start, count: self.count.min(count) }
    }

    /// Returns the range without its first `count` sectors.
    pub fn skip(self, count: u64) -> SectorRange {
        let n = self.count.min(count);
        SectorRange { start: self.start + n, count: self.count - n }
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}..{}", self.start, self.end())
    }
}

/// A sector of a file, as opposed to a sector of the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct FileSector(u64);

impl FileSector {
    /// Creates the sector with this number.
    #[inline]
    pub const fn new(number: u64) -> FileSector {
        FileSector(number)
    }

    /// Returns the sector that contains byte `offset`.
    #[inline]
    pub const fn containing(offset: u64) -> FileSector {
        FileSector(offset / SECTOR)
    }

    /// Returns the first sector that begins at or after byte `offset`.
    #[inline]
    pub const fn at_or_after(offset: u64) -> FileSector {
        FileSector(offset.div_ceil(SECTOR))
    }

    /// Returns the number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the byte offset at which the sector begins.
    #[inline]
    pub const fn byte_offset(self) -> u64 {
        self.0 * SECTOR
    }

    /// Returns the sector `count` sectors after this one; `None` on overflow.
    #[inline]
    pub fn checked_add(self, count: u64) -> Option<FileSector> {
        self.0.checked_add(count).map(FileSector)
    }
}

impl Add<u64> for FileSector {
    type Output = FileSector;

    /// Returns the sector `count` sectors after this one.
    #[inline]
    fn add(self, count: u64) -> FileSector {
        FileSector(self.0 + count)
    }
}

impl Sub<u64> for FileSector {
    type Output = FileSector;

    /// Returns the sector `count` sectors before this one.
    #[inline]
    fn sub(self, count: u64) -> FileSector {
        FileSector(self.0 - count)
    }
}

impl fmt::Display for FileSector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overflow() {
        assert!(SectorRange::new(u64::MAX, 1).is_none());
        assert!(SectorRange::new(1 << 55, 0).is_none());
        let r = SectorRange::new(10, 20).unwrap();
        assert_eq!(r.clip(SectorRange::between(15, 100)), SectorRange::between(15, 30));
        assert!(r.clip(SectorRange::between(30, 100)).is_empty());
        assert_eq!(r.skip(5).first(3), SectorRange::between(15, 18));
        assert!(r.skip(50).is_empty());
    }

    #[test]
    fn sectors_of_a_file_and_bytes() {
        assert_eq!((FileSector::containing(1023), FileSector::containing(1024)), (FileSector(1), FileSector(2)));
        assert_eq!((FileSector::at_or_after(1023), FileSector::at_or_after(1024)), (FileSector(2), FileSector(2)));
        assert_eq!(((FileSector(2) + 3 - 1).byte_offset(), FileSector(u64::MAX).checked_add(1)), (2048, None));
    }
}
