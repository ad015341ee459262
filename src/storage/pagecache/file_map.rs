//! Mapped regions of one file, with the residency of their pages in the page cache.
//!
//! ```text
//!   file     regions of 256 MiB, mapped when a read needs them (by long reads only if they read the same data again)
//!   region   a bit per page: the page was resident at the last query
//!            a counter per window of 64 pages: reads that missed because of a page without its bit
//! ```
//!
//! Residency is queried (mincore) for whole windows, and only for windows in which reads missed repeatedly: a query
//! costs as much as two reads. A page may leave the page cache after the query. A copy of that page then waits for the
//! disk, as any access to a mapped file does. The reader measures how long copies take, and clears the bits of windows
//! that made it wait.
//!
//! A mapping appears in the resident set of the process (VmRSS, as RssFile), but its pages are page cache that the
//! kernel reclaims. The kernel does not reclaim page tables: 4 KiB for each 2 MiB of which something was copied. So the
//! number of mapped regions is bounded.
//!
//! Truncating a file fills the rest of its last page with zeros, in these mappings as in any other.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};

use crate::storage::prefetch::PAGE;

/// Size of a window in bytes. Its residency is one word with a bit per page.
const WINDOW_BYTES: usize = 64 * PAGE;
/// Size of a region in bytes.
const REGION_BYTES: usize = 256 << 20;
/// Maximum number of regions of a file. They cover 2 TiB, below which every block of an image begins.
const FILE_REGIONS: usize = 1 << 13;
/// Maximum number of mapped regions of a file: 32 GiB, with up to 64 MiB of page tables and 1.2 MiB of bits and
/// counters.
const MAX_MAPPED_PER_FILE: usize = 128;
/// Maximum number of mapped regions of all files together, which limits page tables to 512 MiB.
const MAX_MAPPED: usize = 1024;
/// Maximum length of a read that maps its region at once.
const SHORT_READ: usize = 16 << 10;
/// Size in bytes of an area, the unit in which long reads of an unmapped region are recorded: a region has 32 areas.
const AREA_BYTES: usize = REGION_BYTES / 32;
/// Number of misses in a window that cause a query.
const MISSES_PER_QUERY: u8 = 2;

/// File systems whose reads, writes and mappings all use the page cache (linux/magic.h): ext2 to ext4, XFS, btrfs,
/// f2fs, bcachefs. tmpfs is excluded: reading a hole through a mapping allocates memory for it, which would undo a
/// guest's discards.
const COHERENT_FILE_SYSTEMS: [i64; 5] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0xCA45_1A4E];

/// Number of mapped regions of all files.
static MAPPED_REGIONS: AtomicUsize = AtomicUsize::new(0);

/// Mapped regions of one file.
#[derive(Debug, Default)]
pub(in crate::storage) struct FileMap {
    regions: OnceLock<Box<[OnceLock<Arc<MapRegion>>]>>,
    /// Long reads of each unmapped region: a bit per area that was read (low half), and the sum of their lengths in
    /// units of [`SHORT_READ`] (high half).
    long_reads: OnceLock<Box<[AtomicU64]>>,
    /// Number of mapped regions.
    mapped: AtomicUsize,
    /// The file cannot be mapped, or the kernel does not report its residency.
    unusable: AtomicBool,
    /// No more regions can be mapped.
    full: AtomicBool,
}

/// Mapped region, which stays mapped until its last reference is dropped.
#[derive(Debug)]
pub(in crate::storage) struct MapRegion {
    mapping: MmapRaw,
    /// Bytes of the file in this region at the last query.
    valid_bytes: AtomicUsize,
    /// A bit per page, a word per window.
    resident: [AtomicU64; REGION_BYTES / WINDOW_BYTES],
    /// A counter per window.
    misses: [AtomicU8; REGION_BYTES / WINDOW_BYTES],
}

/// Known residency of a range of a file.
pub(in crate::storage) enum Residency {
    /// All pages were resident. The range can be copied from this address.
    Resident(NonNull<u8>),
    /// A query ([`FileMap::query`]) about this offset and length, a part of the range, is worthwhile.
    Query(u64, usize),
    /// The range cannot be copied, and a query is not worthwhile: too few reads have missed in the window so far, long
    /// reads have not read the region repeatedly, or the range cannot be mapped.
    Unknown,
}

impl FileMap {
    /// Returns the residency of `len` bytes from `offset`. Counts a miss. Makes no system call.
    #[inline]
    pub(in crate::storage) fn residency(&self, offset: u64, len: usize) -> Residency {
        let (index, within) = locate(offset);
        let end = within + len;
        if end > REGION_BYTES || len == 0 || self.unusable.load(Ordering::Relaxed) {
            return Residency::Unknown;
        }
        let Some(region) = self.region(index) else {
            let more = index < FILE_REGIONS && !self.full.load(Ordering::Relaxed);
            return if more && self.is_worth_mapping(index, within, len) {
                Residency::Query(offset, len)
            } else {
                Residency::Unknown
            };
        };
        if let Some(from) = region.resident_start(within, len) {
            return Residency::Resident(from);
        }
        // If no bit is missing, the range ends after the end that the file had at the last query.
        let page = region.first_missing(within / PAGE, end.div_ceil(PAGE)).unwrap_or((end - 1) / PAGE);
        let misses = &region.misses[page / 64];
        // Threads may overwrite each other's count, which only delays the query.
        let count = misses.load(Ordering::Relaxed).saturating_add(1);
        misses.store(if count < MISSES_PER_QUERY { count } else { 0 }, Ordering::Relaxed);
        let at = page * PAGE;
        if count < MISSES_PER_QUERY {
            Residency::Unknown
        } else {
            Residency::Query((index * REGION_BYTES + at) as u64, end - at)
        }
    }

    /// Queries the kernel for the residency of the windows that contain `len` > 0 bytes from `offset`. Maps the region
    /// instead, if it is not mapped yet. `size` returns the length of the file.
    pub(in crate::storage) fn query(
        &self,
        file: impl AsFd,
        offset: u64,
        len: usize,
        size: impl FnOnce() -> Option<u64>,
    ) {
        let Some(size) = size() else { return };
        if self.regions.get().is_none() && !(is_coherent(&file) && reports_residency(&file, size)) {
            return self.unusable.store(true, Ordering::Relaxed);
        }
        let (index, within) = locate(offset);
        match self.region(index) {
            Some(region) => {
                region.valid_bytes.store(bytes_in_region(index, size), Ordering::Relaxed);
                windows(within, len).for_each(|window| region.query_window(window));
            }
            None => self.map(file, index, size),
        }
    }

    /// Clears the residency bits of the windows that contain `len` bytes from `offset`.
    pub(in crate::storage) fn invalidate(&self, offset: u64, len: usize) {
        let (index, within) = locate(offset);
        let Some(region) = self.region(index) else { return };
        for window in windows(within, len) {
            region.resident[window].store(0, Ordering::Relaxed);
        }
    }

    /// Returns whether a read of `len` bytes at offset `within` justifies mapping the region. A short read does. Long
    /// reads do once their sum exceeds the size of the areas that they read, that is, when they read data again: one
    /// pass over a whole disk maps nothing.
    fn is_worth_mapping(&self, index: usize, within: usize, len: usize) -> bool {
        if len <= SHORT_READ {
            return true;
        }
        let long_reads = self.long_reads.get_or_init(|| (0..FILE_REGIONS).map(|_| AtomicU64::default()).collect());
        // Threads may overwrite each other's count, which only delays the query.
        let before = long_reads[index].load(Ordering::Relaxed);
        let areas = before & u64::from(u32::MAX) | 1 << (within / AREA_BYTES);
        let sum = (before >> 32) + (len / SHORT_READ) as u64;
        long_reads[index].store(sum.min(u32::MAX.into()) << 32 | areas, Ordering::Relaxed);
        sum > u64::from(areas.count_ones()) * (AREA_BYTES / SHORT_READ) as u64
    }

    /// Returns region `index` if it is mapped.
    #[inline]
    pub(in crate::storage) fn region(&self, index: usize) -> Option<&Arc<MapRegion>> {
        self.regions.get()?.get(index)?.get()
    }

    /// Returns the number of bytes of all mapped regions.
    pub(in crate::storage) fn mapped_bytes(&self) -> u64 {
        let regions = self.regions.get().into_iter().flatten();
        (regions.filter(|region| region.get().is_some()).count() * REGION_BYTES) as u64
    }

    fn map(&self, file: impl AsFd, index: usize, size: u64) {
        let regions = self.regions.get_or_init(|| (0..FILE_REGIONS).map(|_| OnceLock::new()).collect());
        let Some(slot) = regions.get(index) else { return };
        let mine = self.mapped.fetch_add(1, Ordering::Relaxed) < MAX_MAPPED_PER_FILE;
        let all = MAPPED_REGIONS.fetch_add(1, Ordering::Relaxed) < MAX_MAPPED;
        match if mine && all { MapRegion::map(file, index, size) } else { None } {
            // If another thread has mapped the region first, this one is unmapped again.
            Some(region) => drop(slot.set(Arc::new(region))),
            None => {
                MAPPED_REGIONS.fetch_sub(1, Ordering::Relaxed);
                self.full.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Returns the indices of the windows that contain the `len` bytes from offset `within` of a region, up to the end of
/// the region.
fn windows(within: usize, len: usize) -> std::ops::Range<usize> {
    within / WINDOW_BYTES..(within + len).div_ceil(WINDOW_BYTES).min(REGION_BYTES / WINDOW_BYTES)
}

/// Returns the number of bytes that a file of `size` bytes has in region `index`.
fn bytes_in_region(index: usize, size: u64) -> usize {
    usize::try_from(size.saturating_sub((index * REGION_BYTES) as u64)).unwrap_or(REGION_BYTES).min(REGION_BYTES)
}

/// Splits a file offset into region index and offset within the region.
#[inline]
pub(in crate::storage) fn locate(offset: u64) -> (usize, usize) {
    let index = usize::try_from(offset / REGION_BYTES as u64).unwrap_or(FILE_REGIONS);
    (index, usize::try_from(offset % REGION_BYTES as u64).expect("below the bytes of a region"))
}

impl MapRegion {
    fn map(file: impl AsFd, index: usize, size: u64) -> Option<MapRegion> {
        // The bytes are read only by `copy_nofault`, which handles pages beyond the end of the file.
        let mapping = map_read_only(file, (index * REGION_BYTES) as u64, REGION_BYTES)?;
        let (resident, misses) = ([const { AtomicU64::new(0) }; _], [const { AtomicU8::new(0) }; _]);
        Some(MapRegion { mapping, valid_bytes: AtomicUsize::new(bytes_in_region(index, size)), resident, misses })
    }

    /// Returns the address of `len` bytes at offset `within` of the region, if all of their pages were resident at the
    /// last query.
    #[inline]
    pub(in crate::storage) fn resident_start(&self, within: usize, len: usize) -> Option<NonNull<u8>> {
        let end = within + len;
        let whole = end <= self.valid_bytes.load(Ordering::Relaxed)
            && self.first_missing(within / PAGE, end.div_ceil(PAGE)).is_none();
        if whole { NonNull::new(self.mapping.as_mut_ptr().wrapping_add(within)) } else { None }
    }

    /// Returns whether `from` is the address of the byte at offset `within` of the region.
    #[inline]
    pub(in crate::storage) fn maps_at(&self, within: usize, from: NonNull<u8>) -> bool {
        self.mapping.as_ptr().wrapping_add(within) == from.as_ptr()
    }

    /// Returns the first page in `from..end` without a residency bit.
    #[inline]
    fn first_missing(&self, from: usize, end: usize) -> Option<usize> {
        let mut page = from;
        while page < end {
            // The shift fills with zeros, so pages of the next word do not count as missing.
            let missing = !self.resident[page / 64].load(Ordering::Relaxed) >> (page % 64);
            let first = page + missing.trailing_zeros() as usize;
            let next = (page / 64 + 1) * 64;
            if missing != 0 {
                return (first < end).then_some(first);
            }
            page = next;
        }
        None
    }

    fn query_window(&self, window: usize) {
        let start = self.mapping.as_ptr().wrapping_add(window * WINDOW_BYTES);
        self.resident[window].store(mincore_bits(start, 64).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Drop for MapRegion {
    /// A reader that copies from the region holds a reference to it (the map cache's or the file's), so no copy is
    /// running when the region is unmapped.
    fn drop(&mut self) {
        MAPPED_REGIONS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Maps a part of a file. Pages beyond the end of the file are mapped, too.
fn map_read_only(file: impl AsFd, offset: u64, len: usize) -> Option<MmapRaw> {
    MmapOptions::new().offset(offset).len(len).map_raw_read_only(file.as_fd().as_raw_fd()).ok()
}

/// Queries the kernel for the residency of at most 64 mapped pages from `start`. Bit 0 is the first page.
fn mincore_bits(start: *const u8, pages: usize) -> Option<u64> {
    let mut bytes = [0u8; 64];
    let bytes = &mut bytes[..pages];
    // SAFETY: mincore writes one byte per page, and `bytes` has `pages` bytes. It does not access the pages themselves.
    let done = unsafe { libc::mincore(start.cast_mut().cast(), pages * PAGE, bytes.as_mut_ptr()) };
    (done == 0).then(|| bytes.iter().rev().fold(0, |bits, page| bits << 1 | u64::from(page & 1)))
}

/// Returns whether a mapping of the file always shows what system calls read and write. That holds if both use the page
/// cache. On network and user-space file systems, calls may bypass it, and a mapping may show old data.
fn is_coherent(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| COHERENT_FILE_SYSTEMS.contains(&stat.f_type))
}

/// Returns whether the kernel reports the residency of the file. For a file that this process neither owns nor may
/// write, it reports every page as resident (mincore(2), since Linux 5.2). So this function queries a page that cannot
/// be resident, so far beyond the end of the file that the file does not grow to it meanwhile.
fn reports_residency(file: impl AsFd, len: u64) -> bool {
    let beyond = len.next_multiple_of(PAGE as u64) + (4 << 30);
    map_read_only(file, beyond, PAGE).is_some_and(|page| mincore_bits(page.as_ptr(), 1) == Some(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_reads_map_a_region_when_they_come_back() {
        let (mapped, is_ask) = (FileMap::default(), |place| matches!(place, Residency::Query(..)));
        let long = |n: u64| is_ask(mapped.residency(n << 20, 1 << 20));
        assert!((0..256).all(|n| !long(n)) && long(0) && long(100), "once through all of it, and again");
        assert!((256..260).all(|n| !long(n)) && (256..260).all(|n| !long(n)) && long(256), "a part of another region");
        assert!(is_ask(mapped.residency(300 << 20, SHORT_READ)));
    }

    #[test]
    fn pages_without_a_bit_are_found() {
        let region = MapRegion {
            mapping: memmap2::MmapMut::map_anon(PAGE).unwrap().into(),
            valid_bytes: AtomicUsize::new(REGION_BYTES),
            resident: [const { AtomicU64::new(u64::MAX) }; _],
            misses: [const { AtomicU8::new(0) }; _],
        };
        let region = std::mem::ManuallyDrop::new(region); // it does not count as mapped
        assert_eq!(region.first_missing(0, REGION_BYTES / PAGE), None);
        for page in [0, 5, 63, 64, 130, REGION_BYTES / PAGE - 1] {
            region.resident[page / 64].store(!(1 << (page % 64)), Ordering::Relaxed);
            for from in [page.saturating_sub(200), page.saturating_sub(1), page] {
                assert_eq!(region.first_missing(from, page + 1), Some(page));
                assert_eq!(region.first_missing(from, page), None);
            }
            assert_eq!(region.first_missing(page + 1, (page + 100).min(REGION_BYTES / PAGE)), None);
            region.resident[page / 64].store(u64::MAX, Ordering::Relaxed);
        }
    }
}
