//! Memory that outlives the process but not the host: a file on tmpfs, mapped. `runtime.rs` makes and opens it.
//!
//! A killed daemon's successor finds it as it was, store for store; after a reboot it is gone, as it must be.
//!
//! A store must not cost more than a store, so the words are not written by system calls, and a file that somebody cuts
//! while it is mapped raises SIGBUS. Seals that forbid cutting exist only for files without a name, which a successor could
//! not find. So the signal is caught (`bus.rs`): the handler puts anonymous memory in the place of the mapping, notes that
//! it is *lost*, and the access goes on there. Whoever relies on the words asks [`Live::is_lost`] after the store.
#![allow(unsafe_code)]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::bus;
#[cfg(feature = "sim")]
use super::sim::SimLive;
use crate::error::{Error, ErrorKind, Result};

/// Words of such memory. It is locked against other processes until the last clone is gone.
#[derive(Clone, Debug)]
pub struct Live(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Host(Arc<Mapping>),
    #[cfg(feature = "sim")]
    Sim(Arc<SimLive>),
}

impl Live {
    pub(super) fn host(mapping: Mapping) -> Live {
        Live(Kind::Host(Arc::new(mapping)))
    }

    #[cfg(feature = "sim")]
    pub(super) fn sim(words: SimLive) -> Live {
        Live(Kind::Sim(Arc::new(words)))
    }

    /// Whether an access met a page that the file does not have any more: nothing stored here will be found again.
    #[inline]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Kind::Host(mapping) => GUARDS[mapping.guard].lost.load(Ordering::Acquire),
            #[cfg(feature = "sim")]
            Kind::Sim(_) => false,
        }
    }
}

impl Deref for Live {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match &self.0 {
            Kind::Host(mapping) => mapping,
            #[cfg(feature = "sim")]
            Kind::Sim(words) => words,
        }
    }
}

/// A mapping that the signal handler knows.
#[derive(Debug)]
struct Guard {
    /// Address; 0: free, 1: being filled in.
    start: AtomicUsize,
    bytes: AtomicUsize,
    lost: AtomicBool,
}

/// Mappings that a process may have at once.
const MAPPINGS: usize = 4096;

static GUARDS: [Guard; MAPPINGS] =
    [const { Guard { start: AtomicUsize::new(0), bytes: AtomicUsize::new(0), lost: AtomicBool::new(false) } };
        MAPPINGS];

/// A mapped file.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
    guard: usize,
    /// Keeps the lock.
    _file: OwnedFd,
}

// SAFETY: the mapping is shared memory that is only reached as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all `words` words of a file.
    ///
    /// # Errors
    /// `Io`; `Unsupported` if SIGBUS cannot be caught, or there are too many mappings already.
    pub(super) fn new(file: OwnedFd, words: usize) -> Result<Mapping> {
        if !bus::is_caught() {
            return Err(Error::new(ErrorKind::Unsupported, "SIGBUS cannot be caught"));
        }
        let claimed = |guard: &Guard| guard.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let Some(guard) = GUARDS.iter().position(claimed) else {
            return Err(Error::new(ErrorKind::Unsupported, format!("more than {MAPPINGS} journals in one process")));
        };
        let bytes = words * size_of::<AtomicU64>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping of a whole file at a place that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(|e| {
            GUARDS[guard].start.store(0, Ordering::Release);
            Error::io("cannot map", e.into())
        })?;
        GUARDS[guard].lost.store(false, Ordering::Relaxed);
        GUARDS[guard].bytes.store(bytes, Ordering::Relaxed);
        GUARDS[guard].start.store(start as usize, Ordering::Release);
        let start = NonNull::new(start.cast()).expect("a mapping is not at address zero");
        Ok(Mapping { start, words, guard, _file: file })
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: mapped, page-aligned, `words` long, for as long as self lives (by the file, or by what `rescue` puts in its
        // place); any bits are a u64; everybody who has the file uses atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the address may be given to another mapping.
        GUARDS[self.guard].start.store(0, Ordering::Release);
        // SAFETY: mapped in `new` with this length; no reference outlives self.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

/// Puts anonymous memory in the place of the mapping that has a page missing at `address`; false if none of ours is there.
/// For the signal handler: it takes no lock, allocates nothing, and calls only `mmap`.
pub(super) fn rescue(address: usize) -> bool {
    for guard in &GUARDS {
        let (start, bytes) = (guard.start.load(Ordering::Acquire), guard.bytes.load(Ordering::Relaxed));
        if start <= 1 || !(start..start.saturating_add(bytes)).contains(&address) {
            continue;
        }
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range is a mapping of ours, which stays mapped for as long as the guard names it: the access that
        // raised the signal holds a reference to it. Other threads find zeros from here on, which are valid words.
        let mapped = unsafe { libc::mmap(start as *mut _, bytes, protection, flags | libc::MAP_FIXED, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        guard.lost.store(true, Ordering::Release);
        return true;
    }
    false
}
