//! The footer: the 512 bytes at the end of every image, with a copy at the start of a dynamic or differencing image.
//!
//! Decoding keeps every byte, so that a rewritten footer differs only in the fields that were changed. Format 2 has the
//! offsets of the fields.

use uuid::Uuid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::checksum::checksum;
use crate::format::defect::Defect;
use crate::format::geometry::Geometry;
use crate::units::SECTOR;

/// Size of a footer in bytes.
pub const FOOTER_BYTES: u64 = 512;
/// Maximum virtual size in bytes: 2040 GiB (O5).
pub const MAX_DISK_BYTES: u64 = 2040 << 30;
/// Unix time at the format's epoch, 2000-01-01T00:00:00Z.
pub const EPOCH_UNIX: u64 = 946_684_800;
/// The data offset of a disk without a dynamic header.
pub const NO_DATA_OFFSET: u64 = u64::MAX;

const COOKIE: [u8; 8] = *b"conectix";
const POISON: [u8; 8] = *b"v_poison";
const CHECKSUM_AT: usize = 64;
/// The index of XenServer's `hidden` flag in the reserved bytes.
const HIDDEN: usize = 0;

/// The kind of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskType {
    /// All data, in order, from the start of the file.
    Fixed,
    /// Blocks on demand; absent sectors are zero.
    Dynamic,
    /// Blocks on demand; absent sectors are read from the parent.
    Differencing,
}

impl DiskType {
    /// Returns the disk type of a code; `None` for codes that are not supported.
    pub fn from_code(code: u32) -> Option<DiskType> {
        match code {
            2 => Some(DiskType::Fixed),
            3 => Some(DiskType::Dynamic),
            4 => Some(DiskType::Differencing),
            _ => None,
        }
    }

    /// Returns the code in the file.
    pub fn code(self) -> u32 {
        match self {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        }
    }

    /// Returns the name of the disk type, as messages and `info --json` print it.
    pub fn word(self) -> &'static str {
        match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        }
    }
}

/// Converts Unix time to the format's 32-bit time, clamped to its range (2000 to 2136).
pub fn time_from_unix(unix: u64) -> u32 {
    u32::try_from(unix.saturating_sub(EPOCH_UNIX)).unwrap_or(u32::MAX)
}

/// Converts the format's time to Unix time.
pub fn time_to_unix(time: u32) -> u64 {
    EPOCH_UNIX + u64::from(time)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
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

/// A decoded footer. All fields are as in the file; the cookie and the checksum are implied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Bit 0: temporary. Bit 1: always set, by the specification. Other bits occur in practice.
    pub features: u32,
    /// Format version, 16.16.
    pub version: u32,
    /// Byte offset of the dynamic header. It has no meaning for fixed disks.
    pub data_offset: u64,
    /// Creation time, seconds since 2000.
    pub timestamp: u32,
    /// Tag of the program that made the image.
    pub creator: [u8; 4],
    /// That program's version, 16.16.
    pub creator_version: u32,
    /// Tag of the operating system on which that program ran.
    pub creator_host: [u8; 4],
    /// Virtual size at creation. Informational.
    pub original_size: u64,
    /// Virtual size of the disk, in bytes.
    pub current_size: u64,
    /// Geometry, as stored.
    pub geometry: Geometry,
    /// Kind of disk.
    pub disk_type: DiskType,
    /// Identity of the image, which its children record.
    pub uuid: Uuid,
    /// Nonzero while a virtual machine is suspended on the disk.
    pub saved_state: u8,
    /// The remaining bytes, which decoding and encoding preserve. The first one is XenServer's `hidden`.
    pub reserved: [u8; 427],
}

impl Footer {
    /// Creates the footer of a new disk that is created at `now_unix` (seconds of Unix time).
    ///
    /// The creator tag is `win ` on `Wi2k`: the only tag with which every reader uses the exact size (format 2.3).
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

    /// Returns the footer with another size. Also changes the original size, which libvhdi takes as the size, and the
    /// geometry, from which QEMU computes the size for some creators.
    #[must_use]
    pub fn with_size(&self, size: u64) -> Footer {
        let geometry = Geometry::for_creator(self.creator, size);
        Footer { original_size: size, current_size: size, geometry, ..self.clone() }
    }

    /// Decodes the 512 bytes of a footer. Does not check whether the disk fits in its file.
    ///
    /// # Errors
    /// `FooterCookie`, `Poisoned`, `FooterChecksum`, `FooterVersion`, `DiskType` or `DiskSize`: the first that applies
    /// (O4, O5), at offset 0.
    pub fn decode(bytes: &[u8; 512]) -> Result<Footer, Defect> {
        let raw: &RawFooter = zerocopy::transmute_ref!(bytes);
        match raw.cookie {
            COOKIE => {}
            POISON => return Err(Defect::Poisoned { at: 0 }),
            _ => return Err(Defect::FooterCookie { at: 0 }),
        }
        let computed = checksum(bytes, CHECKSUM_AT..CHECKSUM_AT + 4);
        let stored = raw.checksum.get();
        if stored != computed
            && !(has_stale_hidden_checksum(raw) && stored == computed.wrapping_add(raw.reserved[HIDDEN].into()))
        {
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

    /// Decodes a footer of 511 bytes, as programs wrote it before 2004: the missing byte counts as zero.
    ///
    /// # Errors
    /// `FooterCookie`, `Poisoned`, `FooterChecksum`, `FooterVersion`, `DiskType` or `DiskSize`, at offset 0.
    pub fn decode_511(bytes: &[u8; 511]) -> Result<Footer, Defect> {
        let mut whole = [0; 512];
        whole[..511].copy_from_slice(bytes);
        Footer::decode(&whole)
    }

    /// Encodes the footer, with a new checksum.
    pub fn encode(&self) -> [u8; 512] {
        let mut raw = RawFooter {
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

    /// Returns whether a disk may have `size` bytes: whole sectors, at least one, at most 2040 GiB (O5).
    pub fn size_fits(size: u64) -> bool {
        size.is_multiple_of(SECTOR) && (SECTOR..=MAX_DISK_BYTES).contains(&size)
    }

    /// Returns the number of sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.current_size / SECTOR
    }

    /// Returns whether XenServer made the image, so that its dialect applies: batmap, `hidden`, encryption.
    pub fn creator_is_tap(&self) -> bool {
        self.creator.starts_with(b"tap")
    }

    /// Returns whether the image is marked as an inner node of a chain (O16).
    pub fn is_hidden(&self) -> bool {
        self.reserved[HIDDEN] != 0
    }

    /// Marks the image as an inner node of a chain, or removes the mark.
    pub fn set_hidden(&mut self, hidden: bool) {
        self.reserved[HIDDEN] = hidden.into();
    }

    /// Returns the time of creation, in seconds of Unix time.
    pub fn created_unix(&self) -> u64 {
        time_to_unix(self.timestamp)
    }
}

/// Returns whether the creator is tapdisk 0.1 or 1.1, which set `hidden` without updating the checksum. libvhd accepts
/// such footers, too.
fn has_stale_hidden_checksum(raw: &RawFooter) -> bool {
    raw.creator.starts_with(b"tap") && matches!(raw.creator_version.get(), 0x0000_0001 | 0x0001_0001)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The footer of a child made by vhd-util; the other bytes are zero.
    const VHD_UTIL: [u8; 84] =
        *b"conectix\0\0\0\x02\0\x01\0\0\0\0\0\0\0\0\x02\0\x32\x95\x53\xd5tap\0\0\x01\0\x03\0\0\0\0\
        \0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x01\xe1\x04\x11\0\0\0\x04\xff\xff\xf1\x37\
        \x2c\xfa\x54\x2e\xb7\x69\x48\x6d\x9c\x5d\x6b\xd3\xda\x22\x5b\x26";

    fn foreign() -> [u8; 512] {
        let mut bytes = [0; 512];
        bytes[..84].copy_from_slice(&VHD_UTIL);
        bytes
    }

    fn summed(mut bytes: [u8; 512]) -> [u8; 512] {
        let sum = checksum(&bytes, 64..68);
        bytes[64..68].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn with(at: usize, part: &[u8]) -> Result<Footer, Defect> {
        let mut bytes = foreign();
        bytes[at..at + part.len()].copy_from_slice(part);
        Footer::decode(&summed(bytes))
    }

    #[test]
    fn a_footer_by_vhd_util_is_decoded() {
        let f = Footer::decode(&foreign()).unwrap();
        assert_eq!((f.disk_type, f.current_size, f.data_offset), (DiskType::Differencing, 16 << 20, 512));
        assert_eq!(f.uuid.to_string(), "2cfa542e-b769-486d-9c5d-6bd3da225b26");
        assert_eq!((f.geometry, f.creator_is_tap(), f.is_hidden()), (Geometry::for_size(16 << 20), true, false));
        assert_eq!(f.created_unix(), EPOCH_UNIX + 0x3295_53d5);
        assert_eq!(f.encode(), foreign());
    }

    #[test]
    fn encoding_keeps_every_byte() {
        let mut random = Random::from_env(20_060_101);
        for _ in 0..1000 {
            let mut bytes = foreign();
            for (from, to) in [(8, 12), (14, 48), (56, 60), (68, 512)] {
                random.fill(&mut bytes[from..to]);
            }
            let bytes = summed(bytes);
            assert_eq!(Footer::decode(&bytes).unwrap().encode(), bytes);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for bit in 0..512 * 8 {
            let mut bytes = foreign();
            bytes[bit / 8] ^= 0x80 >> (bit % 8);
            assert!(Footer::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn each_broken_rule_has_its_defect() {
        assert_eq!(with(0, b"Conectix"), Err(Defect::FooterCookie { at: 0 }));
        assert_eq!(with(0, b"v_poison"), Err(Defect::Poisoned { at: 0 }));
        assert_eq!(with(12, &[0, 2]), Err(Defect::FooterVersion { at: 0, version: 0x0002_0000 }));
        assert!(with(14, &[9, 9]).is_ok(), "minor versions do not matter");
        for code in [0, 1, 5, 6, 0x0100_0003] {
            assert_eq!(with(60, &u32::to_be_bytes(code)), Err(Defect::DiskType { at: 0, code }));
        }
        for size in [0, 511, 513, MAX_DISK_BYTES - 1, MAX_DISK_BYTES + 1, MAX_DISK_BYTES + 512, u64::MAX] {
            assert_eq!(with(48, &size.to_be_bytes()), Err(Defect::DiskSize { at: 0, size }));
        }
        for size in [512, 1024, MAX_DISK_BYTES - 512, MAX_DISK_BYTES] {
            assert_eq!(with(48, &size.to_be_bytes()).unwrap().current_size, size);
        }
    }

    #[test]
    fn a_stale_checksum_after_hidden_is_accepted_of_old_tapdisk_only() {
        for (version, fine) in [(0x0001u32, true), (0x0001_0001, true), (0x0001_0003, false)] {
            let mut bytes = foreign();
            bytes[32..36].copy_from_slice(&version.to_be_bytes());
            let mut bytes = summed(bytes);
            bytes[85] = 1;
            let read = Footer::decode(&bytes);
            assert_eq!(read.is_ok(), fine, "{version:#x}");
            if let Ok(footer) = read {
                assert!(footer.is_hidden());
                assert_eq!(footer.encode(), summed(bytes), "written again, the sum is right");
            }
        }
    }

    #[test]
    fn a_footer_of_511_bytes() {
        assert_eq!(Footer::decode_511(foreign().first_chunk().unwrap()), Footer::decode(&foreign()));
    }

    #[test]
    fn new_and_resized_footers() {
        let f = Footer::new(DiskType::Fixed, 1 << 20, Uuid::from_u128(7), EPOCH_UNIX + 5);
        assert_eq!(Footer::decode(&f.encode()).as_ref(), Ok(&f));
        let bytes = f.encode();
        assert_eq!((&bytes[16..24], &bytes[24..36]), (&[0xFF; 8][..], &b"\0\0\0\x05win \0\x0a\0\0"[..]));
        let grown = f.with_size(64 << 20);
        assert_eq!((grown.original_size, grown.current_size, grown.uuid), (64 << 20, 64 << 20, f.uuid));
        assert_eq!(grown.geometry, Geometry::for_size(64 << 20));
        assert_eq!(Footer::new(DiskType::Dynamic, 512, f.uuid, 0).data_offset, 512);
        assert_eq!((time_from_unix(0), time_from_unix(u64::MAX)), (0, u32::MAX));
    }
}
