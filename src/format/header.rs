//! The dynamic header: the 1024 bytes that describe a dynamic or differencing disk. The file contains no second copy of
//! the header.
//!
//! The field `data offset` is kept but never followed. Format 3 has the offsets of the fields.

use uuid::Uuid;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::checksum::checksum;
use crate::format::defect::Defect;
use crate::format::locator::LocatorEntry;
use crate::units::BlockSize;

/// Size of a dynamic header in bytes.
pub const HEADER_BYTES: u64 = 1024;
/// Number of parent locators in a header.
pub const LOCATORS: usize = 8;

const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x0001_0000;
const CHECKSUM_AT: usize = 36;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLocator {
    platform: U32,
    space: U32,
    length: U32,
    reserved: U32,
    offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDynamicHeader {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    entries: U32,
    block_size: U32,
    checksum: U32,
    parent_uuid: [u8; 16],
    parent_timestamp: U32,
    reserved: U32,
    parent_name: [u8; 512],
    locators: [RawLocator; LOCATORS],
    reserved_end: [u8; 256],
}

/// A decoded dynamic header. All fields are as in the file; cookie, version and checksum are implied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DynamicHeader {
    /// All ones. Kept, never followed.
    pub data_offset: u64,
    /// Byte offset of the BAT.
    pub table_offset: u64,
    /// Number of BAT entries: at least one for each block of the disk.
    pub entries: u32,
    /// Data bytes of a block.
    pub block_size: BlockSize,
    /// The parent's UUID.
    pub parent_uuid: Uuid,
    /// The parent file's modification time, seconds since 2000. Never trusted.
    pub parent_timestamp: u32,
    /// Kept as it is.
    pub reserved: u32,
    /// The parent's name, UTF-16 big-endian, padded with zeros.
    pub parent_name: [u8; 512],
    /// The parent locators: positions and lengths of the paths to the parent.
    pub locators: [LocatorEntry; LOCATORS],
    /// Kept as it is.
    pub reserved_end: [u8; 256],
}

impl DynamicHeader {
    /// Creates the header of a new disk without a parent.
    pub fn new(table_offset: u64, entries: u32, block_size: BlockSize) -> DynamicHeader {
        DynamicHeader {
            data_offset: u64::MAX,
            table_offset,
            entries,
            block_size,
            parent_uuid: Uuid::nil(),
            parent_timestamp: 0,
            reserved: 0,
            parent_name: [0; 512],
            locators: [LocatorEntry::UNUSED; LOCATORS],
            reserved_end: [0; 256],
        }
    }

    /// Decodes the 1024 bytes of a header. Does not check whether the BAT fits in the file.
    ///
    /// # Errors
    /// The first of these, at offset 0 (O7, O8):
    /// - [`Defect::HeaderCookie`]
    /// - [`Defect::HeaderChecksum`]
    /// - [`Defect::HeaderVersion`]
    /// - [`Defect::BlockSize`]
    pub fn decode(bytes: &[u8; 1024]) -> Result<DynamicHeader, Defect> {
        let raw: &RawDynamicHeader = zerocopy::transmute_ref!(bytes);
        if raw.cookie != COOKIE {
            return Err(Defect::HeaderCookie { at: 0 });
        }
        let computed = checksum(bytes, CHECKSUM_AT..CHECKSUM_AT + 4);
        let stored = raw.checksum.get();
        if stored != computed {
            return Err(Defect::HeaderChecksum { at: 0, stored, computed });
        }
        let version = raw.version.get();
        if version != VERSION {
            return Err(Defect::HeaderVersion { at: 0, version });
        }
        let size = raw.block_size.get();
        let block_size = BlockSize::from_bytes(size).ok_or(Defect::BlockSize { at: 0, size })?;
        Ok(DynamicHeader {
            data_offset: raw.data_offset.get(),
            table_offset: raw.table_offset.get(),
            entries: raw.entries.get(),
            block_size,
            parent_uuid: Uuid::from_bytes(raw.parent_uuid),
            parent_timestamp: raw.parent_timestamp.get(),
            reserved: raw.reserved.get(),
            parent_name: raw.parent_name,
            locators: std::array::from_fn(|slot| {
                let l = &raw.locators[slot];
                LocatorEntry {
                    platform: l.platform.get(),
                    space: l.space.get(),
                    length: l.length.get(),
                    reserved: l.reserved.get(),
                    offset: l.offset.get(),
                }
            }),
            reserved_end: raw.reserved_end,
        })
    }

    /// Encodes the header, with a new checksum.
    pub fn encode(&self) -> [u8; 1024] {
        let mut raw = RawDynamicHeader {
            cookie: COOKIE,
            data_offset: self.data_offset.into(),
            table_offset: self.table_offset.into(),
            version: VERSION.into(),
            entries: self.entries.into(),
            block_size: self.block_size.bytes().into(),
            checksum: U32::ZERO,
            parent_uuid: self.parent_uuid.into_bytes(),
            parent_timestamp: self.parent_timestamp.into(),
            reserved: self.reserved.into(),
            parent_name: self.parent_name,
            locators: std::array::from_fn(|slot| {
                let l = &self.locators[slot];
                RawLocator {
                    platform: l.platform.into(),
                    space: l.space.into(),
                    length: l.length.into(),
                    reserved: l.reserved.into(),
                    offset: l.offset.into(),
                }
            }),
            reserved_end: self.reserved_end,
        };
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM_AT..CHECKSUM_AT + 4).into();
        zerocopy::transmute!(raw)
    }

    /// Returns whether the parent of a differencing disk is a raw file, in XenServer's dialect (format 5.3).
    pub fn parent_is_raw(&self) -> bool {
        self.parent_uuid.is_nil()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn summed(mut bytes: [u8; 1024]) -> [u8; 1024] {
        let sum = checksum(&bytes, 36..40);
        bytes[36..40].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn with(at: usize, part: &[u8]) -> Result<DynamicHeader, Defect> {
        let mut bytes = DynamicHeader::new(4096, 8, BlockSize::DEFAULT).encode();
        bytes[at..at + part.len()].copy_from_slice(part);
        DynamicHeader::decode(&summed(bytes))
    }

    #[test]
    fn fields_lie_where_the_specification_says() {
        let mut header = DynamicHeader::new(0x1122, 0x3344, BlockSize::DEFAULT);
        header.parent_uuid = Uuid::from_u128(5);
        header.parent_name[1] = b'p';
        header.locators[7] = LocatorEntry { platform: 1, space: 2, length: 3, reserved: 4, offset: 5 };
        let b = header.encode();
        assert_eq!(
            (&b[..16], &b[16..28]),
            (&b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff"[..], &b"\0\0\0\0\0\0\x11\x22\0\x01\0\0"[..])
        );
        assert_eq!((&b[28..36], b[55], b[65]), (&b"\0\0\x33\x44\0\x20\0\0"[..], 5, b'p'));
        assert_eq!((b[576 + 7 * 24 + 3], b[576 + 7 * 24 + 23]), (1, 5));
        assert_eq!(DynamicHeader::decode(&b), Ok(header));
    }

    #[test]
    fn encoding_keeps_every_byte() {
        let mut random = Random::from_env(20_060_101);
        for _ in 0..1000 {
            let mut bytes = DynamicHeader::new(4096, 8, BlockSize::DEFAULT).encode();
            for (from, to) in [(8, 24), (28, 32), (40, 1024)] {
                random.fill(&mut bytes[from..to]);
            }
            let bytes = summed(bytes);
            assert_eq!(DynamicHeader::decode(&bytes).unwrap().encode(), bytes);
        }
    }

    #[test]
    fn each_broken_rule_has_its_defect() {
        assert_eq!(with(0, b"conectix"), Err(Defect::HeaderCookie { at: 0 }));
        assert_eq!(with(24, &[0, 1, 0, 1]), Err(Defect::HeaderVersion { at: 0, version: 0x0001_0001 }));
        for size in [0, 512, 2048, 4095, 4097, 6144, (256 << 20) - 1, (256 << 20) + 1, 512 << 20, u32::MAX] {
            assert_eq!(with(32, &size.to_be_bytes()), Err(Defect::BlockSize { at: 0, size }));
        }
        for size in [4096u32, 8192, 128 << 20, 256 << 20] {
            assert_eq!(with(32, &size.to_be_bytes()).unwrap().block_size.bytes(), size);
        }
        let mut bytes = DynamicHeader::new(4096, 8, BlockSize::DEFAULT).encode();
        bytes[1000] = 1;
        assert!(matches!(DynamicHeader::decode(&bytes), Err(Defect::HeaderChecksum { .. })));
    }
}
