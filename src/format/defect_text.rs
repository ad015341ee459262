//! Defects in words for people, and as errors.

use std::fmt;

use crate::error::{Error, ErrorKind};
use crate::format::defect::Defect;

use Defect as D;

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            D::NotRegular => write!(f, "not a regular file"),
            D::FileTooShort { len } => write!(f, "the file is too short: {len} bytes; the smallest image has 512"),
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
            D::FixedMore { size, data } => write!(
                f,
                "a fixed disk of {size} bytes in a file that holds {data} bytes of data: no guest sees the {} bytes after \
                 the end of the disk",
                data - size
            ),
            D::FixedPadded { padding, .. } => write!(
                f,
                "a padded fixed disk: {padding} zeros follow its footer. It is not opened, since a guest can write such \
                 bytes to a raw disk; if it is a fixed VHD, `check --repair` cuts the padding off"
            ),
            D::OtherFormat { format } => {
                let (name, driver) = (format.name(), format.qemu_driver());
                write!(
                    f,
                    "a {name} image, not a VHD; QEMU converts it: `qemu-img convert -f {driver} -O vpc -o force_size=on \
                     SOURCE DESTINATION`"
                )
            }
            D::FooterKindsDiffer { front, end, .. } => write!(
                f,
                "the two footers are valid, but the one at the start says {front} and the one at the end {end}; `check \
                 --repair --take front` or `--take end` chooses"
            ),
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
                write!(f, "a block size of {size} bytes; it must be a power of two from 4 KiB to 256 MiB")
            }
            D::TableTooSmall { entries, blocks, .. } => {
                write!(f, "the block table has {entries} entries for a disk of {blocks} blocks")
            }
            D::TableTooLarge { entries, limit, .. } => {
                write!(f, "the block table needs {entries} entries; at most {limit} are read")
            }
            D::TableUnaligned { offset, .. } => {
                write!(f, "the block table would begin at {offset}, which is no multiple of 512")
            }
            D::TableOutside { offset, bytes, len, .. } => {
                write!(f, "the block table ({bytes} bytes at {offset}) does not lie in the file of {len} bytes")
            }
            D::TableOverlaps { offset, bytes, part, .. } => {
                write!(f, "the block table ({bytes} bytes at {offset}) overlaps the {part}")
            }
            D::BlockInMetadata { block, part, .. } => write!(f, "block {block} overlaps the {part}"),
            D::BlockBeyondEnd { block, end, limit, .. } => {
                write!(f, "block {block} ends at byte {end}; the data ends at {limit}")
            }
            D::EntryZero { block, entries, .. } => {
                let more = AndMore(*entries - 1);
                write!(f, "the table entry of block {block}{more} is 0, where no block can begin; it is read as unused")
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
            D::BlockCutOff { block, sectors, .. } => write!(
                f,
                "{sectors} sectors of block {block} are lost: the file was cut off before them. Restore the image from a \
                 whole copy; `convert --salvage` copies what is left"
            ),
            D::BitsBeyondDisk { block, bits, .. } => write!(
                f,
                "the bitmap of block {block}, the last one, marks {bits} sectors present that lie behind the end of the \
                 disk"
            ),
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
            D::ParentUnnamed => {
                write!(f, "no usable path to the parent is recorded; link it with `diffdisk rebase --unsafe`")
            }
            D::ParentMissing { tried } => {
                write!(f, "the parent is not there")?;
                if !tried.is_empty() {
                    write!(f, "; tried {}", tried.join(", "))?;
                }
                write!(
                    f,
                    ". If it was moved or renamed, give its folder with --allow-parents, or link the child to it with \
                     `diffdisk rebase --unsafe`"
                )
            }
            D::ParentUuid { file, recorded, found } => write!(
                f,
                "the parent must have UUID {recorded}, and {file} has {found}: another image, or one that was made \
                 again. Only if it holds the parent's very data, link the child to it with `diffdisk rebase --unsafe`"
            ),
            D::ParentRaw => write!(f, "the recorded parent is a raw file, which a VHD must not choose"),
            D::ParentSize { child, parent } => {
                write!(f, "the disk has {child} bytes, its parent {parent}")
            }
            D::ParentChanged { recorded, found } => write!(
                f,
                "the parent's file was changed {} seconds after the time that the child records: harmless where it was \
                 copied, touched or merged into; where its contents changed, so did the child's",
                found.saturating_sub(*recorded)
            ),
            D::ParentHidden { block, sector, .. } => write!(
                f,
                "block {block} was placed by another program and marked whole: zeros hide data of the parent, from sector \
                 {sector} of the block on. QEMU does that when it writes to a differencing VHD, which it takes for a \
                 dynamic one"
            ),
            D::PlacedByAnother { block, blocks, .. } => {
                let more = AndMore(*blocks - 1);
                write!(
                    f,
                    "block {block}{more} was placed by another program than the image's own writer, and marked whole. QEMU \
                     does that when it writes to a differencing VHD, which it takes for a dynamic one, and so hides the \
                     parent's data; `check --chain` tells whether it did"
                )
            }
            D::ZerosOverParent { block, blocks, .. } => {
                let more = AndMore(*blocks - 1);
                write!(
                    f,
                    "block {block}{more} is marked whole and holds zeros over data of the parent: the guest has zeroed it, or \
                     QEMU has written to the image, which it takes for a dynamic one"
                )
            }
            D::ChainTooDeep { limit } => write!(f, "the chain has more than {limit} files; merge some"),
            D::ChainCycle { file } => write!(f, "the chain is a cycle: it comes back to {file}"),
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
                write!(f, "the batmap calls block {block} whole, which it is not")
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

/// So many more of the same.
struct AndMore(u64);

impl fmt::Display for AndMore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " (and {} more)", self.0) }
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
            D::OtherFormat { .. } => ErrorKind::Unsupported,
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
        let e = Error::from(Defect::FooterCookie { at: 0 }.with_base_offset(4096));
        assert_eq!((e.kind(), e.offset()), (ErrorKind::Invalid, Some(4096)));
        assert_eq!(Error::from(Defect::ParentRaw).kind(), ErrorKind::Refused);
        assert_eq!(Error::from(Defect::ParentMissing { tried: Vec::new() }).kind(), ErrorKind::NotFound);
        assert_eq!(Error::from(Defect::NoPlace { end: 1 << 41 }).kind(), ErrorKind::NoSpace);
        let e = Error::from(Defect::BlockDuplicate { block: 7, other: 3, entry: 16 });
        assert_eq!(e.offset(), Some(8192));
        assert!(e.to_string().starts_with("blocks 7 and 3 share one place"), "{e}");
        let nested = Defect::TrailingFooterInvalid { at: 9, reason: Box::new(Defect::FooterCookie { at: 9 }) };
        assert!(nested.to_string().contains("damaged (no footer here"), "{nested}");
    }
}
