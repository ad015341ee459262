//! XenServer's batmap: one bit for each block, set if the block is whole. It follows the BAT of images made by `tap`.
//!
//! diffdisk does not read blocks by the batmap. But the batmap takes space in the file, its checksum must be right
//! after a resize, and its header records whether the data is encrypted (format 5.1, O15).

use std::ops::Range;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::bat;
use crate::format::checksum::checksum;
use crate::format::defect::Defect;
use crate::format::footer::{DiskType, Footer};
use crate::format::header::DynamicHeader;
use crate::units::{BlockIndex, SECTOR};

const COOKIE: [u8; 8] = *b"tdbatmap";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBatmapHeader {
    cookie: [u8; 8],
    offset: U64,
    sectors: U32,
    version: U32,
    checksum: U32,
    marker: u8,
    keyhash: u8,
    rest: [u8; 482],
}

/// A decoded batmap header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatmapHeader {
    /// Byte offset of the map.
    pub offset: u64,
    /// Sectors of the map.
    pub sectors: u32,
    /// Version, 16.16.
    pub version: u32,
    /// Checksum of the map's first bytes.
    pub checksum: u32,
    /// XenServer's general flag.
    pub marker: u8,
    /// 1 if the hash of an encryption key follows.
    pub keyhash: u8,
    /// Nonce, hash and zeros, kept as they are.
    pub rest: [u8; 482],
}

/// Whether an image has a batmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BatmapPresence {
    /// The image has no batmap.
    Absent,
    /// The image has a batmap (version 1.1) only if a batmap header follows the BAT.
    Perhaps,
    /// The image has a batmap.
    Present,
}

/// Returns whether an image has a batmap, by the creator and the creator's version in its footer.
pub fn presence(footer: &Footer) -> BatmapPresence {
    let tap = footer.creator_is_tap() && footer.disk_type != DiskType::Fixed;
    match footer.creator_version {
        version if !tap || version <= 0x0000_0001 => BatmapPresence::Absent,
        version if version <= 0x0001_0001 => BatmapPresence::Perhaps,
        _ => BatmapPresence::Present,
    }
}

/// Returns the byte offset of the batmap's header, directly after the BAT; `None` on overflow.
pub fn header_offset(header: &DynamicHeader) -> Option<u64> {
    header.table_offset.checked_add(bat::bytes(header.entries))
}

impl BatmapHeader {
    /// Decodes the 512 bytes of a header.
    ///
    /// # Errors
    /// [`Defect::BatmapHeader`], at offset 0.
    pub fn decode(bytes: &[u8; 512]) -> Result<BatmapHeader, Defect> {
        let raw: &RawBatmapHeader = zerocopy::transmute_ref!(bytes);
        if raw.cookie != COOKIE {
            return Err(Defect::BatmapHeader { at: 0 });
        }
        Ok(BatmapHeader {
            offset: raw.offset.get(),
            sectors: raw.sectors.get(),
            version: raw.version.get(),
            checksum: raw.checksum.get(),
            marker: raw.marker,
            keyhash: raw.keyhash,
            rest: raw.rest,
        })
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; 512] {
        zerocopy::transmute!(RawBatmapHeader {
            cookie: COOKIE,
            offset: self.offset.into(),
            sectors: self.sectors.into(),
            version: self.version.into(),
            checksum: self.checksum.into(),
            marker: self.marker,
            keyhash: self.keyhash,
            rest: self.rest,
        })
    }

    /// Returns the byte range of the map in a file of `len` bytes. `at` is the offset of this header, for the defect.
    ///
    /// # Errors
    /// [`Defect::BatmapPlace`] if the map lies outside the file.
    pub fn region(&self, at: u64, len: u64) -> Result<Range<u64>, Defect> {
        let bytes = u64::from(self.sectors) * SECTOR;
        match self.offset.checked_add(bytes) {
            Some(end) if end <= len => Ok(self.offset..end),
            _ => Err(Defect::BatmapPlace { at, offset: self.offset, bytes, len }),
        }
    }

    /// Returns whether the data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.keyhash == 1
    }

    /// Returns the number of bytes that the checksum of the map covers, for a disk of `size` bytes.
    pub fn checksummed_bytes(size: u64) -> u64 {
        (size >> 24).max(1).next_multiple_of(SECTOR)
    }

    /// Returns the checksum of a map. `map` holds the bytes that the checksum covers.
    pub fn checksum_of(&self, map: &[u8]) -> u32 {
        if self.version != 0x0001_0001 {
            return checksum(map, 0..0);
        }
        // Version 1.1 summed signed bytes, so a byte of value 128 or more adds 256 less to the sum. The checksum is the
        // inverted sum, and so is greater by 256 for each such byte.
        let high = map.iter().filter(|&&byte| byte >= 128).fold(0u32, |n, _| n.wrapping_add(256));
        checksum(map, 0..0).wrapping_add(high)
    }

    /// Compares the checksum with `map`, the first [`BatmapHeader::checksummed_bytes`] of the map.
    ///
    /// # Errors
    /// [`Defect::BatmapChecksum`], at offset 0.
    pub fn verify(&self, map: &[u8]) -> Result<(), Defect> {
        let computed = self.checksum_of(map);
        if computed == self.checksum {
            return Ok(());
        }
        Err(Defect::BatmapChecksum { at: 0, stored: self.checksum, computed })
    }
}

/// Returns whether the map marks a block whole. Blocks after the end of the map are not whole.
pub fn is_whole(map: &[u8], block: BlockIndex) -> bool {
    map.get(block.as_usize() / 8).is_some_and(|byte| byte << (block.get() % 8) & 0x80 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockSize;
    use uuid::Uuid;

    fn tap(version: u32) -> Footer {
        let footer = Footer::new(DiskType::Dynamic, 1 << 24, Uuid::nil(), 0);
        Footer { creator: *b"tap\0", creator_version: version, ..footer }
    }

    #[test]
    fn the_creator_version_decides_whether_there_is_one() {
        let by_version = [
            (0, BatmapPresence::Absent),
            (0x0000_0001, BatmapPresence::Absent),
            (0x0001_0001, BatmapPresence::Perhaps),
            (0x0001_0002, BatmapPresence::Present),
            (0x0001_0003, BatmapPresence::Present),
        ];
        for (version, expected) in by_version {
            assert_eq!(presence(&tap(version)), expected, "{version:#x}");
        }
        assert_eq!(presence(&Footer { creator: *b"win ", ..tap(0x0001_0003) }), BatmapPresence::Absent);
        assert_eq!(header_offset(&DynamicHeader::new(1536, 129, BlockSize::DEFAULT)), Some(2560));
        assert_eq!(header_offset(&DynamicHeader::new(u64::MAX, 1, BlockSize::DEFAULT)), None);
    }

    #[test]
    fn a_header_by_vhd_util_is_decoded() {
        let mut bytes = [0; 512];
        bytes[..28].copy_from_slice(b"tdbatmap\0\0\0\0\0\0\x0a\0\0\0\0\x01\0\x01\0\x02\xff\xff\xff\xff");
        let header = BatmapHeader::decode(&bytes).unwrap();
        assert_eq!((header.offset, header.sectors, header.version), (0xA00, 1, 0x0001_0002));
        assert_eq!(header.verify(&[0; 512]), Ok(()));
        let wrong = Defect::BatmapChecksum { at: 0, stored: u32::MAX, computed: !0x80 };
        assert_eq!(header.verify(&[0x80]), Err(wrong));
        assert_eq!((header.encode(), header.is_encrypted()), (bytes, false));
        assert_eq!(header.region(2048, 0xC00), Ok(0xA00..0xC00));
        assert!(header.region(2048, 0xBFF).is_err());
        let outside = BatmapHeader { offset: u64::MAX, sectors: u32::MAX, ..header.clone() };
        assert!(outside.region(2048, u64::MAX).is_err());
        bytes[29] = 1;
        assert!(BatmapHeader::decode(&bytes).unwrap().is_encrypted());
        // Version 1.1 counted 0x80 as -128.
        let old = BatmapHeader { version: 0x0001_0001, checksum: !0u32.wrapping_sub(128), ..header };
        assert_eq!(old.verify(&[0x80]), Ok(()));
        bytes[0] = 0;
        assert_eq!(BatmapHeader::decode(&bytes), Err(Defect::BatmapHeader { at: 0 }));
    }

    #[test]
    fn bits_and_checksummed_lengths() {
        assert_eq!((BatmapHeader::checksummed_bytes(1), BatmapHeader::checksummed_bytes(1 << 33)), (512, 512));
        assert_eq!(BatmapHeader::checksummed_bytes((1 << 33) + (1 << 24)), 1024);
        let map = [0b0100_0000, 0b0000_0001];
        assert_eq!((0..17).filter(|&block| is_whole(&map, BlockIndex::new(block))).collect::<Vec<_>>(), [1, 15]);
    }
}
