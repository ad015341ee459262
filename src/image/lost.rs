//! Finds the lost sectors of a disk: those after the point at which the file was cut off (O12).
//!
//! A sector that is not completely before the end of the data is lost if its bit is set, or if its bitmap sector is not
//! completely before the end, either. The rule is the same for roots and children: programs that ignore bits set all of
//! them, so a clear bit never belongs to a written sector. An unclean shutdown may cut a block off in sectors with
//! clear bits only, which loses nothing.
//!
//! A bitmap is read only if its block is the only one that contains the end of the data. If several blocks contain it,
//! they overlap: the image is refused anyway, and all sectors of these blocks after the end count as lost.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::format::bat::BlockPlace;
use crate::format::{Defect, DynamicHeader, PlacedBlocks, bitmap};
use crate::storage::File;
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

/// The blocks of an image that end after the end of the image's data.
pub(super) struct TruncatedBlocks<'a> {
    pub(super) file: &'a File,
    pub(super) header: &'a DynamicHeader,
    pub(super) placed: &'a PlacedBlocks,
    /// The byte at which the data ends.
    pub(super) data_end: u64,
    /// Whether a footer follows the data, so that an unclean shutdown cannot be the cause of the cut.
    pub(super) footer_follows: bool,
    /// All sectors of the disk.
    pub(super) disk: SectorRange,
}

impl TruncatedBlocks<'_> {
    /// Returns the lost ranges of the disk, ascending, neighbours joined. Reports each block that lost sectors, and
    /// each that is cut off although a footer follows.
    ///
    /// # Errors
    /// The error with which `found` breaks; `Io`.
    pub(super) fn lost_ranges(&self, found: &mut dyn FnMut(Defect) -> ControlFlow<Error>) -> Result<Vec<SectorRange>> {
        let (block_size, mut lost) = (self.header.block_size, Vec::new());
        let cut = &self.placed.entries[self.placed.entries.len() - self.placed.truncated..];
        let inside = cut.iter().filter(|(place, _)| place.sector().byte_offset() < self.data_end).count();
        for &(place, block) in cut {
            let range = block_size.sectors_of(block).clip(self.disk);
            let runs = if inside > 1 { vec![self.beyond_end(place, range)] } else { self.lost_runs(place, range)? };
            let sectors = runs.iter().map(|run| run.count()).sum();
            let at = place.sector().byte_offset();
            lost.extend(runs.into_iter().filter(|run| !run.is_empty()));
            let defect = match sectors {
                0 if !self.footer_follows => continue,
                0 => {
                    let end = place.end(block_size).byte_offset();
                    Defect::BlockBeyondEnd { block, entry: place, end, limit: self.data_end }
                }
                _ => Defect::BlockCutOff { block, sectors, at },
            };
            if let ControlFlow::Break(error) = found(defect) {
                return Err(error);
            }
        }
        Ok(merge_ranges(lost))
    }

    /// Returns the sectors of a block whose data is not completely in the file.
    fn beyond_end(&self, place: BlockPlace, range: SectorRange) -> SectorRange {
        let data = place.data(self.header.block_size).byte_offset();
        let there = self.data_end.saturating_sub(data) / SECTOR;
        range.skip(there.min(range.count()))
    }

    /// Returns the runs of lost sectors of a block.
    fn lost_runs(&self, place: BlockPlace, range: SectorRange) -> Result<Vec<SectorRange>> {
        let beyond = self.beyond_end(place, range);
        let at = place.sector().byte_offset();
        // Bitmap sectors that are completely in the file; the bits of the others count as set.
        let held = (self.data_end.saturating_sub(at) / SECTOR).min(self.header.block_size.bitmap_sectors().into());
        if held == 0 {
            return Ok(vec![beyond]);
        }
        let words = self.words(at, held)?;
        let mut rest = beyond;
        let mut runs = Vec::new();
        while !rest.is_empty() {
            let from = self.header.block_size.sector_in_block(rest.start());
            let end = from + u32::try_from(rest.count()).expect("a part of a block");
            let (set, count) = bitmap::run(&words, from, end);
            let run = rest.first(count.into());
            rest = rest.skip(run.count());
            if set {
                runs.push(run);
            }
        }
        Ok(runs)
    }

    fn words(&self, at: u64, held: u64) -> Result<Vec<u64>> {
        let block_size: BlockSize = self.header.block_size;
        let mut bytes = vec![0xFF; block_size.bitmap_sectors() as usize * SECTOR_BYTES];
        let held = usize::try_from(held * SECTOR).expect("a part of a bitmap");
        self.file.read_at(&mut bytes[..held], at)?;
        let mut words = vec![0; bitmap::words(block_size)];
        bitmap::decode(&bytes, &mut words);
        Ok(words)
    }
}

/// Sorts ranges, and joins adjacent and overlapping ones.
pub fn merge_ranges(mut ranges: Vec<SectorRange>) -> Vec<SectorRange> {
    ranges.sort_unstable_by_key(|range| range.start());
    let mut all: Vec<SectorRange> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = SectorRange::between(last.start(), last.end().max(range.end()));
            }
            _ => all.push(range),
        }
    }
    all
}

#[cfg(all(test, feature = "sim"))]
#[path = "lost_tests.rs"]
mod tests;
