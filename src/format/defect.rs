//! The table of defects: every way in which the bytes of an image can be wrong.
//!
//! One row declares one defect. The macro `defects!` in `defect_rule` explains the columns.

use std::fmt;

use uuid::Uuid;

use crate::error::{Error, ErrorKind};
use crate::format::bat::BlockPlace;
use crate::format::defect_rule::{Consequence, Severity, defects};
use crate::format::image_format::ImageFormat;
use crate::format::metadata_part::MetadataPart;
use crate::units::{BlockIndex, SECTOR};

defects! {
/// A broken rule of the format, with the numbers that break it. `at` is a byte offset in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the fields are the numbers of the sentence that Display makes of them")]
pub enum Defect {
    /// The file is not a regular file.
    NotRegular
        ["not-regular", O1, Corruption, NotReadable, false, Refused, none]
        "not a regular file";
    /// The file is too short for a footer.
    FileTooShort { len: u64 }
        ["file-too-short", O2, Corruption, NotReadable, false, Invalid, none]
        "the file is too short: {len} bytes; the smallest image has 512";
    /// There is no footer at the end, and no usable copy at the start.
    FooterMissing { len: u64 }
        ["footer-missing", O3, Corruption, NotReadable, false, Invalid, none]
        "the file has no footer at its end and no usable copy of one at its start";
    /// The bytes are not a footer.
    FooterCookie { at: u64 }
        ["footer-cookie", _, Corruption, NotReadable, false, Invalid, relative at]
        "no footer here: it does not begin with \"conectix\"";
    /// The footer was marked by a `vhd-util resize` that did not finish.
    Poisoned { at: u64 }
        ["poisoned", _, Corruption, NotReadable, false, Refused, relative at]
        "a resize by vhd-util was interrupted: finish it, or undo it with `vhd-util revert` and its journal";
    /// The checksum in the footer does not match its bytes.
    FooterChecksum { at: u64, stored: u32, computed: u32 }
        ["footer-checksum", O4, Corruption, NotReadable, false, Invalid, relative at]
        "the footer stores checksum {stored:#010x}, but its bytes give {computed:#010x}";
    /// The major version of the format in the footer is not 1.
    FooterVersion { at: u64, version: u32 }
        ["footer-version", O4, Corruption, NotReadable, false, Invalid, relative at]
        "format version {}.{} is not supported; only 1.x is", version >> 16, version & 0xFFFF;
    /// The disk type is not fixed, dynamic or differencing.
    DiskType { at: u64, code: u32 }
        ["disk-type", O4, Corruption, NotReadable, false, Invalid, relative at]
        "disk type {code} is not supported; supported are 2 (fixed), 3 (dynamic) and 4 (differencing)";
    /// The virtual size is not allowed.
    DiskSize { at: u64, size: u64 }
        ["disk-size", O5, Corruption, NotReadable, false, Invalid, relative at]
        "virtual size of {size} bytes: it must be a multiple of 512 from 512 bytes to 2040 GiB";
    /// A fixed disk has less data than its size.
    FixedTooShort { size: u64, data: u64 }
        ["fixed-too-short", O2, Corruption, NotReadable, false, Invalid, *data]
        "the fixed disk has {size} bytes, but the file holds only {data} bytes of data";
    /// A fixed disk has more data than its size.
    FixedMore { size: u64, data: u64 }
        ["fixed-more", _, Cosmetic, Warning, false, Invalid, *data]
        "the file holds {data} bytes of data for a fixed disk of {size} bytes; a guest does not see the {} bytes after the \
         end of the disk", data - size;
    /// Zeros follow the footer of a fixed disk.
    FixedPadded { at: u64, padding: u64 }
        ["fixed-padded", _, Cosmetic, NotReadable, true, Invalid, *at]
        "a padded fixed disk: {padding} zero bytes follow its footer. The file is not opened, because a guest can write \
         the same bytes to a raw disk; if it is a fixed VHD, `check --repair` removes the padding";
    /// The file is an image of another format.
    OtherFormat { format: ImageFormat }
        ["other-format", _, Corruption, NotReadable, false, Unsupported, none]
        "a {} image, not a VHD; convert it with QEMU: `qemu-img convert -f {} -O vpc -o force_size=on SOURCE \
         DESTINATION`", format.name(), format.qemu_driver();
    /// Both footers are valid but differ in a field with consequences.
    FootersDiffer { at: u64, field: &'static str }
        ["footers-differ", O3, Corruption, NotWritable, true, Invalid, *at]
        "both footers are valid but differ in the {field}; the one at the end is used, and the image is read-only \
         until `check --repair`";
    /// Both footers are valid but have different disk types.
    FooterKindsDiffer { at: u64, front: &'static str, end: &'static str }
        ["footer-kinds-differ", O3, Corruption, NotWritable, false, Invalid, *at]
        "both footers are valid, but the one at the start has the disk type {front} and the one at the end {end}; \
         choose with `check --repair --take front` or `--take end`";
    /// Both footers are valid and differ in bytes without consequence.
    FooterCopyStale
        ["footer-copy-stale", _, Cosmetic, Warning, true, Invalid, 0]
        "the copy of the footer at the start differs from the footer at the end in bytes without consequence";
    /// A dynamic or differencing image has no footer at its end.
    TrailingFooterMissing { len: u64 }
        ["trailing-footer-missing", O3, Corruption, Warning, true, Invalid, *len]
        "the footer at the end is missing (the image was not closed cleanly); the copy at the start is used";
    /// The footer at the end of a dynamic or differencing image is damaged.
    TrailingFooterInvalid { at: u64, reason: Box<Defect> }
        ["trailing-footer-invalid", O3, Corruption, Warning, true, Invalid, *at]
        "the footer at the end is damaged ({reason}); the copy at the start is used";
    /// The copy of the footer at the start of a dynamic or differencing image is damaged.
    FrontFooterInvalid { reason: Box<Defect> }
        ["front-footer-invalid", O3, Corruption, Warning, true, Invalid, 0]
        "the copy of the footer at the start is damaged: {reason}";
    /// The footer has 511 bytes, as programs wrote it before 2004.
    ShortFooter { at: u64 }
        ["short-footer", _, Cosmetic, Warning, true, Invalid, *at]
        "the footer has 511 bytes, as programs wrote it before 2004";
    /// The dynamic header cannot be at the offset that the footer records.
    HeaderPlace { offset: u64, len: u64 }
        ["header-place", O6, Corruption, NotReadable, false, Invalid, len.saturating_sub(SECTOR)]
        "the dynamic header cannot be at byte {offset}: it must begin at a multiple of 512, after the first footer, \
         and end within the file of {len} bytes";
    /// The bytes are not a dynamic header.
    HeaderCookie { at: u64 }
        ["header-cookie", O7, Corruption, NotReadable, false, Invalid, relative at]
        "no dynamic header here: it does not begin with \"cxsparse\"";
    /// The checksum in the dynamic header does not match its bytes.
    HeaderChecksum { at: u64, stored: u32, computed: u32 }
        ["header-checksum", O7, Corruption, NotReadable, false, Invalid, relative at]
        "the dynamic header stores checksum {stored:#010x}, but its bytes give {computed:#010x}";
    /// The dynamic header has another version.
    HeaderVersion { at: u64, version: u32 }
        ["header-version", O7, Corruption, NotReadable, false, Invalid, relative at]
        "dynamic header version {version:#010x} is not supported; only 0x00010000 is";
    /// The block size is not allowed.
    BlockSize { at: u64, size: u32 }
        ["block-size", O8, Corruption, NotReadable, false, Invalid, relative at]
        "block size of {size} bytes: it must be a power of two from 4 KiB to 256 MiB";
    /// The BAT has fewer entries than the disk has blocks.
    TableTooSmall { at: u64, entries: u32, blocks: u64 }
        ["table-too-small", O9, Corruption, NotReadable, false, Invalid, *at]
        "the block table has {entries} entries, but the disk has {blocks} blocks";
    /// The BAT is larger than the limit.
    TableTooLarge { at: u64, entries: u64, limit: u64 }
        ["table-too-large", O9, Corruption, NotReadable, false, Refused, *at]
        "the block table has {entries} entries; at most {limit} are supported";
    /// The BAT does not begin at a multiple of 512.
    TableUnaligned { at: u64, offset: u64 }
        ["table-unaligned", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table begins at byte {offset}, which is not a multiple of 512";
    /// The BAT lies outside the file.
    TableOutside { at: u64, offset: u64, bytes: u64, len: u64 }
        ["table-outside", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table ({bytes} bytes at {offset}) lies outside the file of {len} bytes";
    /// The BAT overlaps the copy of the footer or the header.
    TableOverlaps { at: u64, offset: u64, bytes: u64, part: MetadataPart }
        ["table-overlaps", O10, Corruption, NotReadable, false, Invalid, *at]
        "the block table ({bytes} bytes at {offset}) overlaps the {part}";
    /// A block overlaps metadata.
    BlockInMetadata { block: BlockIndex, entry: BlockPlace, part: MetadataPart }
        ["block-in-metadata", O12, Corruption, NotReadable, false, Invalid, entry.sector().byte_offset()]
        "block {block} overlaps the {part}";
    /// A block ends after the end of the data although a footer follows the data, and its bitmap marks no sector there
    /// as present.
    BlockBeyondEnd { block: BlockIndex, entry: BlockPlace, end: u64, limit: u64 }
        ["block-beyond-end", O12, Corruption, NotWritable, false, Invalid, entry.sector().byte_offset()]
        "block {block} ends at byte {end}, after the end of the data at byte {limit}";
    /// Two blocks have the same place.
    BlockDuplicate { block: BlockIndex, other: BlockIndex, entry: BlockPlace }
        ["block-duplicate", O13, Corruption, NotReadable, false, Invalid, entry.sector().byte_offset()]
        "blocks {block} and {other} share one place; a write to one would change the other";
    /// Two blocks overlap.
    BlockOverlap { block: BlockIndex, entry: BlockPlace, other: BlockIndex, other_entry: BlockPlace }
        ["block-overlap", O13, Corruption, NotReadable, false, Invalid, entry.sector().byte_offset()]
        "blocks {block} and {other} overlap; a write to one would change the other";
    /// The BAT gives a place to a block after the end of the disk.
    BlockBeyondDisk { block: BlockIndex, entry: BlockPlace, blocks: u64 }
        ["block-beyond-disk", _, Cosmetic, Warning, true, Invalid, entry.sector().byte_offset()]
        "the block table gives a place to block {block}, but the disk has {blocks} blocks";
    /// BAT entries are 0, where no block can begin; they are read as unused. `block` is the first.
    EntryZero { block: BlockIndex, entries: u64, at: u64 }
        ["entry-zero", _, Cosmetic, Warning, true, Invalid, *at]
        "the table entry of block {block}{} is 0, where no block can begin; it is read as unused",
        AndMore(entries - 1);
    /// Sectors of a block are lost: the data ends before these sectors, and the block's bitmap marks them as present or
    /// is itself lost.
    BlockCutOff { block: BlockIndex, sectors: u64, at: u64 }
        ["block-cut-off", O12, Corruption, NotReadable, false, Invalid, *at]
        "{sectors} sectors of block {block} are lost: the file was truncated before them. Restore the image from a \
         complete copy; `convert --salvage` copies what is left";
    /// The bitmap of the last block marks sectors after the end of the disk as present, in a bitmap sector that has
    /// other bits clear.
    BitsBeyondDisk { block: BlockIndex, bits: u32, at: u64 }
        ["bits-beyond-disk", _, Cosmetic, Warning, true, Invalid, *at]
        "the bitmap of the last block ({block}) marks {bits} sectors after the end of the disk as present";
    /// No place below 2 TiB is left for a block.
    NoPlace { end: u64 }
        ["no-place", O14, Corruption, NotWritable, false, NoSpace, none]
        "no place below 2 TiB is left for another block (the data ends at byte {end}); compact the image";
    /// No block and no metadata uses this space.
    SpaceUnreferenced { offset: u64, bytes: u64 }
        ["space-unreferenced", _, Leak, Warning, true, Invalid, *offset]
        "no block and no metadata uses {bytes} bytes";
    /// A sector that the bitmap marks as absent holds data.
    DataUnderClearBit { block: BlockIndex, sector: u64, at: u64 }
        ["data-under-clear-bit", _, Cosmetic, Warning, false, Invalid, *at]
        "sector {sector} of block {block} holds data but is marked absent; programs differ in how they read it";
    /// A parent locator has an unknown platform code.
    LocatorPlatform { slot: usize, code: u32 }
        ["locator-platform", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} has the unknown platform code {code:#010x} and is skipped";
    /// A parent locator is longer than any path.
    LocatorLength { slot: usize, length: u32 }
        ["locator-length", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} has {length} bytes, more than 4096, and is skipped";
    /// The text of a parent locator lies outside the file or over other metadata.
    LocatorPlace { slot: usize, offset: u64, length: u32 }
        ["locator-place", O11, Cosmetic, Warning, false, Invalid, none]
        "parent locator {slot} ({length} bytes at {offset}) lies outside the file or over other metadata and is \
         skipped";
    /// A recorded path to the parent cannot be used; `slot` is `None` for the name in the header.
    ParentPath { slot: Option<usize>, text: String, why: &'static str }
        ["parent-path", O11, Cosmetic, Warning, false, Invalid, none]
        "the {} cannot be used: {why}", recorded_path(*slot, text);
    /// A differencing image records no usable path to its parent.
    ParentUnnamed
        ["parent-unnamed", _, Corruption, NotReadable, false, Invalid, none]
        "no usable path to the parent is recorded; link the image to its parent with `diffdisk rebase --unsafe`";
    /// None of the recorded paths leads to the parent.
    ParentMissing { tried: Vec<String> }
        ["parent-missing", _, Corruption, NotReadable, false, NotFound, none]
        "the parent is not there{}. If it was moved or renamed, give its folder with --allow-parents, or link the \
         child to it with `diffdisk rebase --unsafe`", tried_paths(tried);
    /// The file at a recorded path has another UUID than the parent.
    ParentUuid { file: String, recorded: Uuid, found: Uuid }
        ["parent-uuid", O17, Corruption, NotReadable, false, Invalid, none]
        "the parent must have UUID {recorded}, but {file} has {found}: it is another image, or was made again. Link \
         the child to it with `diffdisk rebase --unsafe` only if it holds exactly the parent's data";
    /// The parent is a raw file, in XenServer's dialect.
    ParentRaw
        ["parent-raw", _, Corruption, NotReadable, false, Refused, none]
        "the recorded parent is a raw file, which a VHD may not name as its parent";
    /// The parent's virtual size differs from the child's.
    ParentSize { child: u64, parent: u64 }
        ["parent-size", _, Note, Warning, false, Invalid, none]
        "the disk has {child} bytes, its parent has {parent}";
    /// The parent's file was changed after the time that the child records (seconds since 2000).
    ParentChanged { recorded: u32, found: u32 }
        ["parent-changed", _, Note, Warning, false, Invalid, none]
        "the parent's file was changed {} seconds after the time that the child records. This is harmless if the file \
         was copied, touched or merged into; if its contents changed, so did the child's disk",
        found.saturating_sub(*recorded);
    /// Another program marked a block whole, and its zeros hide data of the parent. QEMU writes to children in this
    /// way.
    ParentHidden { block: BlockIndex, sector: u64, at: u64 }
        ["parent-hidden", _, Corruption, Warning, false, Invalid, *at]
        "block {block} was placed by another program and marked whole: its zeros hide data of the parent, from sector \
         {sector} of the block on. QEMU does this when it writes to a differencing VHD, which it takes for a dynamic \
         one";
    /// Whole blocks are not where the image's own writer would have placed them; `block` is the first.
    PlacedByAnother { block: BlockIndex, blocks: u64, at: u64 }
        ["placed-by-another", _, Cosmetic, Warning, false, Invalid, *at]
        "block {block}{} was placed by another program than the image's own writer, and marked whole. QEMU does this \
         when it writes to a differencing VHD, which it takes for a dynamic one, and so hides the parent's data; \
         `check --chain` reports whether it did", AndMore(blocks - 1);
    /// Whole blocks hold zeros over data of the parent; `block` is the first.
    ZerosOverParent { block: BlockIndex, blocks: u64, at: u64 }
        ["zeros-over-parent", _, Note, Warning, false, Invalid, *at]
        "block {block}{} is marked whole and holds zeros over data of the parent: either the guest zeroed it, or QEMU \
         wrote to the image, which it takes for a dynamic one", AndMore(blocks - 1);
    /// The chain has too many files.
    ChainTooDeep { limit: usize }
        ["chain-too-deep", O17, Corruption, NotReadable, false, Refused, none]
        "the chain has more than {limit} files; merge some of them";
    /// The chain leads back to one of its files.
    ChainCycle { file: String }
        ["chain-cycle", O17, Corruption, NotReadable, false, Invalid, none]
        "the chain is a cycle: it leads back to {file}";
    /// Two files of a chain have the same UUID.
    ChainUuidTwice { uuid: Uuid }
        ["chain-uuid-twice", O17, Corruption, NotReadable, false, Invalid, none]
        "two files of the chain have UUID {uuid}";
    /// The BATs of a chain are too large together.
    ChainTablesTooLarge { bytes: u64, limit: u64 }
        ["chain-tables-too-large", O17, Corruption, NotReadable, false, Refused, none]
        "the block tables of the chain have {bytes} bytes together, more than {limit}";
    /// The header of XenServer's batmap is damaged or missing.
    BatmapHeader { at: u64 }
        ["batmap-header", O15, Corruption, Warning, false, Invalid, relative at]
        "the header of the batmap is damaged or missing";
    /// XenServer's batmap lies outside the file.
    BatmapPlace { at: u64, offset: u64, bytes: u64, len: u64 }
        ["batmap-place", O15, Corruption, Warning, false, Invalid, *at]
        "the batmap ({bytes} bytes at {offset}) lies outside the file of {len} bytes";
    /// The checksum of XenServer's batmap does not match its bytes.
    BatmapChecksum { at: u64, stored: u32, computed: u32 }
        ["batmap-checksum", O15, Corruption, Warning, true, Invalid, relative at]
        "the batmap's checksum is {stored:#010x}, but its bytes give {computed:#010x}";
    /// XenServer's batmap marks a block whole that is not whole.
    BatmapWrong { at: u64, block: BlockIndex }
        ["batmap-wrong", _, Corruption, Warning, true, Invalid, *at]
        "the batmap marks block {block} whole, which it is not";
    /// The data is encrypted.
    Encrypted { at: u64 }
        ["encrypted", O15, Cosmetic, NotReadable, false, Refused, relative at]
        "the data is encrypted by XenServer; decrypt it there";
    /// A virtual machine is suspended on this disk.
    SavedState { at: u64 }
        ["saved-state", O16, Cosmetic, NotWritable, false, Refused, *at]
        "a virtual machine is suspended on this disk; writing would corrupt its state";
    /// The image is marked as an inner node of a chain.
    Hidden { at: u64 }
        ["hidden", O16, Cosmetic, NotWritable, false, Refused, *at]
        "marked as an inner node of a chain; writing would corrupt its children";
}
}

/// Prints how many more blocks have the same defect.
struct AndMore(u64);

impl fmt::Display for AndMore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " (and {} more)", self.0) }
    }
}

/// Describes where an image records a path: in a locator, or in the header.
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
