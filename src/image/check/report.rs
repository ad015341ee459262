//! What a check finds in one image.

use std::collections::BTreeMap;

use crate::format::{Defect, Severity};
use crate::units::SectorRange;

/// Blocks of a child that are marked whole, though its writers mark what is written and no more.
#[derive(Clone, Debug)]
pub struct Suspects {
    /// Whether another program than the image's own writer placed them: then they are no guess.
    pub placed_by_another: bool,
    /// The blocks and their places, in the order of the file.
    pub blocks: Vec<(u32, u32)>,
}

/// Defects of a kind that are listed; of a table of millions of wrong entries more would help nobody.
const MAX_LISTED: u64 = 1000;

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// Each broken rule; of one kind at most a thousand.
    pub defects: Vec<Defect>,
    /// Blocks that may hide data of the parent.
    pub suspects: Option<Suspects>,
    /// The ranges of the disk that are lost, ascending.
    pub lost: Vec<SectorRange>,
    kinds: BTreeMap<&'static str, u64>,
    unlisted: BTreeMap<Severity, u64>,
}

impl Report {
    /// Defects of a severity, listed or not.
    pub fn count(&self, severity: Severity) -> usize {
        let listed = self.defects.iter().filter(|d| d.severity() == severity).count();
        listed + usize::try_from(self.unlisted(severity)).unwrap_or(usize::MAX)
    }

    /// Defects of a severity that are not listed.
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
