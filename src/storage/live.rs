//! Memory that outlives the process but not the host: a file on tmpfs, mapped.
//!
//! A killed daemon's successor finds it as it was, store for store; after a reboot it is gone, as it must be. Its room is
//! reserved when it is made, so that a full tmpfs is an error then and not a signal later.
#![allow(unsafe_code)]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, fstatfs, open};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Error, ErrorKind, Result};

/// What `statfs` says of tmpfs and ramfs (linux/magic.h).
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58F6];

/// Words of such memory.
#[derive(Clone, Debug)]
pub enum Live {
    /// Of the host.
    Host(Arc<Mapping>),
    /// Of the simulated host.
    #[cfg(feature = "sim")]
    Sim(Arc<[AtomicU64]>),
}

impl Deref for Live {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match self {
            Live::Host(mapping) => mapping,
            #[cfg(feature = "sim")]
            Live::Sim(words) => words,
        }
    }
}

/// A mapped file.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
    /// Nobody else cuts the file while we hold it open: it lies in a folder of ours.
    _file: OwnedFd,
}

// SAFETY: the mapping is shared memory that is only reached as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `words` words of the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// `Unsupported` where the folder is not on a file system in memory; `NoSpace` where that is full; `Invalid` where
    /// the file has another length than ours.
    pub(super) fn open(path: &Path, words: usize) -> Result<Mapping> {
        let failed = |what: &str, e: rustix::io::Errno| Error::io(what, e.into()).at_path(path);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed("cannot open", e))?;
        let kind = fstatfs(&file).map_err(|e| failed("cannot ask for the file system", e))?.f_type;
        if !MEMORY_FILE_SYSTEMS.contains(&kind) {
            let _ = rustix::fs::unlink(path);
            return Err(Error::new(ErrorKind::Unsupported, "not on a file system in memory (tmpfs)").at_path(path));
        }
        let bytes = words * size_of::<AtomicU64>();
        let len = fstat(&file).map_err(|e| failed("cannot look at", e))?.st_size;
        if len == 0 {
            let reserved = fallocate(&file, FallocateFlags::empty(), 0, bytes as u64);
            reserved.map_err(|e| {
                let _ = rustix::fs::unlink(path);
                failed("cannot reserve room", e)
            })?;
        } else if usize::try_from(len) != Ok(bytes) {
            return Err(Error::new(ErrorKind::Invalid, format!("has {len} bytes instead of {bytes}")).at_path(path));
        }
        // SAFETY: a fresh mapping of a whole file at a place that the kernel chooses.
        let start = unsafe {
            mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        let start = start.map_err(|e| failed("cannot map", e))?;
        let start = NonNull::new(start.cast()).expect("a mapping is not at address zero");
        Ok(Mapping { start, words, _file: file })
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: mapped, page-aligned, `words` long, for as long as self lives; any bits are a u64; everybody who has
        // the file uses atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length; no reference outlives self.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_was_stored_is_found_again() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("a.live");
        let first = Mapping::open(&path, 1024).unwrap();
        first[1023].store(7, Ordering::Release);
        drop(first);
        assert_eq!(Mapping::open(&path, 1024).unwrap()[1023].load(Ordering::Acquire), 7);
        assert_eq!(Mapping::open(&path, 512).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_disk_is_no_memory() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("a.live");
        assert_eq!(Mapping::open(&path, 1024).unwrap_err().kind(), ErrorKind::Unsupported);
        assert!(!path.exists());
    }
}
