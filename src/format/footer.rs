//! The footer: the 512 bytes at the end of every image, and of sparse ones also at the start.
//!
//! Decoding keeps every byte, so that a footer that is written again differs only where it was meant to. Offsets of
//! the fields: vhd-format 2.

use uuid::Uuid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::checksum::checksum;
use crate::format::defect::Defect;
use crate::format::geometry::Geometry;
use crate::units::SECTOR;

/// Bytes of a footer.
pub const FOOTER_BYTES: u64 = 512;
/// The largest virtual size: 2040 GiB (O5).
pub const MAX_DISK_BYTES: u64 = 2040 << 30;
/// Unix time at the format's epoch, 2000-01-01T00:00:00Z.
pub const EPOCH_UNIX: u64 = 946_684_800;
/// The data offset of a disk without a dynamic header.
pub const NO_DATA_OFFSET: u64 = u64::MAX;

const COOKIE: [u8; 8] = *b"conectix";
const POISON: [u8; 8] = *b"v_poison";
const CHECKSUM_AT: usize = 64;
/// The byte in which XenServer keeps `hidden`, counted in the reserved bytes.
const HIDDEN: usize = 0;

/// The kind of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskType {
    /// All data, in order, from the start of the file.
    Fixed,
    /// Blocks on demand; what is absent is zero.
    Dynamic,
    /// Blocks on demand; what is absent is the parent's.
    Differencing,
}

impl DiskType {
    /// The kind of a code; `None` for those that nobody serves.
    pub fn from_code(code: u32) -> Option<DiskType> {
        match code {
            2 => Some(DiskType::Fixed),
            3 => Some(DiskType::Dynamic),
            4 => Some(DiskType::Differencing),
            _ => None,
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        match self {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        }
    }

    /// The word that people and `info --json` use.
    pub fn word(self) -> &'static str {
        match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        }
    }
}

/// Seconds of Unix time as the format's 32-bit time, at the nearest end where it does not fit (2000 to 2136).
pub fn time_from_unix(unix: u64) -> u32 {
    u32::try_from(unix.saturating_sub(EPOCH_UNIX)).unwrap_or(u32::MAX)
}

/// The format's time as seconds of Unix time.
pub fn time_to_unix(time: u32) -> u64 {
    EPOCH_UNIX + u64::from(time)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    timestamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_host: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    disk_type: U32,
    checksum: U32,
    uuid: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

/// A decoded footer. All fields as in the file; the cookie and the checksum are implied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Bit 0 temporary, bit 1 always set by the specification; others appear.
    pub features: u32,
    /// Format version, 16.16.
    pub version: u32,
    /// Byte offset of the dynamic header. Of no meaning for fixed disks.
    pub data_offset: u64,
    /// Creation time, seconds since 2000.
    pub timestamp: u32,
    /// Four letters of the program that made the image.
    pub creator: [u8; 4],
    /// That program's version, 16.16.
    pub creator_version: u32,
    /// Four letters of the host it ran on.
    pub creator_host: [u8; 4],
    /// Bytes at creation. Informational.
    pub original_size: u64,
    /// Bytes of the disk: the virtual size.
    pub current_size: u64,
    /// Geometry, as stored.
    pub geometry: Geometry,
    /// Kind of disk.
    pub disk_type: DiskType,
    /// Identity, which children record.
    pub uuid: Uuid,
    /// Nonzero while a machine is suspended on the disk.
    pub saved_state: u8,
    /// The rest, kept as it is. The first byte is XenServer's `hidden`.
    pub reserved: [u8; 427],
}

impl Footer {
    /// The footer of a new disk, made at `now_unix` (seconds of Unix time).
    ///
    /// It names `win ` on `Wi2k` as its creator, the one tag with which every reader takes the exact size
    /// (vhd-format 2.3).
    pub fn new(disk_type: DiskType, size: u64, uuid: Uuid, now_unix: u64) -> Footer {
        Footer {
            features: 2,
            version: 0x0001_0000,
            data_offset: if disk_type == DiskType::Fixed { NO_DATA_OFFSET } else { FOOTER_BYTES },
            timestamp: time_from_unix(now_unix),
            creator: *b"win ",
            creator_version: 0x000A_0000,
            creator_host: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry: Geometry::for_size(size),
            disk_type,
            uuid,
            saved_state: 0,
            reserved: [0; 427],
        }
    }

    /// The same disk with another size. The original size follows, since libvhdi reads the size there.
    #[must_use]
    pub fn with_size(&self, size: u64) -> Footer {
        Footer { original_size: size, current_size: size, geometry: Geometry::for_size(size), ..self.clone() }
    }

    /// From the 512 bytes of a footer. Whether the disk fits its file is not asked here.
    ///
    /// # Errors
    /// [`Defect`] for the first of: cookie, poison, checksum, major version, type, size (O4, O5), at offset 0.
    pub fn decode(bytes: &[u8; 512]) -> Result<Footer, Defect> {
        let raw: &Raw = zerocopy::transmute_ref!(bytes);
        match raw.cookie {
            COOKIE => {}
            POISON => return Err(Defect::Poisoned { at: 0 }),
            _ => return Err(Defect::FooterCookie { at: 0 }),
        }
        let computed = checksum(bytes, CHECKSUM_AT..CHECKSUM_AT + 4);
        let stored = raw.checksum.get();
        if stored != computed && !(may_hide_late(raw) && stored == computed.wrapping_add(raw.reserved[HIDDEN].into())) {
            return Err(Defect::FooterChecksum { at: 0, stored, computed });
        }
        let version = raw.version.get();
        if version >> 16 != 1 {
            return Err(Defect::FooterVersion { at: 0, version });
        }
        let code = raw.disk_type.get();
        let disk_type = DiskType::from_code(code).ok_or(Defect::DiskType { at: 0, code })?;
        let size = raw.current_size.get();
        if !Footer::size_fits(size) {
            return Err(Defect::DiskSize { at: 0, size });
        }
        Ok(Footer {
            features: raw.features.get(),
            version,
            data_offset: raw.data_offset.get(),
            timestamp: raw.timestamp.get(),
            creator: raw.creator,
            creator_version: raw.creator_version.get(),
            creator_host: raw.creator_host,
            original_size: raw.original_size.get(),
            current_size: size,
            geometry: Geometry { cylinders: raw.cylinders.get(), heads: raw.heads, sectors: raw.sectors },
            disk_type,
            uuid: Uuid::from_bytes(raw.uuid),
            saved_state: raw.saved_state,
            reserved: raw.reserved,
        })
    }

    /// From a footer of 511 bytes, as written before 2004: the missing byte counts as zero.
    ///
    /// # Errors
    /// As [`Footer::decode`].
    pub fn decode_511(bytes: &[u8; 511]) -> Result<Footer, Defect> {
        let mut whole = [0; 512];
        whole[..511].copy_from_slice(bytes);
        Footer::decode(&whole)
    }

    /// The 512 bytes, with a fresh checksum.
    pub fn encode(&self) -> [u8; 512] {
        let mut raw = Raw {
            cookie: COOKIE,
            features: self.features.into(),
            version: self.version.into(),
            data_offset: self.data_offset.into(),
            timestamp: self.timestamp.into(),
            creator: self.creator,
            creator_version: self.creator_version.into(),
            creator_host: self.creator_host,
            original_size: self.original_size.into(),
            current_size: self.current_size.into(),
            cylinders: self.geometry.cylinders.into(),
            heads: self.geometry.heads,
            sectors: self.geometry.sectors,
            disk_type: self.disk_type.code().into(),
            checksum: U32::ZERO,
            uuid: self.uuid.into_bytes(),
            saved_state: self.saved_state,
            reserved: self.reserved,
        };
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM_AT..CHECKSUM_AT + 4).into();
        zerocopy::transmute!(raw)
    }

    /// Whether a disk may have `size` bytes: whole sectors, at least one, at most 2040 GiB (O5).
    pub fn size_fits(size: u64) -> bool {
        size.is_multiple_of(SECTOR) && (SECTOR..=MAX_DISK_BYTES).contains(&size)
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.current_size / SECTOR
    }

    /// Whether XenServer made it, so that its dialect applies: batmap, `hidden`, encryption.
    pub fn creator_is_tap(&self) -> bool {
        self.creator.starts_with(b"tap")
    }

    /// Whether it is marked as the inner node of a chain (O16).
    pub fn hidden(&self) -> bool {
        self.reserved[HIDDEN] != 0
    }

    /// Marks it as the inner node of a chain, or not.
    pub fn set_hidden(&mut self, hidden: bool) {
        self.reserved[HIDDEN] = hidden.into();
    }

    /// Creation, in seconds of Unix time.
    pub fn created_unix(&self) -> u64 {
        time_to_unix(self.timestamp)
    }
}

/// Versions 0.1 and 1.1 of tapdisk set `hidden` without computing the checksum again (libvhd accepts that too).
fn may_hide_late(raw: &Raw) -> bool {
    raw.creator.starts_with(b"tap") && matches!(raw.creator_version.get(), 0x0000_0001 | 0x0001_0001)
}
