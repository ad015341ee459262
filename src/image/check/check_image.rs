//! Checks one image: examines it as an open does, but past the first defect, and applies the rules that an open skips.
//!
//! Every reported defect is a fact about the bytes of this file. Whether a block masks data of the parent can be
//! decided only by comparing it with the parent (`chain`); [`Report::suspects`] lists the blocks to compare.

use std::ops::ControlFlow;

use super::check_blocks::{self, OnPosition};
use super::report::Report;
use super::space::{are_places_trusted, unreferenced_space};
use crate::error::{Error, Result};
use crate::format::{Defect, DiskType};
use crate::image::open::Image;
use crate::storage::File;
use crate::units::OnProgress;

/// Checks a file against every rule. Returns the report, and the image if it can be opened at all.
///
/// # Errors
/// `Io` if the file cannot be read. If a defect was found before, and the read that failed is part of the open, the
/// result is the report without an image. Violations are not errors; the report lists them.
pub fn check(file: File) -> Result<(Report, Option<Image>)> {
    check_with_progress(file, &mut |_| Ok(()))
}

/// Checks a file as [`check`] does, and reports progress in bytes of the file to `watch`; the sum is the file's length.
///
/// # Errors
/// - `Io`, for the reasons listed at [`check`].
/// - the error that `watch` returns.
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

/// Applies the rules that an open skips.
fn check_after_open(image: &Image, report: &mut Report, come_to: &mut OnPosition<'_>) -> Result<()> {
    // Only the image's own bytes count: no parent is opened. If the footers disagree on the disk type, the image may
    // have no parent.
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
