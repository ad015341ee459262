//! Finds the space of a file that no metadata and no block occupies.

use std::ops::Range;

use crate::error::Result;
use crate::format::Defect;
use crate::format::entries::unreferenced;
use crate::format::layout::PAGE;
use crate::image::open::Image;
use crate::storage::next_data;

/// Returns whether the defects leave no doubt about which bytes of the file are in use.
pub(in crate::image) fn are_places_trusted(defects: &[Defect]) -> bool {
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

/// Finds unreferenced space: the gap at the end of the data, and those other gaps in which the file system has
/// allocated a part of a whole page.
pub(in crate::image) fn unreferenced_space(image: &Image) -> Result<Vec<Range<u64>>> {
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

/// Returns the whole pages of a range: the part of it that a punched hole can free.
pub(in crate::image) fn whole_pages(range: &Range<u64>) -> Range<u64> {
    range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE
}
