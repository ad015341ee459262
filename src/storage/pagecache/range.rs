//! A range of a file that is resident in the page cache.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::storage::op::FileSlot;
use crate::storage::prefetch;

/// Maximum length of a copy: a longer one would delay the requests that follow it.
pub const MAX_COPY: usize = 2 << 20;

/// Unit of a copy in bytes: while one chunk is copied, the next one is prefetched.
pub(super) const CHUNK: usize = 4 << 10;

/// Range of a file that can be copied from the page cache, as long as the file is registered in its slot.
#[derive(Clone, Copy, Debug)]
pub struct CachedRange {
    pub(super) from: NonNull<u8>,
    pub(super) slot: FileSlot,
    pub(super) offset: u64,
    pub(super) len: usize,
}

impl CachedRange {
    /// Creates a range of `len` > 0 bytes, for an engine that does not copy from mappings.
    pub fn new(slot: FileSlot, offset: u64, len: usize) -> CachedRange {
        CachedRange { from: NonNull::dangling(), slot, offset, len }
    }

    /// Returns the slot of the file.
    pub fn slot(&self) -> FileSlot {
        self.slot
    }

    /// Returns the offset in the file in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes the processor walk the page tables for the range, without waiting.
    #[inline]
    pub fn prefetch_pages(&self) {
        prefetch::prefetch_pages(self.from.as_ptr(), self.len);
    }

    /// Prefetches the bytes that are copied first, without waiting.
    #[inline]
    pub fn prefetch(&self) {
        prefetch::prefetch_range(self.from.as_ptr(), self.len.min(CHUNK));
    }
}

// SAFETY: the pointer is an address, which is not tied to a thread. It may be dangling: `new` stores no mapping, and a
// region may be unmapped while a range of it exists. Prefetches never fault. Only `PageCacheReader::copy` reads through
// the pointer, after it has checked that a file of the reader has a mapping at this address.
unsafe impl Send for CachedRange {}
