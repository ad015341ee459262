//! Every way in which the bytes of an image can be wrong, each with the numbers that offend.
//!
//! One variant a rule. `Defect::rule` is the table of all rules: the word for programs (`check --json`), the severity,
//! whether a repair mends it, and the [`Consequence`] by which every verb and the daemon decide. The sentences for people,
//! which name the rule's limit and what to do, are in `defect_text`. Rules: crash-safety O1 to O19.

use uuid::Uuid;

use crate::format::image_format::ImageFormat;
use crate::format::metadata::MetadataPart;

/// What a defect means for programs that open the image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Consequence {
    /// The image is read and written. Programs that read or write its data log a warning.
    Warning,
    /// The image is read, and not written until the defect is mended.
    NotWritable,
    /// The image is neither read nor written.
    NotReadable,
}

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
/// their callers set it with [`Defect::with_base_offset`].
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
    /// A fixed disk whose file holds more data than the disk has.
    FixedMore { size: u64, data: u64 },
    /// A fixed disk with zeros after its footer.
    FixedPadded { at: u64, padding: u64 },
    /// An image of another format.
    OtherFormat { format: ImageFormat },
    /// Both footers are valid and contradict each other (O3).
    FootersDiffer { at: u64, field: &'static str },
    /// Both footers are valid and name two kinds of disk (O3).
    FooterKindsDiffer { at: u64, front: &'static str, end: &'static str },
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
    TableOverlaps { at: u64, offset: u64, bytes: u64, part: MetadataPart },
    /// A block lies over metadata (O12).
    BlockInMetadata { block: u32, entry: u32, part: MetadataPart },
    /// A block ends after the end of the data, of which its bitmap calls nothing there present (O12).
    BlockBeyondEnd { block: u32, entry: u32, end: u64, limit: u64 },
    /// Two blocks name the same place (O13).
    BlockDuplicate { block: u32, other: u32, entry: u32 },
    /// Two blocks overlap (O13).
    BlockOverlap { block: u32, entry: u32, other: u32, other_entry: u32 },
    /// A place is recorded for a block behind the end of the disk.
    BlockBeyondDisk { block: u32, entry: u32, blocks: u64 },
    /// Entries of 0, where no block can begin: they mean "unused". `block` is the first.
    EntryZero { block: u32, entries: u64, at: u64 },
    /// Sectors of a block are lost: its bitmap calls them present, or is lost itself, and the data ends before them (O12).
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

use Consequence as C;
use Defect as D;

impl Defect {
    /// The same defect in a structure that begins at byte `at` of the file.
    #[must_use]
    pub fn with_base_offset(mut self, place: u64) -> Defect {
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

    /// The table of all rules: what each defect means to programs and people.
    fn rule(&self) -> Rule {
        match self {
            D::NotRegular => unreadable("not-regular"),
            D::FileTooShort { .. } => unreadable("file-too-short"),
            D::FooterMissing { .. } => unreadable("footer-missing"),
            D::FooterCookie { .. } => unreadable("footer-cookie"),
            D::Poisoned { .. } => unreadable("poisoned"),
            D::FooterChecksum { .. } => unreadable("footer-checksum"),
            D::FooterVersion { .. } => unreadable("footer-version"),
            D::DiskType { .. } => unreadable("disk-type"),
            D::DiskSize { .. } => unreadable("disk-size"),
            D::FixedTooShort { .. } => unreadable("fixed-too-short"),
            D::FixedMore { .. } => cosmetic("fixed-more"),
            D::FixedPadded { .. } => of("fixed-padded", Severity::Cosmetic, C::NotReadable).repairable(),
            D::OtherFormat { .. } => unreadable("other-format"),
            D::FootersDiffer { .. } => of("footers-differ", Severity::Corruption, C::NotWritable).repairable(),
            D::FooterKindsDiffer { .. } => of("footer-kinds-differ", Severity::Corruption, C::NotWritable),
            D::FooterCopyStale => cosmetic("footer-copy-stale").repairable(),
            D::TrailingFooterMissing { .. } => corrupt("trailing-footer-missing").repairable(),
            D::TrailingFooterInvalid { .. } => corrupt("trailing-footer-invalid").repairable(),
            D::FrontFooterInvalid { .. } => corrupt("front-footer-invalid").repairable(),
            D::ShortFooter { .. } => cosmetic("short-footer").repairable(),
            D::HeaderPlace { .. } => unreadable("header-place"),
            D::HeaderCookie { .. } => unreadable("header-cookie"),
            D::HeaderChecksum { .. } => unreadable("header-checksum"),
            D::HeaderVersion { .. } => unreadable("header-version"),
            D::BlockSize { .. } => unreadable("block-size"),
            D::TableTooSmall { .. } => unreadable("table-too-small"),
            D::TableTooLarge { .. } => unreadable("table-too-large"),
            D::TableUnaligned { .. } => unreadable("table-unaligned"),
            D::TableOutside { .. } => unreadable("table-outside"),
            D::TableOverlaps { .. } => unreadable("table-overlaps"),
            D::BlockInMetadata { .. } => unreadable("block-in-metadata"),
            D::BlockBeyondEnd { .. } => of("block-beyond-end", Severity::Corruption, C::NotWritable),
            D::BlockDuplicate { .. } => unreadable("block-duplicate"),
            D::BlockOverlap { .. } => unreadable("block-overlap"),
            D::BlockBeyondDisk { .. } => cosmetic("block-beyond-disk").repairable(),
            D::EntryZero { .. } => cosmetic("entry-zero").repairable(),
            D::BlockCutOff { .. } => unreadable("block-cut-off"),
            D::BitsBeyondDisk { .. } => cosmetic("bits-beyond-disk").repairable(),
            D::NoPlace { .. } => of("no-place", Severity::Corruption, C::NotWritable),
            D::SpaceUnreferenced { .. } => of("space-unreferenced", Severity::Leak, C::Warning).repairable(),
            D::DataUnderClearBit { .. } => cosmetic("data-under-clear-bit"),
            D::LocatorPlatform { .. } => cosmetic("locator-platform"),
            D::LocatorLength { .. } => cosmetic("locator-length"),
            D::LocatorPlace { .. } => cosmetic("locator-place"),
            D::ParentPath { .. } => cosmetic("parent-path"),
            D::ParentUnnamed => unreadable("parent-unnamed"),
            D::ParentMissing { .. } => unreadable("parent-missing"),
            D::ParentUuid { .. } => unreadable("parent-uuid"),
            D::ParentRaw => unreadable("parent-raw"),
            D::ParentSize { .. } => note("parent-size"),
            D::ParentChanged { .. } => note("parent-changed"),
            D::ParentHidden { .. } => corrupt("parent-hidden"),
            D::PlacedByAnother { .. } => cosmetic("placed-by-another"),
            D::ZerosOverParent { .. } => note("zeros-over-parent"),
            D::ChainTooDeep { .. } => unreadable("chain-too-deep"),
            D::ChainCycle { .. } => unreadable("chain-cycle"),
            D::ChainUuidTwice { .. } => unreadable("chain-uuid-twice"),
            D::ChainTablesTooLarge { .. } => unreadable("chain-tables-too-large"),
            D::BatmapHeader { .. } => corrupt("batmap-header"),
            D::BatmapPlace { .. } => corrupt("batmap-place"),
            D::BatmapChecksum { .. } => corrupt("batmap-checksum").repairable(),
            D::BatmapWrong { .. } => corrupt("batmap-wrong").repairable(),
            D::Encrypted { .. } => of("encrypted", Severity::Cosmetic, C::NotReadable),
            D::SavedState { .. } => of("saved-state", Severity::Cosmetic, C::NotWritable),
            D::Hidden { .. } => of("hidden", Severity::Cosmetic, C::NotWritable),
        }
    }

    /// The word for programs.
    pub fn kind(&self) -> &'static str {
        self.rule().kind
    }

    /// How bad it is.
    pub fn severity(&self) -> Severity {
        self.rule().severity
    }

    /// Whether the image may be read and written all the same.
    pub fn consequence(&self) -> Consequence {
        self.rule().consequence
    }

    /// Whether `check --repair` mends it without guessing.
    pub fn repairable(&self) -> bool {
        self.rule().repairable
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
            | D::FixedPadded { at, .. }
            | D::FootersDiffer { at, .. }
            | D::FooterKindsDiffer { at, .. }
            | D::EntryZero { at, .. }
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
            D::FixedTooShort { data, .. } | D::FixedMore { data, .. } => Some(*data),
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
}

/// A row of the table of rules.
struct Rule {
    kind: &'static str,
    severity: Severity,
    consequence: Consequence,
    repairable: bool,
}

impl Rule {
    fn repairable(self) -> Rule {
        Rule { repairable: true, ..self }
    }
}

fn of(kind: &'static str, severity: Severity, consequence: Consequence) -> Rule {
    Rule { kind, severity, consequence, repairable: false }
}

fn unreadable(kind: &'static str) -> Rule {
    of(kind, Severity::Corruption, C::NotReadable)
}

fn corrupt(kind: &'static str) -> Rule {
    of(kind, Severity::Corruption, C::Warning)
}

fn cosmetic(kind: &'static str) -> Rule {
    of(kind, Severity::Cosmetic, C::Warning)
}

fn note(kind: &'static str) -> Rule {
    of(kind, Severity::Note, C::Warning)
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
        assert_eq!(Defect::HeaderCookie { at: 0 }.with_base_offset(512).offset(), Some(512));
        let entry = Defect::BlockOverlap { block: 1, entry: 9, other: 2, other_entry: 8 };
        assert_eq!(entry.clone().with_base_offset(512), entry);
    }
}
