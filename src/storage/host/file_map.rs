//! The parts of a file that are mapped into our memory, to be copied from: where the host is known to have their pages.
//!
//! ```text
//!   file     regions of 256 MiB, mapped when something in them is asked for; by long reads when they come back
//!   region   a bit a page: the host had it in memory when it was asked
//!            a count a window of 64 pages: how often what has no bit was wanted
//! ```
//!
//! The kernel is asked (mincore) for whole windows at once, and only where something in the first of them is wanted again and
//! again: the question costs as much as two reads. What it says may be out of date a moment later; then the copy waits for the
//! disk, as any program that reads mapped files does. Who copies looks at how long it took, and has such windows forgotten.
//!
//! A mapping counts as memory of ours where such things are counted (VmRSS, as RssFile), but it is the host's page cache, which
//! it takes back when it likes. What it does not take back are page tables: 4 KiB for each 2 MiB of which something was
//! copied; hence the bounds.
//!
//! Who cuts a file that we have open makes the rest of its last page zeros, here as in any mapping.
#![allow(unsafe_code)]

use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const PAGE: usize = 4096;
/// Bytes of a window: a bit a page in a word.
const WINDOW: usize = 64 * PAGE;
/// Bytes of a region.
const REGION: usize = 256 << 20;
/// Regions of a file: no block of an image begins behind 2 TiB.
const REGIONS: usize = 1 << 13;
/// Mapped regions of a file: 32 GiB; 64 MiB of page tables at the worst, 2 MiB of bits and counts.
const MOST_OF_A_FILE: usize = 128;
/// Mapped regions of all files together, so that all disks of a daemon do not take more than 512 MiB so.
const MOST_REGIONS: usize = 1024;
/// Bytes of what is wanted at most for a region to be mapped at once.
const SHORT: usize = 16 << 10;
/// Bytes of an area: a bit in 32.
const AREA: usize = REGION / 32;
/// What a window is asked for before the kernel is.
const ASKED: u8 = 2;

/// File systems whose reads, writes and mappings are all of the page cache (linux/magic.h): ext2 to ext4, XFS, btrfs, f2fs,
/// bcachefs. Not tmpfs, where to look at a hole through a mapping gives it memory, so that what a guest has discarded would
/// come back.
const COHERENT: [i64; 5] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0xCA45_1A4E];

static MADE: AtomicUsize = AtomicUsize::new(0);

/// The mapped parts of one file.
#[derive(Debug, Default)]
pub(in crate::storage) struct FileMap {
    regions: OnceLock<Box<[OnceLock<Arc<MapRegion>>]>>,
    /// What was wanted of regions that are not mapped in long reads: a bit an area, and the sum of it all behind them, in units of
    /// [`SHORT`].
    wanted: OnceLock<Box<[AtomicU64]>>,
    /// How many are mapped.
    made: AtomicUsize,
    /// The file cannot be mapped, or what is in memory is not told.
    refused: AtomicBool,
    /// There are to be no more regions.
    full: AtomicBool,
}

/// A region that is mapped, for as long as anybody has it.
#[derive(Debug)]
pub(in crate::storage) struct MapRegion {
    start: NonNull<u8>,
    /// Bytes that the file had in it when the kernel was last asked about it.
    bytes: AtomicUsize,
    /// A bit a page, a word a window.
    there: [AtomicU64; REGION / WINDOW],
    /// A count a window.
    asked: [AtomicU8; REGION / WINDOW],
}

/// What is known of a range of a file.
pub(in crate::storage) enum Residency {
    /// All of it was in the host's memory: it can be copied from here.
    Resident(NonNull<u8>),
    /// It is worth to ask the kernel about so many bytes, at most those wanted, from this offset on: [`FileMap::ask`].
    Query(u64, usize),
    /// Nothing.
    Unknown,
}

impl FileMap {
    /// What is known of `len` bytes from `offset`; counts what is not. No system call.
    #[inline]
    pub(in crate::storage) fn residency(&self, offset: u64, len: usize) -> Residency {
        let (index, within) = locate(offset);
        let end = within + len;
        if end > REGION || len == 0 || self.refused.load(Ordering::Relaxed) {
            return Residency::Unknown;
        }
        let Some(region) = self.region(index) else {
            let more = index < REGIONS && !self.full.load(Ordering::Relaxed);
            return if more && self.is_worth(index, within, len) {
                Residency::Query(offset, len)
            } else {
                Residency::Unknown
            };
        };
        if let Some(from) = region.resident_start(within, len) {
            return Residency::Resident(from);
        }
        // Or the file has grown since.
        let page = region.lacks(within / PAGE, end.div_ceil(PAGE)).unwrap_or((end - 1) / PAGE);
        let asked = &region.asked[page / 64];
        // Threads may count one another's away: a little later, then.
        let count = asked.load(Ordering::Relaxed).saturating_add(1);
        asked.store(if count < ASKED { count } else { 0 }, Ordering::Relaxed);
        let at = page * PAGE;
        if count < ASKED { Residency::Unknown } else { Residency::Query((index * REGION + at) as u64, end - at) }
    }

    /// Asks the kernel what it has in memory of `len` > 0 bytes from `offset` on, and around them. `size`: says how long the
    /// file is.
    pub(in crate::storage) fn query(
        &self,
        file: impl AsFd,
        offset: u64,
        len: usize,
        size: impl FnOnce() -> Option<u64>,
    ) {
        let Some(size) = size() else { return };
        if self.regions.get().is_none() && !(is_coherent(&file) && tells(&file, size)) {
            return self.refused.store(true, Ordering::Relaxed);
        }
        let (index, within) = locate(offset);
        match self.region(index) {
            Some(region) => {
                region.bytes.store(bytes_in(index, size), Ordering::Relaxed);
                windows(within, len).for_each(|window| region.query_window(window));
            }
            None => self.map(file, index, size),
        }
    }

    /// Forgets what was known of `len` bytes from `offset`.
    pub(in crate::storage) fn invalidate(&self, offset: u64, len: usize) {
        let (index, within) = locate(offset);
        let Some(region) = self.region(index) else { return };
        for window in windows(within, len) {
            region.there[window].store(0, Ordering::Relaxed);
        }
    }

    /// Whether to map a region of which `len` bytes at `within` are wanted: at once if that is little, as of what is used again
    /// and again; else when more was wanted than the areas have of which it was, so that who reads a whole disk once leaves the
    /// room to others.
    fn is_worth(&self, index: usize, within: usize, len: usize) -> bool {
        if len <= SHORT {
            return true;
        }
        let wanted = self.wanted.get_or_init(|| (0..REGIONS).map(|_| AtomicU64::default()).collect());
        // Threads may count one another's away: a little later, then.
        let before = wanted[index].load(Ordering::Relaxed);
        let areas = before & u64::from(u32::MAX) | 1 << (within / AREA);
        let sum = (before >> 32) + (len / SHORT) as u64;
        wanted[index].store(sum.min(u32::MAX.into()) << 32 | areas, Ordering::Relaxed);
        sum > u64::from(areas.count_ones()) * (AREA / SHORT) as u64
    }

    /// Region `index`, if it is mapped.
    #[inline]
    pub(in crate::storage) fn region(&self, index: usize) -> Option<&Arc<MapRegion>> {
        self.regions.get()?.get(index)?.get()
    }

    fn map(&self, file: impl AsFd, index: usize, size: u64) {
        let regions = self.regions.get_or_init(|| (0..REGIONS).map(|_| OnceLock::new()).collect());
        let Some(slot) = regions.get(index) else { return };
        let mine = self.made.fetch_add(1, Ordering::Relaxed) < MOST_OF_A_FILE;
        let all = MADE.fetch_add(1, Ordering::Relaxed) < MOST_REGIONS;
        match if mine && all { MapRegion::map(file, index, size) } else { None } {
            // Another thread may be faster, then its region it is.
            Some(region) => drop(slot.set(Arc::new(region))),
            None => {
                MADE.fetch_sub(1, Ordering::Relaxed);
                self.full.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// The windows of `len` bytes, as far as they lie in a region.
fn windows(within: usize, len: usize) -> std::ops::Range<usize> {
    within / WINDOW..(within + len).div_ceil(WINDOW).min(REGION / WINDOW)
}

/// Bytes that a file of `size` has in a region.
fn bytes_in(index: usize, size: u64) -> usize {
    usize::try_from(size.saturating_sub((index * REGION) as u64)).unwrap_or(REGION).min(REGION)
}

/// The region of an offset, and where in it.
#[inline]
pub(in crate::storage) fn locate(offset: u64) -> (usize, usize) {
    let index = usize::try_from(offset / REGION as u64).unwrap_or(REGIONS);
    (index, usize::try_from(offset % REGION as u64).expect("below the bytes of a region"))
}

// SAFETY: the pointer is to a mapping of its own, which any thread may read.
unsafe impl Send for MapRegion {}
// SAFETY: the same, and all else is atomic.
unsafe impl Sync for MapRegion {}

impl MapRegion {
    fn map(file: impl AsFd, index: usize, size: u64) -> Option<MapRegion> {
        let offset = (index * REGION) as u64;
        // SAFETY: a fresh mapping at a place that the kernel chooses. What lies behind the file's end is not touched but by
        // copies that can do with a signal.
        let start = unsafe { mmap(ptr::null_mut(), REGION, ProtFlags::READ, MapFlags::SHARED, file, offset) };
        let start = NonNull::new(start.ok()?.cast())?;
        let (there, asked) = ([const { AtomicU64::new(0) }; _], [const { AtomicU8::new(0) }; _]);
        Some(MapRegion { start, bytes: AtomicUsize::new(bytes_in(index, size)), there, asked })
    }

    /// Where in memory `len` bytes at `within` are, if the host had all of them there when it was asked.
    #[inline]
    pub(in crate::storage) fn resident_start(&self, within: usize, len: usize) -> Option<NonNull<u8>> {
        let end = within + len;
        let whole =
            end <= self.bytes.load(Ordering::Relaxed) && self.lacks(within / PAGE, end.div_ceil(PAGE)).is_none();
        // SAFETY: below the region's length, which `bytes` does not exceed.
        whole.then(|| unsafe { self.start.add(within) })
    }

    /// Whether what is at `within` is mapped at `from`.
    #[inline]
    pub(in crate::storage) fn maps_at(&self, within: usize, from: NonNull<u8>) -> bool {
        self.start.as_ptr().wrapping_add(within) == from.as_ptr()
    }

    /// The first page, of those from `from` to before `end`, that has no bit.
    #[inline]
    fn lacks(&self, from: usize, end: usize) -> Option<usize> {
        let mut page = from;
        while page < end {
            let gone = !self.there[page / 64].load(Ordering::Relaxed) >> (page % 64);
            let first = page + gone.trailing_zeros() as usize;
            // The shift has zeros come in from above: no bit of this word is missing.
            let next = (page / 64 + 1) * 64;
            if gone != 0 {
                return (first < end).then_some(first);
            }
            page = next;
        }
        None
    }

    fn query_window(&self, window: usize) {
        // SAFETY: a window of the region.
        let start = unsafe { self.start.add(window * WINDOW) };
        self.there[window].store(resident(start, 64).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Drop for MapRegion {
    fn drop(&mut self) {
        MADE.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: mapped in `map` with this length; nobody has self any more, and who copies has it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), REGION) };
    }
}

/// Which of at most 64 pages from `start` on, which are mapped, the host has in memory.
fn resident(start: NonNull<u8>, pages: usize) -> Option<u64> {
    let mut told = [0u8; 64];
    let told = &mut told[..pages];
    // SAFETY: the pages are mapped, and there is a byte for each.
    let done = unsafe { libc::mincore(start.as_ptr().cast(), pages * PAGE, told.as_mut_ptr()) };
    (done == 0).then(|| told.iter().rev().fold(0, |bits, page| bits << 1 | u64::from(page & 1)))
}

/// Whether a mapping of the file shows what is read and written by calls, at any time. So it is where both are the page
/// cache's; on file systems of networks and of user space calls may go past that, and a mapping show what was.
fn is_coherent(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|told| COHERENT.contains(&told.f_type))
}

/// Whether the kernel tells what is in memory of a file: not of one that we neither own nor may write, of which it says
/// that all is (mincore(2), since Linux 5.2). So it is asked for a page that cannot be there, so far behind the file's end
/// that it does not grow up to it meanwhile.
fn tells(file: impl AsFd, len: u64) -> bool {
    let behind = len.next_multiple_of(PAGE as u64) + (4 << 30);
    // SAFETY: a fresh mapping, which nobody touches.
    let mapped = unsafe { mmap(ptr::null_mut(), PAGE, ProtFlags::READ, MapFlags::SHARED, file, behind) };
    let Some(page) = mapped.ok().and_then(|page| NonNull::new(page.cast())) else { return false };
    let told = resident(page, 1);
    // SAFETY: mapped above.
    let _ = unsafe { munmap(page.as_ptr().cast(), PAGE) };
    told == Some(0)
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
        assert!(is_ask(mapped.residency(300 << 20, SHORT)));
    }

    #[test]
    fn pages_without_a_bit_are_found() {
        let region = MapRegion {
            start: NonNull::dangling(),
            bytes: AtomicUsize::new(REGION),
            there: [const { AtomicU64::new(u64::MAX) }; _],
            asked: [const { AtomicU8::new(0) }; _],
        };
        let region = std::mem::ManuallyDrop::new(region); // nothing is mapped
        assert_eq!(region.lacks(0, REGION / PAGE), None);
        for page in [0, 5, 63, 64, 130, REGION / PAGE - 1] {
            region.there[page / 64].store(!(1 << (page % 64)), Ordering::Relaxed);
            for from in [page.saturating_sub(200), page.saturating_sub(1), page] {
                assert_eq!(region.lacks(from, page + 1), Some(page));
                assert_eq!(region.lacks(from, page), None);
            }
            assert_eq!(region.lacks(page + 1, (page + 100).min(REGION / PAGE)), None);
            region.there[page / 64].store(u64::MAX, Ordering::Relaxed);
        }
    }
}
