//! Every way in which the bytes of an image can be wrong, each with the numbers that offend.
//!
//! One variant a rule. The sentences are for people: they name the rule's limit and, where there is something to do,
//! what. [`Defect::kind`] is the word for programs (`check --json`). Rules: crash-safety O1 to O19.

use std::fmt;

use uuid::Uuid;

use crate::error::{Error, ErrorKind};
use crate::format::extents::Part;

/// How bad a defect is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
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
    TableUnaligned { offset: u64 },
    /// The BAT lies outside the file (O10).
    TableOutside { offset: u64, bytes: u64, len: u64 },
    /// The BAT lies over the front footer or the header (O10).
    TableOverlaps { offset: u64, bytes: u64, part: Part },
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
    ParentUuid { recorded: Uuid, found: Uuid },
    /// The parent is a raw file, in XenServer's dialect.
    ParentRaw,
    /// The parent's virtual size differs from the child's.
    ParentSize { child: u64, parent: u64 },
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
            | D::DataUnderClearBit { at, .. }
            | D::BatmapHeader { at }
            | D::BatmapPlace { at, .. }
            | D::BatmapChecksum { at, .. }
            | D::BatmapWrong { at, .. }
            | D::Encrypted { at }
            | D::SavedState { at }
            | D::Hidden { at } => Some(*at),
            D::FooterCopyStale | D::FrontFooterInvalid { .. } => Some(0),
            D::TrailingFooterMissing { len } => Some(*len),
            D::TableUnaligned { offset }
            | D::TableOutside { offset, .. }
            | D::TableOverlaps { offset, .. }
            | D::SpaceUnreferenced { offset, .. } => Some(*offset),
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
            D::SpaceUnreferenced { .. } => Severity::Leak,
            D::FooterCopyStale
            | D::ShortFooter { .. }
            | D::BlockBeyondDisk { .. }
            | D::DataUnderClearBit { .. }
            | D::LocatorPlatform { .. }
            | D::LocatorLength { .. }
            | D::LocatorPlace { .. }
            | D::ParentPath { .. }
            | D::ParentSize { .. }
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
                | D::BlockBeyondDisk { .. }
                | D::SpaceUnreferenced { .. }
                | D::BatmapChecksum { .. }
                | D::BatmapWrong { .. }
        )
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            D::NotRegular => write!(f, "not a regular file"),
            D::FileTooShort { len } => write!(f, "the file has {len} bytes; the smallest image has 512"),
            D::FooterMissing { .. } => {
                write!(
                    f,
                    "no footer at the end of the file, and none at its start that a fixed disk could not have forged"
                )
            }
            D::FooterCookie { .. } => write!(f, "no footer here: it would begin with \"conectix\""),
            D::Poisoned { .. } => {
                write!(f, "a resize was interrupted: go on with it or undo it with `vhd-util revert` and its journal")
            }
            D::FooterChecksum { stored, computed, .. } => {
                write!(f, "the footer's checksum is {stored:#010x}, its bytes give {computed:#010x}")
            }
            D::FooterVersion { version, .. } => {
                write!(f, "format version {}.{}; only 1.x is known", version >> 16, version & 0xFFFF)
            }
            D::DiskType { code, .. } => {
                write!(f, "disk type {code}; known are 2 (fixed), 3 (dynamic) and 4 (differencing)")
            }
            D::DiskSize { size, .. } => {
                write!(f, "virtual size of {size} bytes; it must be a multiple of 512 from 512 bytes to 2040 GiB")
            }
            D::FixedTooShort { size, data } => {
                write!(f, "a fixed disk of {size} bytes, of which the file holds only {data}")
            }
            D::FootersDiffer { field, .. } => write!(
                f,
                "the two footers are valid but differ in the {field}; the one at the end counts, and nothing is \
                 written before `check --repair`"
            ),
            D::FooterCopyStale => write!(f, "the two footers differ in bytes without consequence"),
            D::TrailingFooterMissing { .. } => {
                write!(f, "the footer at the end is missing (an unclean end); the one at the start is used")
            }
            D::TrailingFooterInvalid { reason, .. } => {
                write!(f, "the footer at the end is damaged ({reason}); the one at the start is used")
            }
            D::FrontFooterInvalid { reason } => write!(f, "the footer at the start is damaged: {reason}"),
            D::ShortFooter { .. } => write!(f, "a footer of 511 bytes, as written before 2004"),
            D::HeaderPlace { offset, len } => write!(
                f,
                "the dynamic header would be at byte {offset}; it must be at a multiple of 512, behind the first \
                 footer, and 1024 bytes before the end ({len})"
            ),
            D::HeaderCookie { .. } => write!(f, "no dynamic header here: it would begin with \"cxsparse\""),
            D::HeaderChecksum { stored, computed, .. } => {
                write!(f, "the dynamic header's checksum is {stored:#010x}, its bytes give {computed:#010x}")
            }
            D::HeaderVersion { version, .. } => {
                write!(f, "dynamic header version {version:#010x}; only 0x00010000 is known")
            }
            D::BlockSize { size, .. } => {
                write!(f, "blocks of {size} bytes; the size must be a power of two from 4 KiB to 256 MiB")
            }
            D::TableTooSmall { entries, blocks, .. } => {
                write!(f, "the block table has {entries} entries for a disk of {blocks} blocks")
            }
            D::TableTooLarge { entries, limit, .. } => {
                write!(f, "the block table needs {entries} entries; at most {limit} are read")
            }
            D::TableUnaligned { .. } => write!(f, "the block table does not begin at a multiple of 512"),
            D::TableOutside { bytes, len, .. } => {
                write!(f, "the block table of {bytes} bytes does not lie in the file of {len} bytes")
            }
            D::TableOverlaps { bytes, part, .. } => {
                write!(f, "the block table of {bytes} bytes overlaps the {part}")
            }
            D::BlockInMetadata { block, part, .. } => write!(f, "block {block} overlaps the {part}"),
            D::BlockBeyondEnd { block, end, limit, .. } => {
                write!(f, "block {block} ends at byte {end}; the data ends at {limit}")
            }
            D::BlockDuplicate { block, other, .. } => {
                write!(f, "blocks {block} and {other} share one place; a write to one would change the other")
            }
            D::BlockOverlap { block, other, .. } => {
                write!(f, "blocks {block} and {other} overlap; a write to one would change the other")
            }
            D::BlockBeyondDisk { block, blocks, .. } => {
                write!(f, "a place is recorded for block {block} of a disk of {blocks} blocks")
            }
            D::NoPlace { end } => {
                write!(f, "no room for another block below 2 TiB (the data ends at byte {end}); compact the image")
            }
            D::SpaceUnreferenced { bytes, .. } => write!(f, "{bytes} bytes that nothing refers to"),
            D::DataUnderClearBit { block, sector, .. } => {
                write!(f, "sector {sector} of block {block} holds data but is marked absent; programs disagree on it")
            }
            D::LocatorPlatform { slot, code } => {
                write!(f, "parent locator {slot} is of an unknown platform ({code:#010x}) and skipped")
            }
            D::LocatorLength { slot, length } => {
                write!(f, "parent locator {slot} has {length} bytes, more than 4096, and is skipped")
            }
            D::LocatorPlace { slot, offset, length } => write!(
                f,
                "parent locator {slot} (byte {offset}, {length} bytes) lies outside the file or over other metadata, \
                 and is skipped"
            ),
            D::ParentPath { slot: Some(slot), text, why } => {
                write!(f, "the path {text:?} of parent locator {slot} cannot be used: {why}")
            }
            D::ParentPath { slot: None, text, why } => {
                write!(f, "the parent's name {text:?} in the header cannot be used: {why}")
            }
            D::ParentUnnamed => write!(f, "no usable path to the parent is recorded; set one with `rebase`"),
            D::ParentMissing { tried } => match tried.as_slice() {
                [] => write!(f, "the parent is not there"),
                tried => write!(f, "the parent is not there; tried {}", tried.join(", ")),
            },
            D::ParentUuid { recorded, found } => {
                write!(f, "the parent must have UUID {recorded}, the file has {found}: not the parent, or replaced")
            }
            D::ParentRaw => write!(f, "the recorded parent is a raw file, which a VHD must not choose"),
            D::ParentSize { child, parent } => {
                write!(f, "the disk has {child} bytes, its parent {parent}")
            }
            D::ChainTooDeep { limit } => write!(f, "the chain has more than {limit} files; merge some"),
            D::ChainCycle { file } => write!(f, "the chain comes back to {file}"),
            D::ChainUuidTwice { uuid } => write!(f, "two files of the chain have UUID {uuid}"),
            D::ChainTablesTooLarge { bytes, limit } => {
                write!(f, "the block tables of the chain take {bytes} bytes together, more than {limit}")
            }
            D::BatmapHeader { .. } => write!(f, "the header of the batmap is damaged or missing"),
            D::BatmapPlace { offset, bytes, len, .. } => {
                write!(f, "the batmap (byte {offset}, {bytes} bytes) does not lie in the file of {len} bytes")
            }
            D::BatmapChecksum { stored, computed, .. } => {
                write!(f, "the batmap's checksum is {stored:#010x}, its bytes give {computed:#010x}")
            }
            D::BatmapWrong { block, .. } => {
                write!(f, "the batmap calls block {block} whole, its bitmap does not")
            }
            D::Encrypted { .. } => write!(f, "the data is encrypted by XenServer; decrypt it there"),
            D::SavedState { .. } => {
                write!(f, "a machine is suspended on this disk; writing would break it")
            }
            D::Hidden { .. } => {
                write!(f, "marked as the inner node of a chain; writing would break its children")
            }
        }
    }
}

impl From<Defect> for Error {
    fn from(defect: Defect) -> Error {
        let kind = match &defect {
            D::NotRegular
            | D::Poisoned { .. }
            | D::Encrypted { .. }
            | D::SavedState { .. }
            | D::Hidden { .. }
            | D::ParentRaw
            | D::ChainTooDeep { .. }
            | D::TableTooLarge { .. }
            | D::ChainTablesTooLarge { .. } => ErrorKind::Refused,
            D::ParentMissing { .. } => ErrorKind::NotFound,
            D::NoPlace { .. } => ErrorKind::NoSpace,
            _ => ErrorKind::Invalid,
        };
        let error = Error::new(kind, defect.to_string());
        match defect.offset() {
            Some(at) => error.at_offset(at),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn becomes_an_error_with_kind_and_place() {
        let e = Error::from(Defect::FooterCookie { at: 0 }.placed(4096));
        assert_eq!((e.kind(), e.offset()), (ErrorKind::Invalid, Some(4096)));
        assert_eq!(Error::from(Defect::ParentRaw).kind(), ErrorKind::Refused);
        assert_eq!(Error::from(Defect::NoPlace { end: 1 << 41 }).kind(), ErrorKind::NoSpace);
        let e = Error::from(Defect::BlockDuplicate { block: 7, other: 3, entry: 16 });
        assert_eq!(e.offset(), Some(8192));
        assert!(e.to_string().starts_with("blocks 7 and 3 share one place"), "{e}");
    }

    #[test]
    fn severities_and_repairs() {
        let leak = Defect::SpaceUnreferenced { offset: 8192, bytes: 4096 };
        assert_eq!((leak.severity(), leak.repairable()), (Severity::Leak, true));
        let bad = Defect::BlockDuplicate { block: 1, other: 2, entry: 9 };
        assert_eq!((bad.severity(), bad.repairable()), (Severity::Corruption, false));
        assert_eq!(Defect::Hidden { at: 0 }.severity(), Severity::Cosmetic);
        assert!(Severity::Corruption > Severity::Leak);
    }
}
