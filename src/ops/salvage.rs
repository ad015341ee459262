//! `convert --salvage`: reads the remaining sectors of a disk whose files have lost sectors.

use std::path::{Path, PathBuf};

use super::source::SourceDisk;
use crate::chain::{Chain, OpenMode, Policy};
use crate::error::Result;
use crate::image::merge_ranges;
use crate::storage::Env;
use crate::units::{SECTOR, SectorRange};

/// A range of a disk that is lost and reads as zeros.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SalvageLoss {
    /// Offset of the range on the disk, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The file that has lost the range.
    pub file: PathBuf,
}

/// Opens the disk at `path` even if sectors are lost. Returns the disk, and the ranges that a file has lost and no
/// younger file hides: by file from the youngest, and ascending within a file. A lost sector reads as zeros, never as
/// the old data of a parent. Files are opened read-only and are not recovered.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
pub fn open(env: &dyn Env, path: &Path, policy: &Policy) -> Result<(SourceDisk, Vec<SalvageLoss>)> {
    let chain = Chain::open(env, path, policy, OpenMode::Salvage)?;
    let (mut losses, mut hidden) = (Vec::new(), Vec::new());
    let disk = SectorRange::between(0, chain.youngest().size() / SECTOR);
    let mut seen = disk;
    for (depth, image) in chain.images().iter().enumerate() {
        // Sectors after the end of a younger layer are not visible.
        seen = seen.clip(SectorRange::between(0, image.size() / SECTOR));
        if image.lost().is_empty() {
            continue;
        }
        let mut above = hidden.clone();
        chain.changed_ranges(depth, |range| {
            above.push(range);
            Ok(())
        })?;
        let lost: Vec<SectorRange> = image.lost().iter().map(|range| range.clip(seen)).collect();
        for run in subtract(&lost, &merge_ranges(above)) {
            let (start, length) = (run.start() * SECTOR, run.bytes());
            losses.push(SalvageLoss { start, length, file: image.file().path().to_path_buf() });
        }
        hidden.extend(lost);
    }
    Ok((SourceDisk::Chain(chain.into_frozen()), losses))
}

/// Returns the parts of `ranges` that `others` do not cover. Both slices must ascend, and `others` must not overlap or
/// touch each other.
fn subtract(ranges: &[SectorRange], others: &[SectorRange]) -> Vec<SectorRange> {
    let (mut left, mut next) = (Vec::new(), 0);
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        while others.get(next).is_some_and(|other| other.end() <= range.start()) {
            next += 1;
        }
        let mut at = range.start();
        for other in others[next..].iter().take_while(|other| other.start() < range.end()) {
            if other.start() > at {
                left.push(SectorRange::between(at, other.start()));
            }
            at = other.end();
        }
        if at < range.end() {
            left.push(SectorRange::between(at, range.end()));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtract_removes_covered_parts() {
        let ranges = |pairs: &[(u64, u64)]| pairs.iter().map(|(a, b)| SectorRange::between(*a, *b)).collect::<Vec<_>>();
        let left = |a, b| subtract(&ranges(a), &ranges(b)).iter().map(|r| (r.start(), r.end())).collect::<Vec<_>>();
        assert_eq!(left(&[(0, 10), (20, 30)], &[]), [(0, 10), (20, 30)]);
        assert_eq!(left(&[(0, 10), (20, 30)], &[(2, 4), (9, 21), (29, 99)]), [(0, 2), (4, 9), (21, 29)]);
        assert_eq!(left(&[(5, 6), (6, 7), (8, 8)], &[(0, 100)]), []);
        assert_eq!(left(&[(5, 15), (16, 18)], &[(0, 1), (10, 17)]), [(5, 10), (17, 18)]);
    }
}
