//! Prefetch instructions of the processor. The functions do nothing on processors other than x86-64.
#![allow(unsafe_code)]

use std::hint::black_box;

/// Size of a page in bytes.
pub(super) const PAGE: usize = 4096;

/// Size of a cache line in bytes.
const LINE: usize = 64;

/// Prefetches the cache line that contains an address, which may be invalid.
#[inline]
pub fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it accesses no memory as far as the program can observe, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Prefetches one cache line of each page of `len` > 0 bytes, which makes the processor walk the page tables. A copy
/// waits for each page-table walk, but the processor overlaps the walks of prefetches that follow each other closely.
#[inline]
pub(super) fn prefetch_pages(at: *const u8, len: usize) {
    (0..len).step_by(PAGE).for_each(|to| prefetch_line(at.wrapping_add(to)));
    if !(at as usize).is_multiple_of(PAGE) {
        prefetch_line(at.wrapping_add(len - 1));
    }
}

/// Prefetches all lines of `len` bytes into the second-level cache, which accepts more requests at once than the first.
/// `black_box` spaces the prefetches out: a burst of them delays the loads that follow it.
#[inline]
pub(super) fn prefetch_range(at: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for to in (0..len).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it accesses no memory as far as the program can observe, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(black_box(at.wrapping_add(to)).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}
