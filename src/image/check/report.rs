//! The result of checking one image.

use std::collections::BTreeMap;

use crate::format::bat::BlockPlace;
use crate::format::{Defect, Severity};
use crate::units::{BlockIndex, SectorRange};

/// Blocks of a child that may mask data of the parent: all their sectors on the disk are present, although a writer of
/// children marks only written sectors. If the image's creator aligns blocks, only blocks that are not aligned to a
/// page are suspects.
#[derive(Clone, Debug)]
pub struct Suspects {
    /// Whether the alignment of the blocks proves that a program other than the image's creator placed them.
    pub placed_by_another: bool,
    /// The blocks and their places, in file order, at most 4096.
    pub blocks: Vec<(BlockIndex, BlockPlace)>,
}

/// Maximum number of listed defects of one kind: a corrupt table may have millions of wrong entries.
const MAX_LISTED: u64 = 1000;

/// The defects, suspect blocks and lost sectors that a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// The violations found, at most a thousand of each kind.
    pub defects: Vec<Defect>,
    /// Blocks that may mask data of the parent; `None` if there are none.
    pub suspects: Option<Suspects>,
    /// The ranges of the disk that are lost, ascending.
    pub lost: Vec<SectorRange>,
    kinds: BTreeMap<&'static str, u64>,
    unlisted: BTreeMap<Severity, u64>,
}

impl Report {
    /// Counts the defects of a severity, listed or not.
    pub fn count(&self, severity: Severity) -> usize {
        let listed = self.defects.iter().filter(|d| d.severity() == severity).count();
        listed + usize::try_from(self.unlisted(severity)).unwrap_or(usize::MAX)
    }

    /// Counts the defects of a severity that are not listed.
    pub fn unlisted(&self, severity: Severity) -> u64 {
        self.unlisted.get(&severity).copied().unwrap_or(0)
    }

    pub(super) fn add(&mut self, defect: Defect) {
        let kind = self.kinds.entry(defect.kind()).or_default();
        *kind += 1;
        if *kind <= MAX_LISTED {
            self.defects.push(defect);
        } else {
            *self.unlisted.entry(defect.severity()).or_default() += 1;
        }
    }
}
