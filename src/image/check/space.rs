//! Space of a file that nothing refers to.

use std::ops::Range;

use crate::error::Result;
use crate::format::Defect;
use crate::format::entries::unreferenced;
use crate::format::layout::PAGE;
use crate::image::open::Image;
use crate::storage::next_data;

/// Whether it is sure which bytes of the file somebody refers to.
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

/// The space that nothing refers to: before the footer, and between blocks where it takes room on the host.
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

/// The whole pages of a range: what can be given back of it.
pub(in crate::image) fn whole_pages(range: &Range<u64>) -> Range<u64> {
    range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE
}
