//! Checks that metadata lies inside the file and does not overlap (O6, O9 to O11, O15). Blocks are checked in
//! `entries`.
//!
//! The checks use only numbers from the footer, the dynamic header and the batmap header. Metadata may lie between
//! blocks (Xen Orchestra puts locators where a block was), so each piece of metadata is recorded as an extent of its
//! own.

use std::ops::Range;

use crate::format::bat;
use crate::format::batmap::BatmapHeader;
use crate::format::defect::Defect;
use crate::format::footer::{FOOTER_BYTES, Footer};
use crate::format::header::{DynamicHeader, HEADER_BYTES};
use crate::format::metadata_part::MetadataPart;
use crate::units::SECTOR;

/// Maximum size of the BAT of an image, in bytes (O9).
pub const MAX_TABLE_BYTES: u64 = 16 << 20;

/// The bytes of a file that one piece of metadata takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetadataExtent {
    /// The kind of metadata.
    pub part: MetadataPart,
    /// The byte range in the file.
    pub range: Range<u64>,
}

/// Checks that the dynamic header can be at the offset in the footer, in a file of `len` bytes (O6).
///
/// # Errors
/// [`Defect::HeaderPlace`].
pub fn check_header_place(footer: &Footer, len: u64) -> Result<(), Defect> {
    let offset = footer.data_offset;
    let inside = offset.checked_add(HEADER_BYTES).is_some_and(|end| end <= len);
    if offset >= FOOTER_BYTES && offset.is_multiple_of(SECTOR) && inside {
        return Ok(());
    }
    Err(Defect::HeaderPlace { offset, len })
}

/// Checks the size and the position of the BAT (O9, O10). Returns the byte range of the BAT, in whole sectors.
///
/// # Errors
/// The defect of the first broken rule:
/// - [`Defect::TableTooSmall`]
/// - [`Defect::TableTooLarge`]
/// - [`Defect::TableUnaligned`]
/// - [`Defect::TableOutside`]
/// - [`Defect::TableOverlaps`]
pub fn check_table(footer: &Footer, header: &DynamicHeader, len: u64) -> Result<Range<u64>, Defect> {
    let at = footer.data_offset;
    let blocks = header.block_size.blocks_for(footer.sectors());
    if u64::from(header.entries) < blocks {
        return Err(Defect::TableTooSmall { at, entries: header.entries, blocks });
    }
    let limit = MAX_TABLE_BYTES / 4;
    // The limit applies to all entries: all are read, also those after the blocks of the disk.
    let entries = u64::from(header.entries);
    if entries > limit {
        return Err(Defect::TableTooLarge { at, entries, limit });
    }
    let (offset, bytes) = (header.table_offset, bat::bytes(header.entries));
    if !offset.is_multiple_of(SECTOR) {
        return Err(Defect::TableUnaligned { at, offset });
    }
    let end = offset.checked_add(bytes).filter(|&end| end <= len);
    let end = end.ok_or(Defect::TableOutside { at, offset, bytes, len })?;
    let range = offset..end;
    if offset < FOOTER_BYTES {
        return Err(Defect::TableOverlaps { at, offset, bytes, part: MetadataPart::FrontFooter });
    }
    if overlap(&range, &(at..at.saturating_add(HEADER_BYTES))) {
        return Err(Defect::TableOverlaps { at, offset, bytes, part: MetadataPart::Header });
    }
    Ok(range)
}

/// The metadata of an open dynamic or differencing image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetadataMap {
    extents: Vec<MetadataExtent>,
    /// Space that the `space` fields of locators reserve for longer texts.
    locator_space: Vec<Range<u64>>,
}

impl MetadataMap {
    /// Collects the extents of a file of `len` bytes that has passed [`check_header_place`] and [`check_table`].
    /// `batmap` is the decoded batmap header, if there is one. Damaged metadata that reading does not need is left out
    /// and returned as defects.
    pub fn new(
        footer: &Footer,
        header: &DynamicHeader,
        batmap: Option<&BatmapHeader>,
        len: u64,
    ) -> (MetadataMap, Vec<Defect>) {
        let (mut extents, mut locator_space, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        let mut add = |part, range: Range<u64>| extents.push(MetadataExtent { part, range });
        let table = header.table_offset..header.table_offset.saturating_add(bat::bytes(header.entries));
        let front = 0..FOOTER_BYTES;
        let own = footer.data_offset..footer.data_offset.saturating_add(HEADER_BYTES);
        add(MetadataPart::FrontFooter, front.clone());
        add(MetadataPart::Header, own.clone());
        add(MetadataPart::Table, table.clone());
        if let Some(batmap) = batmap {
            let at = table.end;
            add(MetadataPart::BatmapHeader, at..at.saturating_add(SECTOR));
            match batmap.region(at, len) {
                Ok(region) => add(MetadataPart::Batmap, region),
                Err(defect) => notes.push(defect),
            }
        }
        for (slot, locator) in header.locators.iter().enumerate() {
            match locator.text_range(slot, len) {
                Ok(Some(text)) => {
                    let text = text.start / SECTOR * SECTOR..text.end.next_multiple_of(SECTOR);
                    if [&front, &own, &table].iter().any(|range| overlap(range, &text)) {
                        let (offset, length) = (locator.offset, locator.length);
                        notes.push(Defect::LocatorPlace { slot, offset, length });
                    } else {
                        locator_space.push(text.start..text.start.saturating_add(locator.space_bytes()));
                        add(MetadataPart::Locator(slot), text);
                    }
                }
                Ok(None) => {}
                Err(defect) => notes.push(defect),
            }
        }
        extents.sort_by_key(|extent| extent.range.start);
        (MetadataMap { extents, locator_space }, notes)
    }

    /// Returns the extents, in ascending order.
    pub fn extents(&self) -> &[MetadataExtent] {
        &self.extents
    }

    /// Space that the `space` fields of locators reserve for longer texts. Blocks may still lie there.
    pub fn locator_space(&self) -> &[Range<u64>] {
        &self.locator_space
    }

    /// Returns the first byte after all metadata.
    pub fn end(&self) -> u64 {
        self.extents.iter().map(|extent| extent.range.end).max().unwrap_or(0)
    }

    /// Returns whether a locator passed all rules and may be read.
    pub fn has_locator(&self, slot: usize) -> bool {
        self.extents.iter().any(|extent| extent.part == MetadataPart::Locator(slot))
    }

    /// Returns the kind of the first metadata extent that `range` overlaps, if any.
    pub fn overlapping(&self, range: &Range<u64>) -> Option<MetadataPart> {
        self.extents.iter().find(|extent| overlap(&extent.range, range)).map(|extent| extent.part)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::footer::DiskType;
    use crate::format::locator::{LocatorEntry, Platform};
    use crate::units::BlockSize;
    use uuid::Uuid;

    const LEN: u64 = 64 << 20;

    fn footer(size: u64) -> Footer {
        Footer::new(DiskType::Differencing, size, Uuid::from_u128(1), 0)
    }

    fn header(table: u64, entries: u32) -> DynamicHeader {
        DynamicHeader::new(table, entries, BlockSize::from_bytes(4096).unwrap())
    }

    #[test]
    fn the_header_lies_inside_the_file() {
        let at = |data_offset, len| check_header_place(&Footer { data_offset, ..footer(4096) }, len).is_ok();
        assert!(at(512, 1536) && at(512, 1537) && !at(512, 1535));
        assert!(!at(0, LEN) && !at(511, LEN) && !at(513, LEN) && at(1024, LEN));
        assert!(!at(u64::MAX, LEN) && !at(u64::MAX - 511, LEN) && !at(LEN - 512, LEN) && at(LEN - 1024, LEN));
    }

    #[test]
    fn the_table_at_its_limits() {
        let table = |offset, entries| check_table(&footer(8 * 4096), &header(offset, entries), LEN);
        assert_eq!(table(1536, 8), Ok(1536..2048));
        assert!(table(1536, 9).is_ok());
        assert_eq!(table(1536, 7), Err(Defect::TableTooSmall { at: 512, entries: 7, blocks: 8 }));
        assert_eq!(table(1537, 8), Err(Defect::TableUnaligned { at: 512, offset: 1537 }));
        assert_eq!(
            table(1024, 8),
            Err(Defect::TableOverlaps { at: 512, offset: 1024, bytes: 512, part: MetadataPart::Header })
        );
        assert_eq!(
            table(0, 8),
            Err(Defect::TableOverlaps { at: 512, offset: 0, bytes: 512, part: MetadataPart::FrontFooter })
        );
        assert_eq!(table(LEN - 512, 8), Ok(LEN - 512..LEN));
        assert!(matches!(table(LEN - 512, 129), Err(Defect::TableOutside { bytes: 1024, .. })));
        assert!(matches!(table(LEN, 8), Err(Defect::TableOutside { .. })));
        assert!(matches!(table(u64::MAX - 511, 8), Err(Defect::TableOutside { .. })));
        assert!(
            matches!(table(1536, u32::MAX), Err(Defect::TableTooLarge { .. })),
            "also entries that the disk does not need count"
        );
        // A header after the table, as the format allows.
        let late = Footer { data_offset: 1024, ..footer(4096) };
        assert!(check_table(&late, &header(512, 128), LEN).is_ok());
        assert!(check_table(&late, &header(512, 129), LEN).is_err());
        let most = MAX_TABLE_BYTES / 4;
        let sized = |blocks: u64| {
            let header = header(4096, u32::try_from(blocks).unwrap());
            check_table(&footer(blocks * 4096), &header, u64::MAX)
        };
        assert!(sized(most - 1).is_ok() && sized(most).is_ok());
        assert_eq!(sized(most + 1), Err(Defect::TableTooLarge { at: 512, entries: most + 1, limit: most }));
    }

    fn locator(offset: u64, length: u32) -> LocatorEntry {
        LocatorEntry::new(Platform::W2ru, offset, length)
    }

    #[test]
    fn damaged_locators_are_left_out() {
        let mut h = header(1536, 8);
        h.locators[6] = locator(2048, 600);
        h.locators[1] = locator(1600, 4);
        h.locators[2] = locator(LEN, 4);
        let (m, notes) = MetadataMap::new(&footer(4096), &h, None, LEN);
        let parts: Vec<MetadataPart> = m.extents().iter().map(|e| e.part).collect();
        assert_eq!(
            parts,
            [MetadataPart::FrontFooter, MetadataPart::Header, MetadataPart::Table, MetadataPart::Locator(6)]
        );
        assert_eq!((m.end(), m.has_locator(6), m.has_locator(1)), (3072, true, false));
        assert_eq!(notes.iter().map(Defect::kind).collect::<Vec<_>>(), ["locator-place", "locator-place"]);
    }

    #[test]
    fn a_batmap_takes_space() {
        let tap = Footer { creator: *b"tap\0", creator_version: 0x0001_0003, ..footer(4096) };
        let mut bytes = [0; 512];
        bytes[..28].copy_from_slice(b"tdbatmap\0\0\0\0\0\0\x0a\0\0\0\0\x01\0\x01\0\x02\xff\xff\xff\xff");
        let batmap = BatmapHeader::decode(&bytes).unwrap();
        let (m, notes) = MetadataMap::new(&tap, &header(1536, 8), Some(&batmap), LEN);
        assert_eq!((m.end(), notes.len(), m.extents()[3].part), (0xC00, 0, MetadataPart::BatmapHeader));
        let (m, notes) = MetadataMap::new(&tap, &header(1536, 8), None, LEN);
        assert_eq!((m.end(), notes), (2048, vec![]), "Xen Orchestra writes none");
        let outside = BatmapHeader { offset: LEN, ..batmap };
        assert_eq!(MetadataMap::new(&tap, &header(1536, 8), Some(&outside), LEN).1.len(), 1);
    }
}
