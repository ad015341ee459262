//! Checking: the walk of an open that goes on where an open stops, and what only a check looks at.
//!
//! What is found is a fact about the bytes of this file. Whether a block hides data of the parent can be told only beside
//! the parent (`chain`); [`Report::suspects`] are the blocks to look at.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use super::check_blocks::{self, OnPosition, Suspects};
use super::compact::OnProgress;
use super::holes::next_data;
use super::open::Image;
use crate::error::{Error, Result};
use crate::format::entries::unreferenced;
use crate::format::layout::PAGE;
use crate::format::{Defect, DiskType, Severity};
use crate::storage::File;
use crate::units::SectorRange;

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

/// Holds a file against every rule. The image comes back where it can be opened at all.
///
/// # Errors
/// `Io`: the file could not be read; broken rules are in the report.
pub fn check(file: File) -> Result<(Report, Option<Image>)> {
    check_with_progress(file, &mut |_| Ok(()))
}

/// As [`check`]; `watch` is told of the file's bytes as they are passed, all of them in the end.
///
/// # Errors
/// As for [`check`]; what `watch` fails with.
pub fn check_with_progress(file: File, watch: &mut OnProgress<'_>) -> Result<(Report, Option<Image>)> {
    let (mut report, mut passed) = (Report::default(), 0);
    let len = file.stat()?.len;
    let mut come_to = |at: u64| {
        let more = at.min(len).saturating_sub(passed);
        passed += more;
        watch(more)
    };
    let examined = Image::examine(file, &mut |defect| {
        report.add(defect);
        ControlFlow::<Error>::Continue(())
    });
    let image = match examined {
        Ok(image) => {
            report.lost = image.lost().to_vec();
            check_after_open(&image, &mut report, &mut come_to)?;
            Some(image)
        }
        Err(_) if !report.defects.is_empty() => None,
        Err(e) => return Err(e),
    };
    come_to(len)?;
    Ok((report, image))
}

/// What opening does not need to know.
fn check_after_open(image: &Image, report: &mut Report, come_to: &mut OnPosition<'_>) -> Result<()> {
    // Its own bytes decide that: no parent is looked for. Of two kinds of disk it may not be the one that has a parent.
    let child = image.kind() == DiskType::Differencing
        && !report.defects.iter().any(|defect| matches!(defect, Defect::FooterKindsDiffer { .. }));
    if let Some(header) = image.header().filter(|_| child) {
        if header.parent_is_raw() {
            report.add(Defect::ParentRaw);
        } else {
            let recorded = image.recorded_parent()?;
            if recorded.paths.is_empty() && recorded.names.is_empty() {
                report.add(Defect::ParentUnnamed);
            }
        }
    }
    if are_places_trusted(&report.defects) {
        for gap in unreferenced_space(image)? {
            report.add(Defect::SpaceUnreferenced { offset: gap.start, bytes: gap.end - gap.start });
        }
        check_blocks::check_blocks(image, report, come_to)?;
    }
    Ok(())
}

/// Whether it is sure which bytes of the file somebody refers to.
pub(super) fn are_places_trusted(defects: &[Defect]) -> bool {
    !defects.iter().any(|defect| {
        matches!(
            defect,
            Defect::FootersDiffer { .. }
                | Defect::FooterKindsDiffer { .. }
                | Defect::BlockCutOff { .. }
                | Defect::BlockInMetadata { .. }
                | Defect::BlockBeyondEnd { .. }
                | Defect::BlockDuplicate { .. }
                | Defect::BlockOverlap { .. }
                | Defect::BatmapHeader { .. }
                | Defect::BatmapPlace { .. }
                | Defect::LocatorPlatform { .. }
                | Defect::LocatorLength { .. }
                | Defect::LocatorPlace { .. }
        )
    })
}

/// The space that nothing refers to: before the footer, and between blocks where it takes room on the host.
pub(super) fn unreferenced_space(image: &Image) -> Result<Vec<Range<u64>>> {
    let (Some(sparse), end) = (image.sparse(), image.data_end()) else { return Ok(Vec::new()) };
    let mut free = unreferenced(&sparse.metadata, &sparse.placed, sparse.header.block_size, end);
    let mut kept = Vec::new();
    for gap in free.drain(..) {
        if gap.end == end || next_data(image.file(), whole_pages(&gap))?.is_some() {
            kept.push(gap);
        }
    }
    Ok(kept)
}

/// The whole pages of a range: what can be given back of it.
pub(super) fn whole_pages(range: &Range<u64>) -> Range<u64> {
    range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE
}

#[cfg(all(test, feature = "sim"))]
#[path = "check_tests.rs"]
pub(super) mod tests;
