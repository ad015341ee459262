//! An open file of the host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::call::retry;
use super::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::{File, FileBackend, Folder};
use crate::storage::pagecache::file_map::FileMap;
use crate::storage::types::{
    Access, AllocationMode, DirectRules, FileId, FileSystemSpace, Lock, ModifiedTime, NameStatus, Stat,
};
use crate::units::SECTOR;

/// Maximum time to wait for the I/O of a process that has ended.
const FENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// Open regular file or block device. Engines and [`File`] handles share it, and with it the open file description and
/// its locks.
#[derive(Debug)]
pub(in crate::storage) struct HostFile {
    // Dropped before the descriptor: a mapping keeps a reference to the open file description, and so keeps the locks.
    file_map: FileMap,
    fd: OwnedFd,
    path: PathBuf,
    /// Folder that contains the file.
    folder: Folder,
    access: Access,
    id: FileId,
    is_block_device: bool,
    /// Alignment that O_DIRECT requires, once it is enabled.
    pub(super) direct: OnceLock<DirectRules>,
    lock: Arc<Mutex<Option<Lock>>>,
}

impl HostFile {
    /// Wraps a descriptor that was opened with O_NONBLOCK, and clears that flag. Refuses anything but a regular file.
    pub(super) fn new(fd: OwnedFd, path: &Path, access: Access, folder: Folder) -> Result<HostFile> {
        HostFile::with_kinds(fd, path, access, folder, &[FileType::RegularFile])
    }

    /// Like [`HostFile::new`], but also accepts a block device.
    pub(super) fn new_disk(fd: OwnedFd, path: &Path, access: Access, folder: Folder) -> Result<HostFile> {
        HostFile::with_kinds(fd, path, access, folder, &[FileType::RegularFile, FileType::BlockDevice])
    }

    fn with_kinds(fd: OwnedFd, path: &Path, access: Access, folder: Folder, kinds: &[FileType]) -> Result<HostFile> {
        let fail = |what, e: Errno| Error::io(what, e.into()).at_path(path);
        let stat = rustix::fs::fstat(&fd).map_err(|e| fail("cannot stat", e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !kinds.contains(&kind) {
            let what = match kind {
                FileType::BlockDevice => {
                    "not a regular file but a block device: VHDs inside devices are not supported, raw disks on devices \
                     are (--from raw, --to raw)"
                }
                _ if kinds.contains(&FileType::BlockDevice) => "not a regular file or a block device",
                _ => "not a regular file",
            };
            return Err(Error::new(ErrorKind::Refused, what).at_path(path));
        }
        // Only the open had to be non-blocking. With O_NONBLOCK set, io_uring returns EAGAIN on file systems that
        // cannot do non-blocking I/O.
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| fail("cannot read the flags", e))?;
        rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(|e| fail("cannot set the flags", e))?;
        Ok(HostFile {
            file_map: FileMap::default(),
            fd,
            path: path.to_path_buf(),
            folder,
            access,
            id: FileId { dev: stat.st_dev, ino: stat.st_ino },
            is_block_device: kind == FileType::BlockDevice,
            direct: OnceLock::new(),
            lock: Arc::default(),
        })
    }

    /// Returns the file of the host to which `file` refers.
    ///
    /// # Errors
    /// If it is a file of another host.
    pub(in crate::storage) fn of(file: &File) -> io::Result<Arc<HostFile>> {
        let other =
            || io::Error::new(io::ErrorKind::InvalidInput, "a file of a simulated host in an engine of the host");
        file.share_backend().ok_or_else(other)
    }

    /// Returns the file's identity, without a system call.
    pub(super) fn id(&self) -> FileId {
        self.id
    }

    /// Returns the mapped parts of the file.
    #[inline]
    pub(in crate::storage) fn file_map(&self) -> &FileMap {
        &self.file_map
    }

    pub(super) fn fail(&self, what: &str, e: Errno) -> Error {
        Error::io(what, e.into()).at_path(&self.path)
    }

    fn read_buffered(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        if self.read_up_to(into, offset)? < into.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads until `into` is full or the file ends. Returns the number of bytes.
    pub(super) fn read_up_to(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
            match rustix::io::pread(self, &mut into[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                // O_DIRECT cannot continue in the middle of a sector. The last read ended there only because the file
                // does.
                Err(Errno::INVAL) if done > 0 && at % SECTOR != 0 => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }

    pub(super) fn write_buffered(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::FileTooLarge)?;
            match rustix::io::pwrite(self, &from[done..], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl FileBackend for HostFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn folder(&self) -> &Folder {
        &self.folder
    }

    fn renamed(&self, path: &Path) -> Result<File> {
        let fd =
            rustix::io::fcntl_dupfd_cloexec(self, 0).map_err(|e| self.fail("cannot duplicate the descriptor", e))?;
        Ok(File::new(HostFile {
            file_map: FileMap::default(),
            fd,
            path: path.to_path_buf(),
            folder: self.folder.clone(),
            access: self.access,
            id: self.id,
            is_block_device: self.is_block_device,
            direct: self.direct.clone(),
            lock: self.lock.clone(),
        }))
    }

    fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    fn stat(&self) -> Result<Stat> {
        let s = rustix::fs::fstat(self).map_err(|e| self.fail("cannot stat", e))?;
        // The size in a device's inode is 0. Seeking moves the file position, which no code uses.
        let len = match self.is_block_device {
            true => {
                rustix::fs::seek(self, SeekFrom::End(0)).map_err(|e| self.fail("cannot read the device's size", e))?
            }
            false => u64::try_from(s.st_size).unwrap_or(0),
        };
        Ok(Stat {
            id: self.id,
            len,
            // st_blocks always counts units of 512 bytes (stat(2)).
            allocated: u64::try_from(s.st_blocks).unwrap_or(0).saturating_mul(512),
            modified: s.st_mtime,
            modified_nanos: u32::try_from(s.st_mtime_nsec).unwrap_or(0),
            mode: s.st_mode & 0o7777,
        })
    }

    fn name_status(&self) -> Result<NameStatus> {
        match rustix::fs::stat(self.path()) {
            Ok(s) if (FileId { dev: s.st_dev, ino: s.st_ino }) == self.id => Ok(NameStatus::Kept),
            Ok(_) => Ok(NameStatus::Replaced),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                let links = rustix::fs::fstat(self).map_err(|e| self.fail("cannot stat", e))?.st_nlink;
                Ok(if links == 0 { NameStatus::Removed } else { NameStatus::Renamed })
            }
            Err(e) => Err(self.fail("cannot look up the file's name", e)),
        }
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        match self.direct.get() {
            None => self.read_buffered(into, offset),
            Some(rules) => self.read_direct(into, offset, rules.offset),
        }
        .map_err(|e| Error::io(format!("cannot read {} bytes", into.len()), e).at_path(self.path()).at_offset(offset))
    }

    fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        match self.direct.get() {
            None => self.write_buffered(from, offset),
            Some(rules) => self.write_direct(from, offset, rules.offset),
        }
        .map_err(|e| Error::io(format!("cannot write {} bytes", from.len()), e).at_path(self.path()).at_offset(offset))
    }

    fn sync(&self) -> Result<()> {
        retry(|| rustix::fs::fdatasync(self)).map_err(|e| self.fail("cannot make the data durable", e))
    }

    fn sync_all(&self) -> Result<()> {
        retry(|| rustix::fs::fsync(self)).map_err(|e| self.fail("cannot make the file durable", e))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        retry(|| rustix::fs::ftruncate(self, len))
            .map_err(|e| self.fail(&format!("cannot set the length to {len} bytes"), e))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        match retry(|| rustix::fs::fallocate(self, FallocateFlags::KEEP_SIZE, offset, len)) {
            Ok(()) => Ok(()),
            Err(e @ (Errno::OPNOTSUPP | Errno::NOSYS)) => {
                let what = "this file system cannot preallocate space";
                Err(Error::new(ErrorKind::Unsupported, what).caused_by(io::Error::from(e)).at_path(self.path()))
            }
            Err(e) => Err(self.fail(&format!("cannot allocate {len} bytes"), e).at_offset(offset)),
        }
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let fail = |e| self.fail("cannot look for data", e).at_offset(offset);
        let mut from = offset;
        loop {
            // Seeking moves the file position, which no code uses.
            let start = match rustix::fs::seek(self, SeekFrom::Data(from)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return Ok(None),
                Err(e) => return Err(fail(e)),
            };
            match rustix::fs::seek(self, SeekFrom::Hole(start)) {
                Ok(end) if end > start => return Ok(Some((start, end - start))),
                // The data was punched between the two calls.
                Ok(_) => from = start + 1,
                Err(Errno::NXIO) => return Ok(None),
                Err(e) => return Err(fail(e)),
            }
        }
    }

    /// Waits while only processes that have ended hold a conflicting lock (the fence, crash-safety 8): I/O of a killed
    /// process can still reach the file. The locks of that process last until the I/O has completed, because its rings
    /// hold the locked open file descriptions.
    fn lock(&self, wanted: Lock) -> Result<()> {
        if wanted == Lock::Exclusive && self.access == Access::Read {
            let what = "an exclusive lock needs a file opened for writing";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(self.path()));
        }
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let e = match lock::change(self.as_fd(), self.id, *held, wanted) {
                Ok(()) => break,
                Err(e) => e,
            };
            let fenced = e.kind() == ErrorKind::Busy && !lock::is_held_by_live_process(self.as_fd(), self.id);
            if !fenced || began.elapsed() >= FENCE_TIMEOUT {
                return Err(e.at_path(self.path()));
            }
            log::debug!("{}: waiting for the I/O of a process that has ended", self.path().display());
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(250));
        }
        *held = Some(wanted);
        Ok(())
    }

    fn advise_random_reads(&self) {
        // The result is ignored: advice to the kernel affects only speed.
        let _ = rustix::fs::fadvise(self, 0, None, Advice::Random);
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(self, offset, std::num::NonZeroU64::new(len), Advice::WillNeed);
    }

    /// Returns 0 on file systems without a block device of their own (btrfs, NFS): `/sys/class/bdi` does not list them
    /// under their device number.
    fn kernel_readahead(&self) -> u64 {
        let of = |dev: u64| {
            let name = format!("/sys/class/bdi/{}:{}/read_ahead_kb", rustix::fs::major(dev), rustix::fs::minor(dev));
            std::fs::read_to_string(name).ok()?.trim().parse::<u64>().ok()
        };
        self.stat().ok().and_then(|stat| of(stat.id.dev)).map_or(0, |kib| kib.saturating_mul(1024))
    }

    /// Linux begins to write the dirty pages of the range, and drops the clean ones (mm/fadvise.c).
    fn start_writeback(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(self, offset, std::num::NonZeroU64::new(len), Advice::DontNeed);
    }

    fn mapped_bytes(&self) -> u64 {
        self.file_map.mapped_bytes()
    }

    fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        HostFile::set_modified(self, time)
    }

    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        HostFile::attribute(self, name)
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        HostFile::set_attribute(self, name, value)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        HostFile::punch_hole(self, offset, len)
    }

    fn allocation_mode(&self) -> AllocationMode {
        HostFile::allocation_mode(self)
    }

    fn is_on_shared_file_system(&self) -> bool {
        HostFile::is_on_shared_file_system(self)
    }

    fn disable_copy_on_write(&self) -> Result<()> {
        HostFile::disable_copy_on_write(self)
    }

    fn file_system_space(&self) -> Result<FileSystemSpace> {
        HostFile::file_system_space(self)
    }

    fn set_direct(&self) -> Result<Option<DirectRules>> {
        HostFile::set_direct(self)
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
