//! Zeroes ranges of files and devices.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::call::retry;
use super::direct::BOUNCE_BYTES;
use super::file::HostFile;
use crate::error::Result;
use crate::storage::backend::FileBackend;
use crate::storage::payload::Buffer;

impl HostFile {
    pub(super) fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(self, mode, offset, len)) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) if self.is_block_device() => self.zero_device(offset, len),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, len),
            Err(e) => Err(self.fail(&format!("cannot punch a hole of {len} bytes"), e).at_offset(offset)),
        }
    }

    /// Zeroes a range of a block device that cannot punch holes. The device zeroes the range if it can (BLKZEROOUT);
    /// otherwise the kernel writes zeros.
    fn zero_device(&self, offset: u64, len: u64) -> Result<()> {
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(self, mode, offset, len)) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, len),
            Err(e) => Err(self.fail(&format!("cannot zero {len} bytes"), e).at_offset(offset)),
        }
    }

    /// Writes zeros to the part of the range that lies in the file.
    pub(super) fn write_zeros(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.stat()?.len);
        let mut at = offset;
        let zeros = Buffer::zeroed(BOUNCE_BYTES);
        while at < end {
            let n = usize::try_from(end - at).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            self.write_at(&zeros[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }
}
