//! An open file of the host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::file_map::FileMap;
use super::folder::HostFolder;
use super::lock;
use super::retry;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::env::{Access, DirectRules, FileId, Lock, NameStatus, Stat};
use crate::units::SECTOR;

/// How long the I/O of a process that is gone may take to end.
const FENCE_PATIENCE: Duration = Duration::from_secs(30);

/// An open regular file. Clones share the open description, and with it the locks.
#[derive(Clone, Debug)]
pub struct HostFile(pub(super) Arc<OpenFile>);

#[derive(Debug)]
pub(super) struct OpenFile {
    /// Dropped before the descriptor, whose locks it keeps.
    mapped: FileMap,
    fd: OwnedFd,
    path: PathBuf,
    /// Where it was found.
    folder: HostFolder,
    access: Access,
    id: FileId,
    is_device: bool,
    /// What O_DIRECT asks for, once switched on.
    pub(super) direct: OnceLock<DirectRules>,
    lock: Mutex<Option<Lock>>,
}

impl HostFile {
    /// Takes an fd that was opened non-blocking; refuses what is not a regular file.
    pub(super) fn new(fd: OwnedFd, path: &Path, access: Access, folder: &HostFolder) -> Result<HostFile> {
        HostFile::of_kind(fd, path, access, folder, &[FileType::RegularFile])
    }

    /// As [`HostFile::new`]; block devices are taken, too.
    pub(super) fn new_disk(fd: OwnedFd, path: &Path, access: Access, folder: &HostFolder) -> Result<HostFile> {
        HostFile::of_kind(fd, path, access, folder, &[FileType::RegularFile, FileType::BlockDevice])
    }

    fn of_kind(fd: OwnedFd, path: &Path, access: Access, folder: &HostFolder, kinds: &[FileType]) -> Result<HostFile> {
        let fail = |what, e: Errno| Error::io(what, e.into()).at_path(path);
        let stat = rustix::fs::fstat(&fd).map_err(|e| fail("cannot stat", e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !kinds.contains(&kind) {
            let what = match kind {
                FileType::BlockDevice => {
                    "not a regular file but a block device: VHDs inside devices are not supported, raw disks on devices \
                     are (--from raw, --to raw)"
                }
                _ => "not a regular file",
            };
            return Err(Error::new(ErrorKind::Refused, what).at_path(path));
        }
        // Only the opening had to be non-blocking: on file systems that cannot do it, io_uring hands EAGAIN to
        // whoever left the flag on.
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| fail("cannot read the flags", e))?;
        rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(|e| fail("cannot set the flags", e))?;
        Ok(HostFile(Arc::new(OpenFile {
            mapped: FileMap::default(),
            fd,
            path: path.to_path_buf(),
            folder: folder.clone(),
            access,
            id: FileId { dev: stat.st_dev, ino: stat.st_ino },
            is_device: kind == FileType::BlockDevice,
            direct: OnceLock::new(),
            lock: Mutex::new(None),
        })))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The folder in which it was found.
    pub fn folder(&self) -> &HostFolder {
        &self.0.folder
    }

    /// Which file it is; no system call.
    pub fn id(&self) -> FileId {
        self.0.id
    }

    /// See [`File::is_device`](crate::storage::File::is_block_device).
    pub fn is_block_device(&self) -> bool {
        self.0.is_device
    }

    pub(super) fn fail(&self, what: &str, e: Errno) -> Error {
        Error::io(what, e.into()).at_path(&self.0.path)
    }

    /// See [`File::stat`](crate::storage::File::stat).
    pub fn stat(&self) -> Result<Stat> {
        let s = rustix::fs::fstat(self).map_err(|e| self.fail("cannot stat", e))?;
        // The size in a device's inode is 0. Seeking moves the file position, which nothing reads.
        let len = match self.0.is_device {
            true => {
                rustix::fs::seek(self, SeekFrom::End(0)).map_err(|e| self.fail("cannot read the device's size", e))?
            }
            false => u64::try_from(s.st_size).unwrap_or(0),
        };
        Ok(Stat {
            id: self.0.id,
            len,
            // st_blocks counts units of 512 bytes, whatever the file system's blocks are (stat(2)).
            allocated: u64::try_from(s.st_blocks).unwrap_or(0).saturating_mul(512),
            modified: s.st_mtime,
            modified_nanos: u32::try_from(s.st_mtime_nsec).unwrap_or(0),
            mode: s.st_mode & 0o7777,
        })
    }

    /// See [`File::naming`](crate::storage::File::name_status).
    pub fn name_status(&self) -> Result<NameStatus> {
        match rustix::fs::stat(self.path()) {
            Ok(s) if (FileId { dev: s.st_dev, ino: s.st_ino }) == self.0.id => Ok(NameStatus::Kept),
            Ok(_) => Ok(NameStatus::Replaced),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                let links = rustix::fs::fstat(self).map_err(|e| self.fail("cannot stat", e))?.st_nlink;
                Ok(if links == 0 { NameStatus::Removed } else { NameStatus::Renamed })
            }
            Err(e) => Err(self.fail("cannot look up its name", e)),
        }
    }

    /// See [`File::read_at`](crate::storage::File::read_at).
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        match self.0.direct.get() {
            None => self.fill(into, offset),
            Some(rules) => self.read_direct(into, offset, rules.offset),
        }
        .map_err(|e| Error::io(format!("cannot read {} bytes", into.len()), e).at_path(self.path()).at_offset(offset))
    }

    /// See [`File::write_at`](crate::storage::File::write_at).
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        match self.0.direct.get() {
            None => self.write_buffered(from, offset),
            Some(rules) => self.write_direct(from, offset, rules.offset),
        }
        .map_err(|e| Error::io(format!("cannot write {} bytes", from.len()), e).at_path(self.path()).at_offset(offset))
    }

    fn fill(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        if self.read_up_to(into, offset)? < into.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads until `into` is full or the file ends.
    pub(super) fn read_up_to(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
            match rustix::io::pread(self, &mut into[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                // O_DIRECT goes on only from where a sector begins, and a file's odd end is not such a place.
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

    /// See [`File::sync`](crate::storage::File::sync).
    pub fn sync(&self) -> Result<()> {
        retry(|| rustix::fs::fdatasync(self)).map_err(|e| self.fail("cannot make the data durable", e))
    }

    /// See [`File::sync_all`](crate::storage::File::sync_all).
    pub fn sync_all(&self) -> Result<()> {
        retry(|| rustix::fs::fsync(self)).map_err(|e| self.fail("cannot make the file durable", e))
    }

    /// See [`File::set_len`](crate::storage::File::set_len).
    pub fn set_len(&self, len: u64) -> Result<()> {
        retry(|| rustix::fs::ftruncate(self, len))
            .map_err(|e| self.fail(&format!("cannot set the length to {len} bytes"), e))
    }

    /// See [`File::allocate`](crate::storage::File::allocate).
    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        match retry(|| rustix::fs::fallocate(self, FallocateFlags::KEEP_SIZE, offset, len)) {
            Ok(()) => Ok(()),
            Err(e @ (Errno::OPNOTSUPP | Errno::NOSYS)) => {
                let what = "this file system cannot reserve room";
                Err(Error::new(ErrorKind::Unsupported, what).caused_by(io::Error::from(e)).at_path(self.path()))
            }
            Err(e) => Err(self.fail(&format!("cannot reserve {len} bytes"), e).at_offset(offset)),
        }
    }

    /// See [`File::next_data`](crate::storage::File::next_data).
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let fail = |e| self.fail("cannot look for data", e).at_offset(offset);
        let mut from = offset;
        loop {
            // Seeking moves the file position, which nobody reads.
            let start = match rustix::fs::seek(self, SeekFrom::Data(from)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return Ok(None),
                Err(e) => return Err(fail(e)),
            };
            match rustix::fs::seek(self, SeekFrom::Hole(start)) {
                Ok(end) if end > start => return Ok(Some((start, end - start))),
                // The run was punched between the two calls.
                Ok(_) => from = start + 1,
                Err(Errno::NXIO) => return Ok(None),
                Err(e) => return Err(fail(e)),
            }
        }
    }

    /// See [`File::lock`](crate::storage::File::lock). It may be called again to change the kind of lock.
    ///
    /// A killed process's I/O can still land after it is gone; its locks stay until then, since rings hold the locked
    /// descriptions. That is the fence (crash-safety 3.10), and here is who waits at it.
    pub fn lock(&self, wanted: Lock) -> Result<()> {
        if wanted == Lock::Exclusive && self.0.access == Access::Read {
            let what = "an exclusive lock needs a file opened for writing";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(self.path()));
        }
        let mut held = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let e = match lock::change(self.as_fd(), self.0.id, *held, wanted) {
                Ok(()) => break,
                Err(e) => e,
            };
            let fenced = e.kind() == ErrorKind::Busy && !lock::is_held_by_live_process(self.as_fd(), self.0.id);
            if !fenced || began.elapsed() >= FENCE_PATIENCE {
                return Err(e.at_path(self.path()));
            }
            log::debug!("{}: waiting for the I/O of a process that has ended", self.path().display());
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(250));
        }
        *held = Some(wanted);
        Ok(())
    }

    /// See [`File::expect_scattered_reads`](crate::storage::File::advise_random_reads).
    pub fn advise_random_reads(&self) {
        // Advice: where it is not taken, nothing is lost but time.
        let _ = rustix::fs::fadvise(self, 0, None, rustix::fs::Advice::Random);
    }

    /// See [`File::prefetch`](crate::storage::File::prefetch).
    pub fn prefetch(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(self, offset, std::num::NonZeroU64::new(len), rustix::fs::Advice::WillNeed);
    }

    /// See [`File::host_readahead`](crate::storage::File::kernel_readahead). File systems without a device of their own
    /// (btrfs, NFS) are not found where Linux shows it.
    pub fn kernel_readahead(&self) -> u64 {
        let of = |dev: u64| {
            let name = format!("/sys/class/bdi/{}:{}/read_ahead_kb", rustix::fs::major(dev), rustix::fs::minor(dev));
            std::fs::read_to_string(name).ok()?.trim().parse::<u64>().ok()
        };
        self.stat().ok().and_then(|stat| of(stat.id.dev)).map_or(0, |kib| kib.saturating_mul(1024))
    }

    /// See [`File::write_behind`](crate::storage::File::start_writeback). Linux begins to write what is dirty, and drops only
    /// what is clean (mm/fadvise.c).
    pub fn start_writeback(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fadvise(self, offset, std::num::NonZeroU64::new(len), rustix::fs::Advice::DontNeed);
    }

    /// Its parts that can be copied from.
    #[inline]
    pub(in crate::storage) fn file_map(&self) -> &FileMap {
        &self.0.mapped
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
