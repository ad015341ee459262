//! Every way in which the bytes of an image can be wrong, each with the numbers that offend.
//!
//! One variant a rule. [`Defect::kind`] is the word for programs (`check --json`); the sentences for people, which name the
//! rule's limit and what to do, are in `defect_text`. Rules: crash-safety O1 to O19.

use uuid::Uuid;

use crate::format::extents::Part;

/// How bad a defect is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Nothing is wrong; somebody may want to know.
    Note,
    /// The disk reads as it should; another program may stumble.
    Cosmetic,
    /// Space that nothing refers to.
    Leak,
    /// The disk cannot be trusted, or not be served, until mended.
    Corruption,
}

/// A violated rule. `at` is a byte offset in the file; the decoders, which see bytes without a place, leave it 0 and
/// their callers set it with [`Defect::placed`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the fields are the numbers of the sentence that Display makes of them")]
pub enum Defect {
    /// Not a regular file (O1).
    NotRegular,
    /// Too short for a footer (O2).
    FileTooShort { len: u64 },
    /// No footer at the end, and none at the front that may be used (O3).
    FooterMissing { len: u64 },
    /// These bytes are no footer.
    FooterCookie { at: u64 },
    /// The footer of an interrupted `vhd-util resize`.
    Poisoned { at: u64 },
    /// The footer's checksum does not fit its bytes (O4).
    FooterChecksum { at: u64, stored: u32, computed: u32 },
    /// Another major version of the format (O4).
    FooterVersion { at: u64, version: u32 },
    /// A disk type that nobody serves (O4).
    DiskType { at: u64, code: u32 },
    /// An impossible virtual size (O5).
    DiskSize { at: u64, size: u64 },
    /// A fixed disk with less data than its size (O2).
    FixedTooShort { size: u64, data: u64 },
    /// Both footers are valid and contradict each other (O3).
    FootersDiffer { at: u64, field: &'static str },
    /// Both footers are valid and differ in a byte without consequence.
    FooterCopyStale,
    /// A dynamic disk without a footer at its end (O3).
    TrailingFooterMissing { len: u64 },
    /// A dynamic disk with a damaged footer at its end (O3).
    TrailingFooterInvalid { at: u64, reason: Box<Defect> },
    /// A dynamic disk whose front footer is damaged (O3).
    FrontFooterInvalid { reason: Box<Defect> },
    /// A footer of 511 bytes, as written before 2004.
    ShortFooter { at: u64 },
    /// The dynamic header cannot be where the footer says (O6).
    HeaderPlace { offset: u64, len: u64 },
    /// These bytes are no dynamic header (O7).
    HeaderCookie { at: u64 },
    /// The dynamic header's checksum does not fit its bytes (O7).
    HeaderChecksum { at: u64, stored: u32, computed: u32 },
    /// Another version of the dynamic header (O7).
    HeaderVersion { at: u64, version: u32 },
    /// A block size outside the rules (O8).
    BlockSize { at: u64, size: u32 },
    /// Fewer BAT entries than the disk has blocks (O9).
    TableTooSmall { at: u64, entries: u32, blocks: u64 },
    /// More BAT than is read into memory (O9).
    TableTooLarge { at: u64, entries: u64, limit: u64 },
    /// The BAT does not begin at a sector (O10).
    TableUnaligned { at: u64, offset: u64 },
    /// The BAT lies outside the file (O10).
    TableOutside { at: u64, offset: u64, bytes: u64, len: u64 },
    /// The BAT lies over the front footer or the header (O10).
    TableOverlaps { at: u64, offset: u64, bytes: u64, part: Part },
    /// A block lies over metadata (O12).
    BlockInMetadata { block: u32, entry: u32, part: Part },
    /// A block ends behind the end of the data (O12).
    BlockBeyondEnd { block: u32, entry: u32, end: u64, limit: u64 },
    /// Two blocks name the same place (O13).
    BlockDuplicate { block: u32, other: u32, entry: u32 },
    /// Two blocks overlap (O13).
    BlockOverlap { block: u32, entry: u32, other: u32, other_entry: u32 },
    /// A place is recorded for a block behind the end of the disk.
    BlockBeyondDisk { block: u32, entry: u32, blocks: u64 },
    /// Sectors that the bitmap calls present lie behind the end of the file.
    BlockCutOff { block: u32, sectors: u64, at: u64 },
    /// The bitmap of the last block, which is not whole, calls sectors behind the end of the disk present.
    BitsBeyondDisk { block: u32, bits: u32, at: u64 },
    /// No place below 2 TiB is left for a block (O14).
    NoPlace { end: u64 },
    /// Space that no block and no metadata uses.
    SpaceUnreferenced { offset: u64, bytes: u64 },
    /// A sector that the bitmap calls absent holds data.
    DataUnderClearBit { block: u32, sector: u64, at: u64 },
    /// A locator of an unknown platform (O11).
    LocatorPlatform { slot: usize, code: u32 },
    /// A locator longer than any path (O11).
    LocatorLength { slot: usize, length: u32 },
    /// A locator whose text lies outside the file or over other metadata (O11).
    LocatorPlace { slot: usize, offset: u64, length: u32 },
    /// A path to the parent that cannot be used; `slot` is `None` for the name in the header (O11).
    ParentPath { slot: Option<usize>, text: String, why: &'static str },
    /// A differencing disk whose parent has no usable name.
    ParentUnnamed,
    /// None of the recorded paths leads to the parent.
    ParentMissing { tried: Vec<String> },
    /// The file found is not the recorded parent (O17).
    ParentUuid { file: String, recorded: Uuid, found: Uuid },
    /// The parent is a raw file, in XenServer's dialect.
    ParentRaw,
    /// The parent's virtual size differs from the child's.
    ParentSize { child: u64, parent: u64 },
    /// The parent's file was changed after the child was made (seconds since 2000).
    ParentChanged { recorded: u32, found: u32 },
    /// A block that another program has marked whole, with zeros over data of the parent: what QEMU does to a child.
    ParentHidden { block: u32, sector: u64, at: u64 },
    /// Blocks that the image's own writer would have placed elsewhere, marked whole; `block` is the first.
    PlacedByAnother { block: u32, blocks: u64, at: u64 },
    /// Blocks that are whole, with zeros over data of the parent; `block` is the first.
    ZerosOverParent { block: u32, blocks: u64, at: u64 },
    /// A chain of too many files (O17).
    ChainTooDeep { limit: usize },
    /// A chain that comes back to a file it has passed (O17).
    ChainCycle { file: String },
    /// Two files of a chain have the same UUID (O17).
    ChainUuidTwice { uuid: Uuid },
    /// The BATs of a chain together are too large (O17).
    ChainTablesTooLarge { bytes: u64, limit: u64 },
    /// The header of XenServer's batmap is damaged or missing (O15).
    BatmapHeader { at: u64 },
    /// XenServer's batmap lies outside the file (O15).
    BatmapPlace { at: u64, offset: u64, bytes: u64, len: u64 },
    /// The checksum of XenServer's batmap does not fit (O15).
    BatmapChecksum { at: u64, stored: u32, computed: u32 },
    /// XenServer's batmap calls a block whole that is not.
    BatmapWrong { at: u64, block: u32 },
    /// The data is encrypted (O15).
    Encrypted { at: u64 },
    /// A machine is suspended on this disk (O16).
    SavedState { at: u64 },
    /// Marked as the inner node of a chain (O16).
    Hidden { at: u64 },
}

use Defect as D;

impl Defect {
    /// The same defect in a structure that begins at byte `at` of the file.
    #[must_use]
    pub fn placed(mut self, place: u64) -> Defect {
        match &mut self {
            D::FooterCookie { at }
            | D::Poisoned { at }
            | D::FooterChecksum { at, .. }
            | D::FooterVersion { at, .. }
            | D::DiskType { at, .. }
            | D::DiskSize { at, .. }
            | D::HeaderCookie { at }
            | D::HeaderChecksum { at, .. }
            | D::HeaderVersion { at, .. }
            | D::BlockSize { at, .. }
            | D::BatmapHeader { at }
            | D::BatmapChecksum { at, .. }
            | D::Encrypted { at } => *at = place,
            _ => {}
        }
        self
    }

    /// The word for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            D::NotRegular => "not-regular",
            D::FileTooShort { .. } => "file-too-short",
            D::FooterMissing { .. } => "footer-missing",
            D::FooterCookie { .. } => "footer-cookie",
            D::Poisoned { .. } => "poisoned",
            D::FooterChecksum { .. } => "footer-checksum",
            D::FooterVersion { .. } => "footer-version",
            D::DiskType { .. } => "disk-type",
            D::DiskSize { .. } => "disk-size",
            D::FixedTooShort { .. } => "fixed-too-short",
            D::FootersDiffer { .. } => "footers-differ",
            D::FooterCopyStale => "footer-copy-stale",
            D::TrailingFooterMissing { .. } => "trailing-footer-missing",
            D::TrailingFooterInvalid { .. } => "trailing-footer-invalid",
            D::FrontFooterInvalid { .. } => "front-footer-invalid",
            D::ShortFooter { .. } => "short-footer",
            D::HeaderPlace { .. } => "header-place",
            D::HeaderCookie { .. } => "header-cookie",
            D::HeaderChecksum { .. } => "header-checksum",
            D::HeaderVersion { .. } => "header-version",
            D::BlockSize { .. } => "block-size",
            D::TableTooSmall { .. } => "table-too-small",
            D::TableTooLarge { .. } => "table-too-large",
            D::TableUnaligned { .. } => "table-unaligned",
            D::TableOutside { .. } => "table-outside",
            D::TableOverlaps { .. } => "table-overlaps",
            D::BlockInMetadata { .. } => "block-in-metadata",
            D::BlockBeyondEnd { .. } => "block-beyond-end",
            D::BlockDuplicate { .. } => "block-duplicate",
            D::BlockOverlap { .. } => "block-overlap",
            D::BlockBeyondDisk { .. } => "block-beyond-disk",
            D::BlockCutOff { .. } => "block-cut-off",
            D::BitsBeyondDisk { .. } => "bits-beyond-disk",
            D::NoPlace { .. } => "no-place",
            D::SpaceUnreferenced { .. } => "space-unreferenced",
            D::DataUnderClearBit { .. } => "data-under-clear-bit",
            D::LocatorPlatform { .. } => "locator-platform",
            D::LocatorLength { .. } => "locator-length",
            D::LocatorPlace { .. } => "locator-place",
            D::ParentPath { .. } => "parent-path",
            D::ParentUnnamed => "parent-unnamed",
            D::ParentMissing { .. } => "parent-missing",
            D::ParentUuid { .. } => "parent-uuid",
            D::ParentRaw => "parent-raw",
            D::ParentSize { .. } => "parent-size",
            D::ParentChanged { .. } => "parent-changed",
            D::ParentHidden { .. } => "parent-hidden",
            D::PlacedByAnother { .. } => "placed-by-another",
            D::ZerosOverParent { .. } => "zeros-over-parent",
            D::ChainTooDeep { .. } => "chain-too-deep",
            D::ChainCycle { .. } => "chain-cycle",
            D::ChainUuidTwice { .. } => "chain-uuid-twice",
            D::ChainTablesTooLarge { .. } => "chain-tables-too-large",
            D::BatmapHeader { .. } => "batmap-header",
            D::BatmapPlace { .. } => "batmap-place",
            D::BatmapChecksum { .. } => "batmap-checksum",
            D::BatmapWrong { .. } => "batmap-wrong",
            D::Encrypted { .. } => "encrypted",
            D::SavedState { .. } => "saved-state",
            D::Hidden { .. } => "hidden",
        }
    }

    /// The byte offset it is about, where there is one.
    pub fn offset(&self) -> Option<u64> {
        match self {
            D::FooterCookie { at }
            | D::Poisoned { at }
            | D::FooterChecksum { at, .. }
            | D::FooterVersion { at, .. }
            | D::DiskType { at, .. }
            | D::DiskSize { at, .. }
            | D::FootersDiffer { at, .. }
            | D::TrailingFooterInvalid { at, .. }
            | D::ShortFooter { at }
            | D::HeaderCookie { at }
            | D::HeaderChecksum { at, .. }
            | D::HeaderVersion { at, .. }
            | D::BlockSize { at, .. }
            | D::TableTooSmall { at, .. }
            | D::TableTooLarge { at, .. }
            | D::TableUnaligned { at, .. }
            | D::TableOutside { at, .. }
            | D::TableOverlaps { at, .. }
            | D::BlockCutOff { at, .. }
            | D::BitsBeyondDisk { at, .. }
            | D::DataUnderClearBit { at, .. }
            | D::ParentHidden { at, .. }
            | D::PlacedByAnother { at, .. }
            | D::ZerosOverParent { at, .. }
            | D::BatmapHeader { at }
            | D::BatmapPlace { at, .. }
            | D::BatmapChecksum { at, .. }
            | D::BatmapWrong { at, .. }
            | D::Encrypted { at }
            | D::SavedState { at }
            | D::Hidden { at } => Some(*at),
            D::FooterCopyStale | D::FrontFooterInvalid { .. } => Some(0),
            D::TrailingFooterMissing { len } => Some(*len),
            // The footer says what cannot be.
            D::FixedTooShort { data, .. } => Some(*data),
            D::HeaderPlace { len, .. } => Some(len.saturating_sub(crate::units::SECTOR)),
            D::SpaceUnreferenced { offset, .. } => Some(*offset),
            D::BlockInMetadata { entry, .. }
            | D::BlockBeyondEnd { entry, .. }
            | D::BlockDuplicate { entry, .. }
            | D::BlockOverlap { entry, .. }
            | D::BlockBeyondDisk { entry, .. } => Some(u64::from(*entry) * crate::units::SECTOR),
            _ => None,
        }
    }

    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            D::ParentSize { .. } | D::ParentChanged { .. } | D::ZerosOverParent { .. } => Severity::Note,
            D::SpaceUnreferenced { .. } => Severity::Leak,
            D::FooterCopyStale
            | D::ShortFooter { .. }
            | D::BlockBeyondDisk { .. }
            | D::BitsBeyondDisk { .. }
            | D::DataUnderClearBit { .. }
            | D::PlacedByAnother { .. }
            | D::LocatorPlatform { .. }
            | D::LocatorLength { .. }
            | D::LocatorPlace { .. }
            | D::ParentPath { .. }
            | D::Encrypted { .. }
            | D::SavedState { .. }
            | D::Hidden { .. } => Severity::Cosmetic,
            _ => Severity::Corruption,
        }
    }

    /// Whether `check --repair` can mend it without guessing.
    pub fn repairable(&self) -> bool {
        matches!(
            self,
            D::FootersDiffer { .. }
                | D::FooterCopyStale
                | D::TrailingFooterMissing { .. }
                | D::TrailingFooterInvalid { .. }
                | D::FrontFooterInvalid { .. }
                | D::ShortFooter { .. }
                | D::BlockCutOff { .. }
                | D::BitsBeyondDisk { .. }
                | D::BlockBeyondDisk { .. }
                | D::SpaceUnreferenced { .. }
                | D::BatmapChecksum { .. }
                | D::BatmapWrong { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn severities_and_repairs() {
        let leak = Defect::SpaceUnreferenced { offset: 8192, bytes: 4096 };
        assert_eq!((leak.severity(), leak.repairable()), (Severity::Leak, true));
        let bad = Defect::BlockDuplicate { block: 1, other: 2, entry: 9 };
        assert_eq!((bad.severity(), bad.repairable()), (Severity::Corruption, false));
        assert_eq!(Defect::Hidden { at: 0 }.severity(), Severity::Cosmetic);
        assert!(Severity::Corruption > Severity::Leak);
    }

    #[test]
    fn places_what_has_none() {
        assert_eq!(Defect::HeaderCookie { at: 0 }.placed(512).offset(), Some(512));
        let entry = Defect::BlockOverlap { block: 1, entry: 9, other: 2, other_entry: 8 };
        assert_eq!(entry.clone().placed(512), entry);
    }
}
