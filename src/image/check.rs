//! Checking: the walk of an open that goes on where an open stops, and what only a check looks at.

use std::ops::ControlFlow;

use super::open::{Image, Sparse};
use crate::error::{Error, Result};
use crate::format::entries::unreferenced;
use crate::format::{Defect, Part, Severity};
use crate::storage::File;
use crate::units::SECTOR;

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// Each broken rule.
    pub defects: Vec<Defect>,
}

impl Report {
    /// Defects of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.defects.iter().filter(|d| d.severity() == severity).count()
    }
}

/// Holds a file against every rule. The image comes back where it can be opened at all.
///
/// # Errors
/// `Io`: the file could not be read; broken rules are in the report.
pub fn check(file: File) -> Result<(Report, Option<Image>)> {
    let mut report = Report::default();
    let examined = Image::examine(file, &mut |defect, _| {
        report.defects.push(defect);
        ControlFlow::<Error>::Continue(())
    });
    match examined {
        Ok(image) => {
            look_closer(&image, &mut report.defects)?;
            Ok((report, Some(image)))
        }
        Err(_) if !report.defects.is_empty() => Ok((report, None)),
        Err(e) => Err(e),
    }
}

/// What opening does not need to know.
fn look_closer(image: &Image, defects: &mut Vec<Defect>) -> Result<()> {
    let footer = image.footer();
    let at = image.data_end();
    if footer.saved_state != 0 {
        defects.push(Defect::SavedState { at });
    }
    if footer.hidden() {
        defects.push(Defect::Hidden { at });
    }
    let Some(sparse) = image.sparse() else { return Ok(()) };
    // Anything can be said of free space only when the blocks' places can be believed.
    if defects.iter().all(|d| d.severity() != Severity::Corruption) {
        let block_size = sparse.header.block_size;
        for gap in unreferenced(&sparse.metadata, &sparse.placed, block_size, image.data_end()) {
            defects.push(Defect::SpaceUnreferenced { offset: gap.start, bytes: gap.end - gap.start });
        }
    }
    check_batmap(image, sparse, defects)
}

/// XenServer's batmap: its checksum, which tapdisk insists on.
fn check_batmap(image: &Image, sparse: &Sparse, defects: &mut Vec<Defect>) -> Result<()> {
    let Some(batmap) = &sparse.batmap else { return Ok(()) };
    let region = sparse.metadata.extents().iter().find(|e| e.part == Part::Batmap);
    let Some(region) = region.map(|e| e.range.clone()) else { return Ok(()) };
    // The region lies in the file, but only so much of it is summed as the disk has blocks.
    let summed = crate::format::BatmapHeader::summed_bytes(image.size()).min(region.end - region.start);
    let mut map = vec![0; usize::try_from(summed.max(SECTOR)).expect("a bit a block")];
    image.file().read_at(&mut map, region.start)?;
    if let Err(defect) = batmap.verify(&map) {
        defects.push(defect);
    }
    Ok(())
}
