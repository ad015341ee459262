//! The runtime folder of the host: a folder on tmpfs, opened once.
//!
//! The contents of the folder are trusted. So the folder must belong to this process's user and be closed to all other
//! users, and each journal must be a regular file of that user with one name and mode 0600. All accesses go through the
//! folder's descriptor: renaming or replacing the folder has no effect on a running process.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat, fallocate, fchmod, flock, fstat,
    fstatfs, linkat, openat, unlinkat,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::runtime_folder::RuntimeFolderBackend;
use crate::storage::shm::{Shm, ShmMapping};

/// File system types of tmpfs and ramfs, as statfs returns them (linux/magic.h).
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58F6];

/// Open runtime folder of the host.
#[derive(Debug)]
pub(super) struct HostRuntimeFolder {
    fd: OwnedFd,
    path: PathBuf,
}

impl HostRuntimeFolder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` if it is a symbolic link or not a folder, belongs to another user, or may be written by other users
    /// - `Unsupported` if it is not on tmpfs or ramfs
    /// - `Io`
    pub(super) fn open_folder(path: &Path) -> Result<HostRuntimeFolder> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR => refused("the runtime folder is no folder, or a symbolic link").at_path(path),
            e => Error::io("cannot open the runtime folder", e.into()).at_path(path),
        })?;
        let failed = |e: Errno| Error::io("cannot stat the runtime folder", e.into()).at_path(path);
        let stat = fstat(&fd).map_err(failed)?;
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            let what = format!("the runtime folder belongs to user {}; choose one with --runtime-dir", stat.st_uid);
            return Err(refused(&what).at_path(path));
        }
        if stat.st_mode & 0o022 != 0 {
            let what = format!("the runtime folder is open to other users: its mode is {:o}", stat.st_mode & 0o777);
            return Err(refused(&format!("{what}, and must be 700")).at_path(path));
        }
        if !MEMORY_FILE_SYSTEMS.contains(&fstatfs(&fd).map_err(failed)?.f_type) {
            return Err(Error::new(ErrorKind::Unsupported, "not on a file system in memory (tmpfs)").at_path(path));
        }
        // Other users could read the folder, but cannot have created anything in it.
        if stat.st_mode & 0o077 != 0 {
            fchmod(&fd, Mode::RWXU)
                .map_err(|e| Error::io("cannot close the runtime folder to other users", e.into()).at_path(path))?;
        }
        Ok(HostRuntimeFolder { fd, path: path.to_path_buf() })
    }

    /// Creates a file without a name and allocates its space. On a full tmpfs the allocation fails, so no later access
    /// causes SIGBUS for lack of space.
    fn create_unnamed(&self, bytes: u64) -> Result<OwnedFd> {
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(&self.path);
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = openat(&self.fd, ".", flags, mode).map_err(|e| failed("cannot create a live journal", e))?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(|e| failed("cannot allocate space for a live journal", e))?;
        Ok(file)
    }
}

impl RuntimeFolderBackend for HostRuntimeFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn create(&self, name: &str, words: usize) -> Result<Shm> {
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(self.path.join(name));
        // The file gets its name when it is complete and locked: no other process can lock it first, and a kill before
        // that leaves no file.
        let file = self.create_unnamed((words * size_of::<u64>()) as u64)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| failed("cannot lock the live journal", e))?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, unnamed, &self.fd, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| failed("cannot give the live journal its name", e))?;
        ShmMapping::new(file, words).map(Shm::mapped).map_err(|e| e.at_path(self.path.join(name)))
    }

    fn check_space(&self, bytes: u64) -> Result<()> {
        self.create_unnamed(bytes).map(drop)
    }

    fn open(&self, name: &str, words: usize) -> Result<Shm> {
        let path = || self.path.join(name);
        let failed = |what: &str, e: Errno| Error::io(what, e.into()).at_path(path());
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.fd, name, flags, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NXIO | Errno::ISDIR => refused("not a regular file").at_path(path()),
            e => failed("cannot open the live journal", e),
        })?;
        let stat = || fstat(&file).map_err(|e| failed("cannot stat the live journal", e));
        foreign_reason(&stat()?, words).map_or(Ok(()), |why| Err(refused(&why).at_path(path())))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            Errno::WOULDBLOCK => {
                Error::new(ErrorKind::Busy, "another process has the live journal open").at_path(path())
            }
            e => failed("cannot lock the live journal", e),
        })?;
        // The previous owner may have removed the file before it released the lock.
        if stat()?.st_nlink == 0 {
            return Err(failed("cannot open the live journal", Errno::NOENT));
        }
        ShmMapping::new(file, words).map(Shm::mapped).map_err(|e| e.at_path(path()))
    }

    fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io("cannot remove the live journal", e.into()).at_path(self.path.join(name))),
        }
    }

    fn list(&self) -> Result<Vec<String>> {
        let failed = |e: Errno| Error::io("cannot list the folder", e.into()).at_path(&self.path);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(self.fd.as_fd()).map_err(failed)? {
            names.extend(entry.map_err(failed)?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    fn coarse_seconds(&self) -> u64 {
        u64::try_from(clock_gettime(ClockId::MonotonicCoarse).tv_sec).unwrap_or(0)
    }

    fn random_id(&self) -> Uuid {
        Uuid::new_v4()
    }
}

/// Returns why a file in the folder cannot be one that [`RuntimeFolderBackend::create`] made; `None` if it can.
fn foreign_reason(stat: &Stat, words: usize) -> Option<String> {
    let bytes = words * size_of::<u64>();
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Some("not a regular file".to_owned());
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Some(format!("the live journal belongs to user {}", stat.st_uid));
    }
    if stat.st_mode & 0o7777 != 0o600 {
        return Some(format!("the live journal's mode is {:o}, and must be 600", stat.st_mode & 0o7777));
    }
    if stat.st_nlink > 1 {
        return Some(format!("the live journal has {} names, and must have one", stat.st_nlink));
    }
    (usize::try_from(stat.st_size) != Ok(bytes))
        .then(|| format!("the live journal has {} bytes, and must have {bytes}", stat.st_size))
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Refused, why)
}

#[cfg(test)]
#[path = "runtime_folder_tests.rs"]
mod tests;
