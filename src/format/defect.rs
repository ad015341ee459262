//! Every way in which the bytes of an image can be wrong, each with the numbers that offend.
//!
//! One row a rule: all that is declared of a defect stands there. The columns are those of `defects!` in `defect_rule`: the
//! name for programs (`check --json`), the rule of `docs/format.md`, the severity, the [`Consequence`] by which every verb and
//! the daemon decide, whether a repair mends it, the kind of error, the byte offset, and the sentence for people.

use std::fmt;

use uuid::Uuid;

use crate::error::{Error, ErrorKind};
use crate::format::defect_rule::{Consequence, Severity, defects};
use crate::format::image_format::ImageFormat;
use crate::format::metadata_part::MetadataPart;
use crate::units::SECTOR;

defects! {
/// A violated rule. `at` is a byte offset in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the fields are the numbers of the sentence that Display makes of them")]
pub enum Defect {
    /// Not a regular file.
    NotRegular
        ["not-regular", O1, Corruption, NotReadable, false, Refused, none]
        "not a regular file";
    /// Too short for a footer.
    FileTooShort { len: u64 }
        ["file-too-short", O2, Corruption, NotReadable, false, Invalid, none]
        "the file is too short: {len} bytes; the smallest image has 512";
    /// No footer at the end, and none at the front that may be used.
    FooterMissing { len: u64 }
        ["footer-missing", O3, Corruption, NotReadable, false, Invalid, none]
        "no footer at the end of the file, and none at its start that a fixed disk could not have forged";
    /// These bytes are no footer.
    FooterCookie { at: u64 }
        ["footer-cookie", _, Corruption, NotReadable, false, Invalid, relative at]
        "no footer here: it would begin with \"conectix\"";
    /// The footer of an interrupted `vhd-util resize`.
    Poisoned { at: u64 }
        ["poisoned", _, Corruption, NotReadable, false, Refused, relative at]
        "a resize was interrupted: go on with it or undo it with `vhd-util revert` and its journal";
    /// The footer's checksum does not fit its bytes.
    FooterChecksum { at: u64, stored: u32, computed: u32 }
        ["footer-checksum", O4, Corruption, NotReadable, false, Invalid, relative at]
        "the footer's checksum is {stored:#010x}, its bytes give {computed:#010x}";
    /// Another major version of the format.
    FooterVersion { at: u64, version: u32 }
        ["footer-version", O4, Corruption, NotReadable, false, Invalid, relative at]
        "format version {}.{}; only 1.x is known", version >> 16, version & 0xFFFF;
    /// A disk type that nobody serves.
    DiskType { at: u64, code: u32 }
        ["disk-type", O4, Corruption, NotReadable, false, Invalid, relative at]
        "disk type {code}; known are 2 (fixed), 3 (dynamic) and 4 (differencing)";
    /// An impossible virtual size.
    DiskSize { at: u64, size: u64 }
        ["disk-size", O5, Corruption, NotReadable, false, Invalid, relative at]
        "virtual size of {size} bytes; it must be a multiple of 512 from 512 bytes to 2040 GiB";
    /// A fixed disk with less data than its size.
    FixedTooShort { size: u64, data: u64 }
        ["fixed-too-short", O2, Corruption, NotReadable, false, Invalid, *data]
        "a fixed disk of {size} bytes, of which the file holds only {data}";
    /// A fixed disk whose file holds more data than the disk has.
    FixedMore { size: u64, data: u64 }
        ["fixed-more", _, Cosmetic, Warning, false, Invalid, *data]
        "a fixed disk of {size} bytes in a file that holds {data} bytes of data: no guest sees the {} bytes after \
         the end of the disk", data - size;
    /// A fixed disk with zeros after its footer.
    FixedPadded { at: u64, padding: u64 }
        ["fixed-padded", _, Cosmetic, NotReadable, true, Invalid, *at]
        "a padded fixed disk: {padding} zeros follow its footer. It is not opened, since a guest can write such \
         bytes to a raw disk; if it is a fixed VHD, `check --repair` cuts the padding off";
    /// An image of another format.
    OtherFormat { format: ImageFormat }
        ["other-format", _, Corruption, NotReadable, false, Unsupported, none]
        "a {} image, not a VHD; QEMU converts it: `qemu-img convert -f {} -O vpc -o force_size=on SOURCE DESTINATION`",
        format.name(), format.qemu_driver();
    /// Both footers are valid and contradict each other.
    FootersDiffer { at: u64, field: &'static str }
        ["footers-differ", O3, Corruption, NotWritable, true, Invalid, *at]
        "the two footers are valid but differ in the {field}; the one at the end counts, and nothing is \
         written before `check --repair`";
    /// Both footers are valid and name two kinds of disk.
    FooterKindsDiffer { at: u64, front: &'static str, end: &'static str }
        ["footer-kinds-differ", O3, Corruption, NotWritable, false, Invalid, *at]
        "the two footers are valid, but the one at the start says {front} and the one at the end {end}; `check \
         --repair --take front` or `--take end` chooses";
    /// Both footers are valid and differ in a byte without consequence.
    FooterCopyStale
        ["footer-copy-stale", _, Cosmetic, Warning, true, Invalid, 0]
        "the two footers differ in bytes without consequence";
    /// A dynamic disk without a footer at its end.
    TrailingFooterMissing { len: u64 }
        ["trailing-footer-missing", O3, Corruption, Warning, true, Invalid, *len]
        "the footer at the end is missing (an unclean end); the one at the start is used";
    /// A dynamic disk with a damaged footer at its end.
    TrailingFooterInvalid { at: u64, reason: Box<Defect> }
        ["trailing-footer-invalid", O3, Corruption, Warning, true, Invalid, *at]
        "the footer at the end is damaged ({reason}); the one at the start is used";
    /// A dynamic disk whose front footer is damaged.
    FrontFooterInvalid { reason: Box<Defect> }
        ["front-footer-invalid", O3, Corruption, Warning, true, Invalid, 0]
        "the footer at the start is damaged: {reason}";
    /// A footer of 511 bytes, as written before 2004.
    ShortFooter { at: u64 }
        ["short-footer", _, Cosmetic, Warning, true, Invalid, *at]
        "a footer of 511 bytes, as written before 2004";
    /// The dynamic header cannot be where the footer says.
    HeaderPlace { offset: u64, len: u64 }
        ["header-place", O6, Corruption, NotReadable, false, Invalid, len.saturating_sub(SECTOR)]
        "the dynamic header would be at byte {offset}; it must be at a multiple of 512, behind the first \
         footer, and 1024 bytes before the end ({len})";
    /// These bytes are no dynamic header.
    HeaderCookie { at: u64 }
        ["header-cookie", O7, Corruption, NotReadable, false, Invalid, relative at]
        "no dynamic header here: it would begin with \"cxsparse\"";
    /// The dynamic header's checksum does not fit its bytes.
    HeaderChecksum { at: u64, stored: u32, computed: u32 }
        ["header-checksum", O7, Corruption, NotReadable, false, Invalid, relative at]
        "the dynamic header's checksum is {stored:#010x}, its bytes give {computed:#010x}";
    /// Another version of the dynamic header.
    HeaderVersion { at: u64, version: u32 }
        ["header-version", O7, Corruption, NotReadable, false, Invalid, relative at]
        "dynamic header version {version:#010x}; only 0x00010000 is known";
    /// A block size outside the rules.
    BlockSize { at: u64, size: u32 }
        ["block-size", O8, Corruption, NotReadable, false, Invalid, relative at]
        "a block size of {size} bytes; it must be a power of two from 4 KiB to 256 MiB";
    /// Fewer BAT entries than the disk has blocks.
    TableTooSmall { at: u64, entries: u32, blocks: u64 }
        ["table-too-small", O9, Corruption, NotReadable, false, Invalid, *at]
        "the block table has {entries} entries for a disk of {blocks} blocks";
    /// More BAT than is read into memory.
    TableTooLarge { at: u64, entries: u64, limit: u64 }
        ["table-too-large", O9, Corruption, NotReadable, false, Refused, *at]
        "the block table needs {entries} entries; at most {limit} are read";
    /// The BAT does not begin at a sector.
    TableUnaligned { at: u64, offset: u64 }
        ["table-unaligned", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table would begin at {offset}, which is no multiple of 512";
    /// The BAT lies outside the file.
    TableOutside { at: u64, offset: u64, bytes: u64, len: u64 }
        ["table-outside", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table ({bytes} bytes at {offset}) does not lie in the file of {len} bytes";
    /// The BAT lies over the front footer or the header.
    TableOverlaps { at: u64, offset: u64, bytes: u64, part: MetadataPart }
        ["table-overlaps", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table ({bytes} bytes at {offset}) overlaps the {part}";
    /// A block lies over metadata.
    BlockInMetadata { block: u32, entry: u32, part: MetadataPart }
        ["block-in-metadata", O12, Corruption, NotReadable, false, Invalid, u64::from(*entry) * SECTOR]
        "block {block} overlaps the {part}";
    /// A block ends after the end of the data, of which its bitmap calls nothing there present.
    BlockBeyondEnd { block: u32, entry: u32, end: u64, limit: u64 }
        ["block-beyond-end", O12, Corruption, NotWritable, false, Invalid, u64::from(*entry) * SECTOR]
        "block {block} ends at byte {end}; the data ends at {limit}";
    /// Two blocks name the same place.
    BlockDuplicate { block: u32, other: u32, entry: u32 }
        ["block-duplicate", O13, Corruption, NotReadable, false, Invalid, u64::from(*entry) * SECTOR]
        "blocks {block} and {other} share one place; a write to one would change the other";
    /// Two blocks overlap.
    BlockOverlap { block: u32, entry: u32, other: u32, other_entry: u32 }
        ["block-overlap", O13, Corruption, NotReadable, false, Invalid, u64::from(*entry) * SECTOR]
        "blocks {block} and {other} overlap; a write to one would change the other";
    /// A place is recorded for a block behind the end of the disk.
    BlockBeyondDisk { block: u32, entry: u32, blocks: u64 }
        ["block-beyond-disk", _, Cosmetic, Warning, true, Invalid, u64::from(*entry) * SECTOR]
        "a place is recorded for block {block} of a disk of {blocks} blocks";
    /// Entries of 0, where no block can begin: they mean "unused". `block` is the first.
    EntryZero { block: u32, entries: u64, at: u64 }
        ["entry-zero", _, Cosmetic, Warning, true, Invalid, *at]
        "the table entry of block {block}{} is 0, where no block can begin; it is read as unused", AndMore(entries - 1);
    /// Sectors of a block are lost: its bitmap calls them present, or is lost itself, and the data ends before them.
    BlockCutOff { block: u32, sectors: u64, at: u64 }
        ["block-cut-off", O12, Corruption, NotReadable, false, Invalid, *at]
        "{sectors} sectors of block {block} are lost: the file was cut off before them. Restore the image from a \
         whole copy; `convert --salvage` copies what is left";
    /// The bitmap of the last block, which is not whole, calls sectors behind the end of the disk present.
    BitsBeyondDisk { block: u32, bits: u32, at: u64 }
        ["bits-beyond-disk", _, Cosmetic, Warning, true, Invalid, *at]
        "the bitmap of block {block}, the last one, marks {bits} sectors present that lie behind the end of the \
         disk";
    /// No place below 2 TiB is left for a block.
    NoPlace { end: u64 }
        ["no-place", O14, Corruption, NotWritable, false, NoSpace, none]
        "no room for another block below 2 TiB (the data ends at byte {end}); compact the image";
    /// Space that no block and no metadata uses.
    SpaceUnreferenced { offset: u64, bytes: u64 }
        ["space-unreferenced", _, Leak, Warning, true, Invalid, *offset]
        "{bytes} bytes that nothing refers to";
    /// A sector that the bitmap calls absent holds data.
    DataUnderClearBit { block: u32, sector: u64, at: u64 }
        ["data-under-clear-bit", _, Cosmetic, Warning, false, Invalid, *at]
        "sector {sector} of block {block} holds data but is marked absent; programs disagree on it";
    /// A locator of an unknown platform.
    LocatorPlatform { slot: usize, code: u32 }
        ["locator-platform", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} is of an unknown platform ({code:#010x}) and skipped";
    /// A locator longer than any path.
    LocatorLength { slot: usize, length: u32 }
        ["locator-length", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} has {length} bytes, more than 4096, and is skipped";
    /// A locator whose text lies outside the file or over other metadata.
    LocatorPlace { slot: usize, offset: u64, length: u32 }
        ["locator-place", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} (byte {offset}, {length} bytes) lies outside the file or over other metadata, \
         and is skipped";
    /// A path to the parent that cannot be used; `slot` is `None` for the name in the header.
    ParentPath { slot: Option<usize>, text: String, why: &'static str }
        ["parent-path", O11, Cosmetic, Warning, false, Invalid, none]
        "the {} cannot be used: {why}", recorded_path(*slot, text);
    /// A differencing disk whose parent has no usable name.
    ParentUnnamed
        ["parent-unnamed", _, Corruption, NotReadable, false, Invalid, none]
        "no usable path to the parent is recorded; link it with `diffdisk rebase --unsafe`";
    /// None of the recorded paths leads to the parent.
    ParentMissing { tried: Vec<String> }
        ["parent-missing", _, Corruption, NotReadable, false, NotFound, none]
        "the parent is not there{}. If it was moved or renamed, give its folder with --allow-parents, or link the child \
         to it with `diffdisk rebase --unsafe`", tried_paths(tried);
    /// The file found is not the recorded parent.
    ParentUuid { file: String, recorded: Uuid, found: Uuid }
        ["parent-uuid", O17, Corruption, NotReadable, false, Invalid, none]
        "the parent must have UUID {recorded}, and {file} has {found}: another image, or one that was made \
         again. Only if it holds the parent's very data, link the child to it with `diffdisk rebase --unsafe`";
    /// The parent is a raw file, in XenServer's dialect.
    ParentRaw
        ["parent-raw", _, Corruption, NotReadable, false, Refused, none]
        "the recorded parent is a raw file, which a VHD must not choose";
    /// The parent's virtual size differs from the child's.
    ParentSize { child: u64, parent: u64 }
        ["parent-size", _, Note, Warning, false, Invalid, none]
        "the disk has {child} bytes, its parent {parent}";
    /// The parent's file was changed after the child was made (seconds since 2000).
    ParentChanged { recorded: u32, found: u32 }
        ["parent-changed", _, Note, Warning, false, Invalid, none]
        "the parent's file was changed {} seconds after the time that the child records: harmless where it was \
         copied, touched or merged into; where its contents changed, so did the child's", found.saturating_sub(*recorded);
    /// A block that another program has marked whole, with zeros over data of the parent: what QEMU does to a child.
    ParentHidden { block: u32, sector: u64, at: u64 }
        ["parent-hidden", _, Corruption, Warning, false, Invalid, *at]
        "block {block} was placed by another program and marked whole: zeros hide data of the parent, from sector \
         {sector} of the block on. QEMU does that when it writes to a differencing VHD, which it takes for a \
         dynamic one";
    /// Blocks that the image's own writer would have placed elsewhere, marked whole; `block` is the first.
    PlacedByAnother { block: u32, blocks: u64, at: u64 }
        ["placed-by-another", _, Cosmetic, Warning, false, Invalid, *at]
        "block {block}{} was placed by another program than the image's own writer, and marked whole. QEMU does that \
         when it writes to a differencing VHD, which it takes for a dynamic one, and so hides the parent's data; `check \
         --chain` tells whether it did", AndMore(blocks - 1);
    /// Blocks that are whole, with zeros over data of the parent; `block` is the first.
    ZerosOverParent { block: u32, blocks: u64, at: u64 }
        ["zeros-over-parent", _, Note, Warning, false, Invalid, *at]
        "block {block}{} is marked whole and holds zeros over data of the parent: the guest has zeroed it, or QEMU has \
         written to the image, which it takes for a dynamic one", AndMore(blocks - 1);
    /// A chain of too many files.
    ChainTooDeep { limit: usize }
        ["chain-too-deep", O17, Corruption, NotReadable, false, Refused, none]
        "the chain has more than {limit} files; merge some";
    /// A chain that comes back to a file it has passed.
    ChainCycle { file: String }
        ["chain-cycle", O17, Corruption, NotReadable, false, Invalid, none]
        "the chain is a cycle: it comes back to {file}";
    /// Two files of a chain have the same UUID.
    ChainUuidTwice { uuid: Uuid }
        ["chain-uuid-twice", O17, Corruption, NotReadable, false, Invalid, none]
        "two files of the chain have UUID {uuid}";
    /// The BATs of a chain together are too large.
    ChainTablesTooLarge { bytes: u64, limit: u64 }
        ["chain-tables-too-large", O17, Corruption, NotReadable, false, Refused, none]
        "the block tables of the chain take {bytes} bytes together, more than {limit}";
    /// The header of XenServer's batmap is damaged or missing.
    BatmapHeader { at: u64 }
        ["batmap-header", O15, Corruption, Warning, false, Invalid, relative at]
        "the header of the batmap is damaged or missing";
    /// XenServer's batmap lies outside the file.
    BatmapPlace { at: u64, offset: u64, bytes: u64, len: u64 }
        ["batmap-place", O15, Corruption, Warning, false, Invalid, *at]
        "the batmap (byte {offset}, {bytes} bytes) does not lie in the file of {len} bytes";
    /// The checksum of XenServer's batmap does not fit.
    BatmapChecksum { at: u64, stored: u32, computed: u32 }
        ["batmap-checksum", O15, Corruption, Warning, true, Invalid, relative at]
        "the batmap's checksum is {stored:#010x}, its bytes give {computed:#010x}";
    /// XenServer's batmap calls a block whole that is not.
    BatmapWrong { at: u64, block: u32 }
        ["batmap-wrong", _, Corruption, Warning, true, Invalid, *at]
        "the batmap calls block {block} whole, which it is not";
    /// The data is encrypted.
    Encrypted { at: u64 }
        ["encrypted", O15, Cosmetic, NotReadable, false, Refused, relative at]
        "the data is encrypted by XenServer; decrypt it there";
    /// A machine is suspended on this disk.
    SavedState { at: u64 }
        ["saved-state", O16, Cosmetic, NotWritable, false, Refused, *at]
        "a machine is suspended on this disk; writing would break it";
    /// Marked as the inner node of a chain.
    Hidden { at: u64 }
        ["hidden", O16, Cosmetic, NotWritable, false, Refused, *at]
        "marked as the inner node of a chain; writing would break its children";
}
}

/// So many more of the same.
struct AndMore(u64);

impl fmt::Display for AndMore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " (and {} more)", self.0) }
    }
}

/// What a path that cannot be used was recorded as: in a locator, or as the name in the header.
fn recorded_path(slot: Option<usize>, text: &str) -> String {
    match slot {
        Some(slot) => format!("path {text:?} of parent locator {slot}"),
        None => format!("parent's name {text:?} in the header"),
    }
}

fn tried_paths(tried: &[String]) -> String {
    if tried.is_empty() { String::new() } else { format!("; tried {}", tried.join(", ")) }
}

impl From<Defect> for Error {
    fn from(defect: Defect) -> Error {
        let error = Error::new(defect.error_kind(), defect.to_string());
        match defect.offset() {
            Some(at) => error.at_offset(at),
            None => error,
        }
    }
}

#[cfg(test)]
#[path = "defect_tests.rs"]
mod tests;
