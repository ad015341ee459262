//! Constants and layouts of virtio 1.2: chapter 2.7 (split virtqueues) and 5.2 (block device).
//!
//! Only this file depends on the byte order of virtio, which is little-endian. The numbers come from the Linux headers
//! (virtio-bindings), converted to the types in which the crate uses them.
#![allow(clippy::little_endian_bytes, clippy::cast_possible_truncation)]

use virtio_bindings::bindings::{virtio_blk as blk, virtio_config as config, virtio_ring as ring};

/// Feature bits as masks.
pub mod feature {
    use super::{blk, config, ring};

    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
    /// The disk is read-only.
    pub const RO: u64 = 1 << blk::VIRTIO_BLK_F_RO;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << blk::VIRTIO_BLK_F_BLK_SIZE;
    /// The device supports `FLUSH`, and completed writes are durable only after a `FLUSH`.
    pub const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
    /// The driver can read and write `writeback`.
    pub const CONFIG_WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << blk::VIRTIO_BLK_F_MQ;
    /// The device supports `DISCARD`.
    pub const DISCARD: u64 = 1 << blk::VIRTIO_BLK_F_DISCARD;
    /// The device supports `WRITE_ZEROES`.
    pub const WRITE_ZEROES: u64 = 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
    /// The device supports tables of indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// `used_event` and `avail_event` select the notifications.
    pub const EVENT_IDX: u64 = 1 << ring::VIRTIO_RING_F_EVENT_IDX;
    /// The device complies with virtio 1.0 or later. Legacy drivers are not supported.
    pub const VERSION_1: u64 = 1 << config::VIRTIO_F_VERSION_1;
}

/// Request types.
pub mod kind {
    use super::blk;

    /// Read.
    pub const IN: u32 = blk::VIRTIO_BLK_T_IN;
    /// Write.
    pub const OUT: u32 = blk::VIRTIO_BLK_T_OUT;
    /// Make completed writes durable.
    pub const FLUSH: u32 = blk::VIRTIO_BLK_T_FLUSH;
    /// Read the serial.
    pub const GET_ID: u32 = blk::VIRTIO_BLK_T_GET_ID;
    /// Discard sectors.
    pub const DISCARD: u32 = blk::VIRTIO_BLK_T_DISCARD;
    /// Zero sectors.
    pub const WRITE_ZEROES: u32 = blk::VIRTIO_BLK_T_WRITE_ZEROES;
}

/// Status of a request. The device writes the status to the last writable byte of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// The request succeeded.
    Ok = blk::VIRTIO_BLK_S_OK as u8,
    /// The request failed.
    IoErr = blk::VIRTIO_BLK_S_IOERR as u8,
    /// The device does not support the request, or has not offered it.
    Unsupp = blk::VIRTIO_BLK_S_UNSUPP as u8,
}

/// Flags of a descriptor.
pub mod desc {
    use super::ring;

    /// Size of a descriptor in bytes.
    pub const LEN: usize = 16;
    /// Flag: another descriptor follows.
    pub const NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
    /// Flag: the device may write the buffer. Without the flag, the device may read the buffer.
    pub const WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
    /// Flag: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;
}

/// Flag in `used.flags`: the driver may omit kicks.
pub const USED_NO_NOTIFY: u16 = ring::VRING_USED_F_NO_NOTIFY as u16;
/// Flag in `avail.flags`: the device may omit interrupts.
pub const AVAIL_NO_INTERRUPT: u16 = ring::VRING_AVAIL_F_NO_INTERRUPT as u16;
/// Maximum number of descriptors of a virtqueue.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Size of a request's header in bytes.
pub const HEADER_LEN: usize = 16;
/// Size of a serial in bytes.
pub const ID_LEN: usize = blk::VIRTIO_BLK_ID_BYTES as usize;
/// Size in bytes of a segment of a `DISCARD` or `WRITE_ZEROES`.
pub const SEGMENT_LEN: usize = 16;
/// Flag of a segment: the space of the segment may be deallocated.
pub const SEGMENT_UNMAP: u32 = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes is an array of N bytes")
}

/// A descriptor (2.7.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// Any of [`desc::NEXT`], [`desc::WRITE`], [`desc::INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor; valid with [`desc::NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// Decodes a descriptor from its two 64-bit words in guest memory.
    pub fn decode(first: u64, second: u64) -> Descriptor {
        let second = u64::from_le(second);
        Descriptor {
            addr: u64::from_le(first),
            len: second as u32,
            flags: (second >> 32) as u16,
            next: (second >> 48) as u16,
        }
    }

    /// Decodes a descriptor from its 16 bytes.
    pub fn decode_bytes(raw: &[u8; desc::LEN]) -> Descriptor {
        Descriptor {
            addr: u64::from_le_bytes(array(raw, 0)),
            len: u32::from_le_bytes(array(raw, 8)),
            flags: u16::from_le_bytes(array(raw, 12)),
            next: u16::from_le_bytes(array(raw, 14)),
        }
    }

    /// Whether a flag is set.
    pub fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The header of a request (5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Request type: one of [`kind`], or an unknown number.
    pub kind: u32,
    /// First sector of an `IN` or `OUT`.
    pub sector: u64,
}

impl RequestHeader {
    /// Decodes a header from its 16 bytes.
    pub fn decode(raw: &[u8; HEADER_LEN]) -> RequestHeader {
        RequestHeader { kind: u32::from_le_bytes(array(raw, 0)), sector: u64::from_le_bytes(array(raw, 8)) }
    }
}

/// A segment of a `DISCARD` or `WRITE_ZEROES` (5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub count: u32,
    /// [`SEGMENT_UNMAP`] or no flag. Other flags are not valid.
    pub flags: u32,
}

impl Segment {
    /// Decodes a segment from its 16 bytes.
    pub fn decode(raw: &[u8; SEGMENT_LEN]) -> Segment {
        Segment {
            sector: u64::from_le_bytes(array(raw, 0)),
            count: u32::from_le_bytes(array(raw, 8)),
            flags: u32::from_le_bytes(array(raw, 12)),
        }
    }
}

/// Encodes an element of the used ring as two words in the guest's byte order.
pub fn used_element(head: u16, written: u32) -> [u32; 2] {
    [u32::from(head).to_le(), written.to_le()]
}

/// Converts a 16-bit word of a ring from or to the guest's byte order.
pub fn le16(w: u16) -> u16 {
    u16::from_le(w)
}

/// Size in bytes of the known fields of the configuration space.
pub const CONFIG_LEN: usize = 60;
/// Offset of `writeback` in the configuration space.
pub const CONFIG_WRITEBACK: usize = 32;

/// The configuration space (5.2.4). Fields of features that are not offered stay zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlkConfig {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Maximum number of segments of a request, without header and status.
    pub seg_max: u32,
    /// Size of a logical block in bytes.
    pub blk_size: u32,
    /// log2 of the number of logical blocks in a physical block.
    pub physical_block_exp: u8,
    /// Suggested minimum size of a request, in logical blocks.
    pub min_io_size: u16,
    /// Suggested maximum size of a request, in logical blocks.
    pub opt_io_size: u32,
    /// Whether the write cache is on.
    pub writeback: bool,
    /// Number of queues.
    pub num_queues: u16,
    /// Limits of `DISCARD`; zero if `DISCARD` is not offered.
    pub discard: SegmentLimits,
    /// Recommended alignment of the range of a `DISCARD`, in sectors.
    pub discard_sector_alignment: u32,
    /// Limits of `WRITE_ZEROES`; zero if `WRITE_ZEROES` is not offered.
    pub write_zeroes: SegmentLimits,
    /// Whether `WRITE_ZEROES` may deallocate space.
    pub write_zeroes_may_unmap: bool,
}

/// Limits of a request with segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SegmentLimits {
    /// Maximum number of sectors of one segment.
    pub sectors: u32,
    /// Maximum number of segments.
    pub segments: u32,
}

impl BlkConfig {
    /// Encodes the fields as the guest reads them.
    pub fn encode(&self) -> [u8; CONFIG_LEN] {
        let mut raw = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.capacity.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.blk_size.to_le_bytes());
        put(24, &[self.physical_block_exp]);
        put(26, &self.min_io_size.to_le_bytes());
        put(28, &self.opt_io_size.to_le_bytes());
        put(CONFIG_WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.discard.sectors.to_le_bytes());
        put(40, &self.discard.segments.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.write_zeroes.sectors.to_le_bytes());
        put(52, &self.write_zeroes.segments.to_le_bytes());
        put(56, &[u8::from(self.write_zeroes_may_unmap)]);
        raw
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::host_endian_bytes)]

    use super::*;

    #[test]
    fn the_configuration_space_is_laid_out_as_in_the_specification() {
        let limits = SegmentLimits { sectors: 0x2827_2625, segments: 0x2c2b_2a29 };
        let config = BlkConfig {
            capacity: 0x0807_0605_0403_0201,
            seg_max: 0x100f_0e0d,
            blk_size: 0x1817_1615,
            physical_block_exp: 0x19,
            min_io_size: 0x1c1b,
            opt_io_size: 0x201f_1e1d,
            writeback: true,
            num_queues: 0x2423,
            discard: limits,
            discard_sector_alignment: 0x302f_2e2d,
            write_zeroes: limits,
            write_zeroes_may_unmap: true,
        };
        // Byte n has the value n + 1, except in fields that are not offered, in booleans, and in the second limits.
        let mut want: Vec<u8> = (1..=60).collect();
        for absent in [8..12, 16..20, 25..26, 33..34, 57..60] {
            want[absent].fill(0);
        }
        want[32] = 1;
        want[56] = 1;
        want.copy_within(36..44, 48);
        assert_eq!(config.encode(), want[..]);
    }

    #[test]
    fn rings_are_little_endian() {
        let raw = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        let d = Descriptor { addr: 0x0807_0605_0403_0201, len: 0x0c0b_0a09, flags: 0x0e0d, next: 0x100f };
        assert_eq!(Descriptor::decode_bytes(&raw), d);
        let words = [0, 8].map(|at| u64::from_ne_bytes(array(&raw, at)));
        assert_eq!(Descriptor::decode(words[0], words[1]), d);
        assert!(d.has(desc::NEXT) && !d.has(desc::WRITE) && d.has(desc::INDIRECT));
        assert_eq!(RequestHeader::decode(&raw), RequestHeader { kind: 0x0403_0201, sector: 0x100f_0e0d_0c0b_0a09 });
        let segment = Segment { sector: 0x0807_0605_0403_0201, count: 0x0c0b_0a09, flags: 0x100f_0e0d };
        assert_eq!(Segment::decode(&raw), segment);
        assert_eq!(used_element(0x0201, 0x0807_0605).map(u32::to_ne_bytes), [[1, 2, 0, 0], [5, 6, 7, 8]]);
    }
}
