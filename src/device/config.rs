//! The virtio-blk device: features, configuration space, and the write cache mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::spec::{self, SegmentLimits, feature};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockSize, SECTOR};

/// Size of the configuration space in bytes. The bytes after the known fields read as zeros.
pub const CONFIG_SPACE: u32 = 256;
/// Maximum number of segments of a request. Together with header and status they fit into a ring of 128 descriptors,
/// the smallest default of all front-ends. When the guest reads this limit, the size of the ring is not known yet.
pub const SEG_MAX: u16 = 126;
/// Limits of `DISCARD` and `WRITE_ZEROES` that are offered to drivers. With ranges of at most 32 MiB, a trim consists
/// of many requests, and other requests of the guest are served between them.
pub const ZEROING_LIMITS: SegmentLimits = SegmentLimits { sectors: 1 << 16, segments: 32 };
/// Maximum number of sectors of a range that is accepted: 1 GiB. Earlier versions of the daemon offered this limit, and
/// a guest that was started with such a version still uses it.
pub const MAX_ZEROED_SECTORS: u32 = 1 << 21;
/// log2 of the number of sectors in a physical block. Data in the images is aligned to 4 KiB.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// A virtio-blk device over one disk, shared by its queues and the control thread.
///
/// Only the control thread calls `ack`, `reset` and `write_config`.
pub struct Device {
    disk: Arc<Disk>,
    queues: u16,
    queue_size: u16,
    /// Whether the write cache is on after a reset.
    default_writeback: bool,
    /// Features that the device offered and the driver acknowledged.
    acked: AtomicU64,
    /// The `writeback` field of the configuration space.
    writeback: AtomicBool,
}

impl Device {
    /// Creates a device with `queues` queues, each of which executes up to `queue_size` operations at once. If
    /// `write_back` is true, the write cache is on after a reset. Until the driver acknowledges `FLUSH`, the disk is in
    /// write-through mode.
    ///
    /// # Panics
    /// If `queues` is zero.
    pub fn new(disk: Arc<Disk>, queues: u16, queue_size: u16, write_back: bool) -> Arc<Device> {
        assert!(queues > 0, "a device has a queue");
        let device = Device {
            disk,
            queues,
            queue_size,
            default_writeback: write_back,
            acked: AtomicU64::new(0),
            writeback: AtomicBool::new(write_back),
        };
        device.apply_cache();
        Arc::new(device)
    }

    /// The disk of the device.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Expected number of descriptors of a queue, and maximum number of operations that a queue executes at once. A
    /// ring may have more descriptors.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The virtio features that are offered to the driver.
    pub fn features(&self) -> u64 {
        offered_features(self.disk.is_read_only())
    }

    /// Features that the device offered and the driver acknowledged.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// Stores the features that the driver acknowledged, without those that were not offered. A driver without `FLUSH`
    /// cannot make anything durable, so the disk is then in write-through mode (virtio 1.2, 5.2.5.2).
    pub fn ack(&self, features: u64) {
        self.acked.store(features & self.features(), Ordering::Relaxed);
        self.apply_cache();
    }

    /// Resets the features and the write cache mode to their initial state.
    pub fn reset(&self) {
        self.writeback.store(self.default_writeback, Ordering::Relaxed);
        self.ack(0);
    }

    /// Reads `len` bytes, at most 256, of the configuration space from `offset`. Bytes after the end of the space are
    /// zero. Some front-ends count from 0x100, where the configuration space of a PCI device begins; so offsets from
    /// 0x100 on are equivalent to offsets from 0 on.
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        config_window(&self.config().encode(), offset, len)
    }

    /// Writes the `writeback` field, the only field of the configuration space that a driver may write. If the write
    /// turns the write cache off, all completed writes are durable when this function returns.
    ///
    /// # Errors
    /// The mode stays as it was.
    /// - `Refused` for any other field or value.
    /// - Any error of [`Disk::commit`].
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        let on = parse_writeback(offset, bytes)?;
        let was = self.writeback.swap(on, Ordering::Relaxed);
        // The new mode applies before the commit, so that a write that starts during the commit is already in
        // write-through mode.
        self.apply_cache();
        if was && !on {
            self.disk.commit().inspect_err(|_| {
                self.writeback.store(was, Ordering::Relaxed);
                self.apply_cache();
            })?;
        }
        Ok(())
    }

    fn apply_cache(&self) {
        let back = self.writeback.load(Ordering::Relaxed) && self.acked() & feature::FLUSH != 0;
        self.disk.set_write_through(!back);
    }

    fn config(&self) -> spec::BlkConfig {
        let writable = !self.disk.is_read_only();
        spec::BlkConfig {
            capacity: self.disk.capacity(),
            seg_max: u32::from(seg_max(self.queue_size)),
            blk_size: u32::try_from(SECTOR).expect("512"),
            physical_block_exp: PHYSICAL_BLOCK_EXP,
            min_io_size: 1 << PHYSICAL_BLOCK_EXP,
            opt_io_size: BlockSize::DEFAULT.sectors(),
            writeback: self.writeback.load(Ordering::Relaxed),
            num_queues: self.queues,
            discard: if writable { ZEROING_LIMITS } else { SegmentLimits::default() },
            discard_sector_alignment: if writable { 1 << PHYSICAL_BLOCK_EXP } else { 0 },
            write_zeroes: if writable { ZEROING_LIMITS } else { SegmentLimits::default() },
            write_zeroes_may_unmap: writable,
        }
    }
}

/// Returns the number of segments that fit into a ring together with header and status: at least 1, also on smaller
/// rings, and at most [`SEG_MAX`].
fn seg_max(queue_size: u16) -> u16 {
    queue_size.saturating_sub(2).clamp(1, SEG_MAX)
}

/// Returns the features that the device offers for a disk.
fn offered_features(read_only: bool) -> u64 {
    let always = feature::VERSION_1
        | feature::EVENT_IDX
        | feature::INDIRECT_DESC
        | feature::MQ
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::FLUSH
        | feature::CONFIG_WCE;
    always | if read_only { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES }
}

/// Returns the offset in the configuration space for an offset that a front-end sent, which may begin at 0x100.
fn fold_offset(offset: u32) -> u32 {
    offset.checked_sub(CONFIG_SPACE).unwrap_or(offset)
}

/// Reads `len` bytes of a configuration space from `offset`.
fn config_window(space: &[u8], offset: u32, len: u32) -> Vec<u8> {
    let from = (fold_offset(offset) as usize).min(space.len());
    let len = len.min(CONFIG_SPACE) as usize;
    let mut bytes = space[from..space.len().min(from + len)].to_vec();
    bytes.resize(len, 0);
    bytes
}

/// Parses a write to the configuration space. Returns whether it turns the write cache on.
fn parse_writeback(offset: u32, bytes: &[u8]) -> Result<bool> {
    match (fold_offset(offset) as usize, bytes) {
        (spec::CONFIG_WRITEBACK, [0]) => Ok(false),
        (spec::CONFIG_WRITEBACK, [1]) => Ok(true),
        _ => {
            let what = format!(
                "the front-end wrote {} bytes at {offset:#x} of the configuration space; only the byte `writeback` can be written",
                bytes.len()
            );
            Err(Error::new(ErrorKind::Refused, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_can_be_read() {
        let space: Vec<u8> = (1..=60).collect();
        assert_eq!(config_window(&space, 0, 60), space);
        assert_eq!(config_window(&space, 0x100, 60), space, "0x100 is the same as 0");
        assert_eq!(config_window(&space, 0x120, 1), [33]);
        assert_eq!(config_window(&space, 58, 4), [59, 60, 0, 0]);
        for (offset, len) in [(60, 8), (255, 8), (0x1ff, 300), (0x200, 4), (u32::MAX, u32::MAX), (0, 0)] {
            let got = config_window(&space, offset, len);
            assert_eq!(got.len(), len.min(256) as usize, "{offset} {len}");
            assert!(got.iter().all(|&b| b == 0), "{offset} {len}");
        }
        assert_eq!(config_window(&space, 0, 256).len(), 256);
    }

    #[test]
    fn only_writeback_can_be_written() {
        assert!(
            !parse_writeback(32, &[0]).unwrap()
                && parse_writeback(32, &[1]).unwrap()
                && parse_writeback(0x120, &[1]).unwrap()
        );
        for (offset, bytes) in
            [(32, &[2][..]), (32, &[]), (32, &[1, 0]), (31, &[1]), (33, &[1]), (0, &[0]), (u32::MAX, &[1])]
        {
            assert_eq!(parse_writeback(offset, bytes).unwrap_err().kind(), ErrorKind::Refused, "{offset} {bytes:?}");
        }
    }

    #[test]
    fn the_offered_features() {
        // The bit numbers as in virtio 1.2: 2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 32.
        assert_eq!(offered_features(false), 0x1_3000_7e44, "of a writable disk");
        // Bit 5 (RO) instead of 13 and 14 (DISCARD, WRITE_ZEROES).
        assert_eq!(offered_features(true), 0x1_3000_1e64, "of a read-only disk");
    }

    #[test]
    fn a_read_only_disk_offers_no_feature_that_writes() {
        let (rw, ro) = (offered_features(false), offered_features(true));
        let change = feature::DISCARD | feature::WRITE_ZEROES;
        assert_eq!((rw & change, rw & feature::RO), (change, 0));
        assert_eq!((ro & change, ro & feature::RO), (0, feature::RO));
    }

    #[test]
    fn a_request_of_seg_max_segments_fits_into_the_ring() {
        let fits = [(1024, 126), (256, 126), (128, 126), (127, 125), (64, 62), (4, 2), (2, 1), (1, 1)];
        for (queue_size, most) in fits {
            assert_eq!(seg_max(queue_size), most, "{queue_size}");
        }
    }
}
