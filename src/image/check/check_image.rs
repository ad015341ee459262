//! Checking: the walk of an open that goes on where an open stops, and what only a check looks at.
//!
//! What is found is a fact about the bytes of this file. Whether a block hides data of the parent can be told only beside
//! the parent (`chain`); [`Report::suspects`] are the blocks to look at.

use std::ops::ControlFlow;

use super::check_blocks::{self, OnPosition};
use super::report::Report;
use super::space::{are_places_trusted, unreferenced_space};
use crate::error::{Error, Result};
use crate::format::{Defect, DiskType};
use crate::image::open::Image;
use crate::storage::File;
use crate::units::OnProgress;

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

#[cfg(all(test, feature = "sim"))]
#[path = "check_image_tests.rs"]
pub(super) mod tests;
