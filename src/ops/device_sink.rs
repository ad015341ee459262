//! Block device that `convert` overwrites with a raw disk.
//!
//! A device may have old contents everywhere, so ranges of zeros are zeroed on the device as well. A large range is
//! zeroed by a system call, and the device may discard a range if discarded ranges read as zeros. A small range is
//! zeroed by a write. If the device is larger than the disk, the rest of the device keeps its contents.

use std::path::Path;

use super::source::{CHUNK_BYTES, Progress};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Buffer, Env, File, Lock};
use crate::units::{SECTOR, SectorRange};

/// Alignment of ranges that are zeroed by a system call: a multiple of the logical block size of every device.
const ZERO_ALIGN_BYTES: u64 = CHUNK_BYTES as u64;
/// Maximum length of a range that one system call zeroes. The user can interrupt the work between two calls.
const ZERO_MAX_BYTES: u64 = 256 << 20;

/// An open device that is overwritten from its start.
pub(super) struct DeviceSink {
    file: File,
    /// Size of the disk in bytes, rounded up to whole sectors.
    len: u64,
    /// Offset before which the device has the contents of the disk.
    done: u64,
    zeros: Buffer,
}

impl DeviceSink {
    /// Opens the device at `path` for a disk of `len` bytes, without writing to it.
    ///
    /// # Errors
    /// - `Busy` if the device is in use
    /// - `Refused` if the device is too small, or if the file at `path` is no block device
    /// - `Io`
    pub(super) fn open(env: &dyn Env, path: &Path, len: u64) -> Result<DeviceSink> {
        let file = env.open_disk(path, Access::Write)?;
        if !file.is_block_device() {
            return Err(Error::new(ErrorKind::Refused, "it is no longer a block device").at_path(path));
        }
        file.lock(Lock::Exclusive)?;
        let (room, len) = (file.stat()?.len, len.next_multiple_of(SECTOR));
        if len > room {
            let what = format!("the disk has {len} bytes, and the device only {room}");
            return Err(Error::new(ErrorKind::Refused, what).at_path(path));
        }
        if len < room {
            log::info!("{}: the last {} bytes of the device keep their contents", path.display(), room - len);
        }
        Ok(DeviceSink { file, len, done: 0, zeros: Buffer::zeroed(CHUNK_BYTES) })
    }

    /// Zeroes the gap between the previous range and `range`, and writes `bytes` to `range`. Ranges must ascend.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8], progress: &mut Progress<'_>) -> Result<()> {
        self.zero_until(range.start() * SECTOR, progress)?;
        self.file.write_at(bytes, self.done)?;
        self.done += bytes.len() as u64;
        Ok(())
    }

    /// Zeroes the device up to the end of the disk, and syncs the device.
    pub(super) fn finish(mut self, progress: &mut Progress<'_>) -> Result<()> {
        self.zero_until(self.len, progress)?;
        self.file.sync()
    }

    fn zero_until(&mut self, end: u64, progress: &mut Progress<'_>) -> Result<()> {
        while self.done < end {
            let aligned = self.done.is_multiple_of(ZERO_ALIGN_BYTES);
            let len = if aligned && end - self.done >= ZERO_ALIGN_BYTES {
                let len = ((end - self.done) / ZERO_ALIGN_BYTES * ZERO_ALIGN_BYTES).min(ZERO_MAX_BYTES);
                self.file.punch_hole(self.done, len)?;
                len
            } else {
                let len = (ZERO_ALIGN_BYTES - self.done % ZERO_ALIGN_BYTES).min(end - self.done);
                self.file.write_at(&self.zeros[..usize::try_from(len).expect("at most a chunk")], self.done)?;
                len
            };
            self.done += len;
            progress(self.done)?;
        }
        Ok(())
    }
}
