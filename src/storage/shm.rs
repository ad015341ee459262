//! Memory that outlives the process but not the host: a file on tmpfs, mapped. `runtime_dir.rs` makes and opens it.
//!
//! A killed daemon's successor finds it as it was, store for store; after a reboot it is gone, as it must be.
//!
//! A store must not cost more than a store, so the words are not written by system calls, and a file that another process cuts
//! while it is mapped raises SIGBUS. Seals that forbid cutting exist only for files without a name, which a successor could
//! not find. So the mapping has a [`Guard`]: zeros of our own take its place, it counts as *lost*, and the access goes on
//! there. Code that relies on the words checks [`Shm::is_lost`] after the store.
#![allow(unsafe_code)]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::sigbus::Guard;
#[cfg(feature = "sim")]
use super::sim::SimShm;
use crate::error::{Error, ErrorKind, Result};

/// Words of such memory. It is locked against other processes until the last clone is gone.
#[derive(Clone, Debug)]
pub struct Shm(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Host(Arc<ShmMapping>),
    #[cfg(feature = "sim")]
    Sim(Arc<SimShm>),
}

impl Shm {
    pub(super) fn host(mapping: ShmMapping) -> Shm {
        Shm(Kind::Host(Arc::new(mapping)))
    }

    #[cfg(feature = "sim")]
    pub(super) fn sim(words: SimShm) -> Shm {
        Shm(Kind::Sim(Arc::new(words)))
    }

    /// Whether an access met a page that the file does not have any more: nothing stored here will be found again.
    #[inline]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Kind::Host(mapping) => mapping.guard.is_lost(),
            #[cfg(feature = "sim")]
            Kind::Sim(_) => false,
        }
    }
}

impl Deref for Shm {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match &self.0 {
            Kind::Host(mapping) => mapping,
            #[cfg(feature = "sim")]
            Kind::Sim(words) => words,
        }
    }
}

/// A mapped file.
#[derive(Debug)]
pub(super) struct ShmMapping {
    // Fields are dropped in order: the guard goes before the mapping that it is for.
    guard: Guard,
    map: Map,
    /// Keeps the lock.
    _file: OwnedFd,
}

#[derive(Debug)]
struct Map {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is shared memory that is only reached as atomics.
unsafe impl Send for Map {}
// SAFETY: as for `Send`: any thread may load and store atomics at any time.
unsafe impl Sync for Map {}

impl ShmMapping {
    /// Maps all `words` words of a file.
    ///
    /// # Errors
    /// `Io`; `Unsupported` if SIGBUS cannot be caught.
    pub(super) fn new(file: OwnedFd, words: usize) -> Result<ShmMapping> {
        let bytes = words * size_of::<AtomicU64>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping of a whole file at a place that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(|e| Error::io("cannot map", e.into()))?;
        let map = Map { start: NonNull::new(start.cast()).expect("a mapping is not at address zero"), words };
        // SAFETY: the mapping begins at a page and has only bytes of the file, up to the end of its last page. `Mapping` drops
        // the guard before the map, and its words are reached as atomics only. The journal's users check `is_lost`.
        let guard = unsafe { Guard::new(start.cast(), bytes, rustix::param::page_size()) };
        let guard = guard.ok_or_else(|| Error::new(ErrorKind::Unsupported, "SIGBUS cannot be caught"))?;
        Ok(ShmMapping { guard, map, _file: file })
    }
}

impl Deref for ShmMapping {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: mapped, page-aligned, `words` long, for as long as self lives (by the file, or by the zeros that the guard puts
        // in its place); any bits are a u64; everybody who has the file uses atomics.
        unsafe { std::slice::from_raw_parts(self.map.start.as_ptr(), self.map.words) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in `Mapping::new` with this length; no reference outlives the `Mapping` that has self.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}
