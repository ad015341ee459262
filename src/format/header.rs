//! The dynamic header: the 1024 bytes that a dynamic or differencing disk has once, without a copy.
//!
//! Its own `data offset` is kept but never followed. Offsets of the fields: vhd-format 3.

use uuid::Uuid;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::checksum::checksum;
use crate::format::defect::Defect;
use crate::format::locator::LocatorEntry;
use crate::units::BlockSize;

/// Bytes of a dynamic header.
pub const HEADER_BYTES: u64 = 1024;
/// Parent locators of a header.
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
struct Raw {
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

/// A decoded dynamic header. All fields as in the file; cookie, version and checksum are implied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DynamicHeader {
    /// All ones. Kept, never followed.
    pub data_offset: u64,
    /// Byte offset of the BAT.
    pub table_offset: u64,
    /// Entries of the BAT: as many as the disk has blocks, or more.
    pub entries: u32,
    /// Data bytes of a block.
    pub block_size: BlockSize,
    /// The parent's UUID.
    pub parent_uuid: Uuid,
    /// The parent file's modification time, seconds since 2000. Never trusted.
    pub parent_timestamp: u32,
    /// Kept as it is.
    pub reserved: u32,
    /// The parent's name, UTF-16 big-endian, ended by zeros.
    pub parent_name: [u8; 512],
    /// Where paths to the parent are stored.
    pub locators: [LocatorEntry; LOCATORS],
    /// Kept as it is.
    pub reserved_end: [u8; 256],
}

impl DynamicHeader {
    /// The header of a new disk without a parent.
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

    /// From the 1024 bytes of a header. Whether the table fits the file is not asked here.
    ///
    /// # Errors
    /// [`Defect`] for the first of: cookie, checksum, version, block size (O7, O8), at offset 0.
    pub fn decode(bytes: &[u8; 1024]) -> Result<DynamicHeader, Defect> {
        let raw: &Raw = zerocopy::transmute_ref!(bytes);
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

    /// The 1024 bytes, with a fresh checksum.
    pub fn encode(&self) -> [u8; 1024] {
        let mut raw = Raw {
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

    /// Whether the parent is a raw file, in XenServer's dialect (vhd-format 5.3). Only asked of differencing disks.
    pub fn parent_is_raw(&self) -> bool {
        self.parent_uuid.is_nil()
    }
}
