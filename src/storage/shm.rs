//! Shared memory that outlives the process but not the boot: a mapped file on tmpfs.
//!
//! The successor of a killed daemon finds the memory exactly as the last store left it. A reboot discards the memory.
//! The runtime folder ([`RuntimeFolder`](super::RuntimeFolder)) creates and opens such files.
//!
//! A store is a single instruction, without a system call. If another process truncates the mapped file, a store to a
//! missing page causes SIGBUS. Seals that forbid truncation exist only for files without a name, which a successor
//! could not find. So the mapping has a [`Guard`]: after a SIGBUS private zeros replace the mapping, the memory counts
//! as *lost*, and the store is repeated on the zeros. Code that relies on a store checks [`Shm::is_lost`] after the
//! store.
#![allow(unsafe_code)]

#[cfg(feature = "sim")]
use std::any::Any;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

use super::sigbus::Guard;
use crate::error::{Error, ErrorKind, Result};

/// Words of shared memory. Locked against other processes until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Shm(ShmKind);

#[derive(Clone, Debug)]
enum ShmKind {
    Mapped(Arc<ShmMapping>),
    #[cfg(feature = "sim")]
    Heap(Arc<HeapWords>),
}

impl Shm {
    pub(super) fn mapped(mapping: ShmMapping) -> Shm {
        Shm(ShmKind::Mapped(Arc::new(mapping)))
    }

    /// Creates shared memory of a simulated host. `lock` is dropped with the last clone.
    #[cfg(feature = "sim")]
    pub(super) fn heap(words: Arc<[AtomicU64]>, lock: impl Any + Send + Sync) -> Shm {
        Shm(ShmKind::Heap(Arc::new(HeapWords { words, _lock: Box::new(lock) })))
    }

    /// Returns whether an access raised SIGBUS, usually because another process truncated the file. Stores from then on
    /// do not reach the file, so no successor finds them.
    #[inline]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            ShmKind::Mapped(mapping) => mapping.guard.is_lost(),
            #[cfg(feature = "sim")]
            ShmKind::Heap(_) => false,
        }
    }
}

impl Deref for Shm {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match &self.0 {
            ShmKind::Mapped(mapping) => mapping,
            #[cfg(feature = "sim")]
            ShmKind::Heap(heap) => &heap.words,
        }
    }
}

/// Words on the heap, with a lock of the simulated host.
#[cfg(feature = "sim")]
struct HeapWords {
    words: Arc<[AtomicU64]>,
    _lock: Box<dyn Any + Send + Sync>,
}

#[cfg(feature = "sim")]
impl std::fmt::Debug for HeapWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeapWords({})", self.words.len())
    }
}

/// Mapped file of words.
#[derive(Debug)]
pub(super) struct ShmMapping {
    // Fields are dropped in order: the guard must be dropped before the mapping that it guards.
    guard: Guard,
    mapping: MmapRaw,
    words: usize,
    /// Holds the lock of the file.
    _file: OwnedFd,
}

impl ShmMapping {
    /// Maps all `words` words of a file.
    ///
    /// # Errors
    /// - `Unsupported` if the SIGBUS handler cannot be installed
    /// - `Io`
    pub(super) fn new(file: OwnedFd, words: usize) -> Result<ShmMapping> {
        let bytes = words * size_of::<AtomicU64>();
        let mapping = MmapOptions::new().len(bytes).map_raw(&file);
        let mapping = mapping.map_err(|e| Error::io("cannot map the live journal", e))?;
        // SAFETY: the range is the mapping made above, which is readable and writable up to the end of the page with
        // its last byte. `ShmMapping` drops the guard before the mapping, so the mapping outlives the guard. The bytes
        // of the mapping are accessed only as atomics (`Deref`).
        let guard = unsafe { Guard::new(mapping.as_mut_ptr(), bytes, rustix::param::page_size()) };
        let guard = guard.ok_or_else(|| Error::new(ErrorKind::Unsupported, "cannot install the handler for SIGBUS"))?;
        Ok(ShmMapping { guard, mapping, words, _file: file })
    }
}

impl Deref for ShmMapping {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page and has `words` words, which stay mapped until `mapping` is dropped: by
        // the file, or by the zeros that the guard puts in its place. Every bit pattern is a valid u64. This process
        // and every other one of diffdisk access the words only as atomics.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast(), self.words) }
    }
}
