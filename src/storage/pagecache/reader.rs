//! Page cache reader of a lane: finds resident ranges, copies them, and backs off after waiting for the disk.
//!
//! Most of the time of a small read from the page cache is that of the system call itself, and the kernel copies page
//! by page: 4 KiB take 1.3 us by preadv(2), and 0.2 to 0.3 us by a copy from a mapping whose pages were prefetched
//! (`disk/cached_reads.rs`). Reads of 1 MiB reach 13,800 a second in the kernel (5,300 from 16 files in turn), and
//! 16,000 (13,800) by copies. Measured with 512 MiB in the page cache, Linux 6.18, AMD EPYC with mitigations. So files
//! are mapped, and resident ranges (`file_map.rs`) are copied.
//!
//! A page may have left memory since the kernel reported it as resident. The copy then waits for the disk, and delays
//! the whole queue. The reader limits this in three ways:
//!
//! - During a batch, a check follows every eight chunks. If the batch has taken more than a millisecond and the thread
//!   had major page faults, the copy in progress ends, and its read becomes an operation of the engine.
//! - If a batch was slow and the thread had major page faults, the residency bits of the whole batch are cleared, and
//!   nothing is copied for a hundred times the duration of the batch. So a queue waits for at most a hundredth of its
//!   time.
//! - An unavailable page (truncated file, failing disk) ends the copy. The read is repeated as an operation, which
//!   reports the error.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy_nofault;
use super::file_map::{self, MapRegion, Residency};
use super::map_cache::MapCache;
use super::range::{CHUNK, CachedRange, MAX_COPY};
use crate::storage::backend::{File, FileBackend};
use crate::storage::engine::PageCache;
use crate::storage::host::file::HostFile;
use crate::storage::op::{FILE_SLOTS, FileSlot};
use crate::storage::payload::GuestIovecs;
use crate::storage::prefetch;

/// Maximum number of ranges that are queried after a batch.
const MAX_QUERIES: usize = 4;
/// Duration of a batch, plus [`SLOW_PAGE`] for each page of it, beyond which it may have waited for the disk.
const SLOW_BATCH: Duration = Duration::from_micros(20);
const SLOW_PAGE: Duration = Duration::from_nanos(500);
/// Nothing is copied for this many times the duration of a batch that waited.
const BACKOFF_FACTOR: u32 = 100;
/// Chunks between two checks whether a running batch has stalled.
const CHUNKS_PER_CHECK: usize = 8;
/// Duration beyond which a running batch is checked for major faults.
const STALL: Duration = Duration::from_millis(1);
/// Batches between two samples of this thread's major fault count.
const BATCHES_PER_SAMPLE: u32 = 1024;

/// Copies from mapped files.
pub(in crate::storage) struct PageCacheReader {
    files: Vec<Option<Arc<HostFile>>>,
    map_cache: MapCache,
    /// Ranges to query: file, offset, length.
    queries: Vec<(FileSlot, u64, usize)>,
    /// Start of the current batch, or the time of its last check for a stall.
    batch_start: Option<Instant>,
    /// Ranges, chunks and bytes of the current batch.
    batch: Vec<CachedRange>,
    chunks: usize,
    bytes: usize,
    /// Nothing is copied before this time.
    backoff_until: Option<Instant>,
    /// Last sample of this thread's major fault count.
    major_faults: i64,
    batches: u32,
}

impl PageCacheReader {
    /// Creates a reader without files. Returns `None` if there is no `copy_nofault` for this processor, or if the
    /// SIGBUS handler cannot be installed.
    pub(in crate::storage) fn new() -> Option<PageCacheReader> {
        copy_nofault::is_available().then(|| PageCacheReader {
            files: (0..FILE_SLOTS).map(|_| None).collect(),
            map_cache: MapCache::new(),
            queries: Vec::with_capacity(MAX_QUERIES),
            batch_start: None,
            batch: Vec::new(),
            chunks: 0,
            bytes: 0,
            backoff_until: None,
            major_faults: i64::MAX,
            batches: 0,
        })
    }

    /// Finds a range that is in no resident part of a cached region, and caches the region of the range. If the range
    /// is not known to be resident, records a query if that is worthwhile.
    fn find_in_file(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let map = self.files.get(slot.as_usize())?.as_ref()?.file_map();
        match map.residency(offset, len) {
            Residency::Resident(from) => {
                let (index, _) = file_map::locate(offset);
                self.map_cache.insert(slot, index, map.region(index)?);
                Some(from)
            }
            Residency::Query(at, len) => {
                let covers = |(of, from, bytes): &(FileSlot, u64, usize)| {
                    *of == slot && (*from..*from + *bytes as u64).contains(&at)
                };
                if self.queries.len() < MAX_QUERIES && !self.queries.iter().any(covers) {
                    self.queries.push((slot, at, len));
                }
                None
            }
            Residency::Unknown => None,
        }
    }

    fn invalidate(&self, found: &CachedRange) {
        if let Some(Some(file)) = self.files.get(found.slot.as_usize()) {
            file.file_map().invalidate(found.offset, found.len);
        }
    }

    fn evaluate_batch(&mut self, took: Duration) {
        let pages = u32::try_from(self.bytes.div_ceil(CHUNK)).unwrap_or(u32::MAX);
        self.batches = self.batches.wrapping_add(1);
        if took <= SLOW_BATCH + SLOW_PAGE * pages {
            if self.batches.is_multiple_of(BATCHES_PER_SAMPLE) {
                self.major_faults = major_faults();
            }
            return;
        }
        let before = std::mem::replace(&mut self.major_faults, major_faults());
        if self.major_faults <= before {
            return; // no faults since the last sample, or this is the first sample
        }
        self.batch.iter().for_each(|found| self.invalidate(found));
        self.backoff_until = Some(Instant::now() + took * BACKOFF_FACTOR);
    }
}

impl PageCache for PageCacheReader {
    /// Registers a file. A file with O_DIRECT enabled is never copied from.
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)?;
        let file = HostFile::of(file)?;
        self.map_cache.invalidate(slot);
        *entry = (!file.is_direct()).then_some(file);
        Ok(())
    }

    fn unregister(&mut self, slot: FileSlot) {
        if let Some(entry) = self.files.get_mut(slot.as_usize()) {
            *entry = None;
        }
        self.map_cache.invalidate(slot);
        self.queries.retain(|(of, ..)| *of != slot);
    }

    #[inline]
    fn find(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        if len > MAX_COPY {
            return None;
        }
        let (index, within) = file_map::locate(offset);
        let cached = self.map_cache.get(slot, index).and_then(|region| region.resident_start(within, len));
        let from = cached.or_else(|| self.find_in_file(slot, offset, len))?;
        self.backoff_until.is_none().then_some(CachedRange { from, slot, offset, len })
    }

    #[inline]
    fn copy(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let (index, within) = file_map::locate(found.offset);
        let is_at = |region: &MapRegion| region.maps_at(within, found.from);
        if !self.map_cache.get(found.slot, index).is_some_and(is_at) {
            // The region is not cached, or the range was found by another engine or in another file.
            let file = self.files.get(found.slot.as_usize()).and_then(Option::as_ref);
            if !file.and_then(|file| file.file_map().region(index)).is_some_and(|region| is_at(region)) {
                return false;
            }
        }
        self.batch_start.get_or_insert_with(Instant::now);
        let start = found.from.as_ptr().cast_const();
        // `CachedRange::prefetch` has prefetched the first chunk.
        let (mut done, mut fetched, mut whole, mut late) = (0, CHUNK, true, false);
        into.for_each_run(at, found.len, |_, mut to, mut len| {
            while len > 0 && whole && !late {
                if self.chunks % CHUNKS_PER_CHECK == CHUNKS_PER_CHECK - 1 {
                    late = is_stalled(&mut self.batch_start, self.major_faults);
                }
                let chunk = len.min(CHUNK);
                let ahead = (done + chunk + CHUNK).min(found.len);
                if ahead > fetched {
                    prefetch::prefetch_range(start.wrapping_add(fetched), ahead - fetched);
                    fetched = ahead;
                }
                // SAFETY:
                // - `copy_nofault` is available: a reader exists only if it is.
                // - Source: `found.from` is the address of `within` in a mapped region of a file in this reader's
                //   tables (checked above). `find` has returned `found` only for a range inside the region; a range of
                //   `CachedRange::new` has no address of a mapping. The map cache or the file holds the region: `self`
                //   is borrowed exclusively, and a file never unmaps a region before it is closed.
                // - Destination: `for_each_run` passes runs of `into`, which its owner keeps mapped and writable.
                // - Guest memory and file mappings do not overlap, and no reference to either is ever formed.
                whole = unsafe { copy_nofault::copy(start.wrapping_add(done), to, chunk) };
                to = to.wrapping_add(chunk);
                (done, len) = (done + chunk, len - chunk);
                self.chunks += 1;
            }
        });
        if done > 0 {
            self.batch.push(*found);
            self.bytes += done;
        }
        if !whole {
            self.invalidate(found);
        }
        whole && !late
    }

    /// Ends a batch of copies. Starts a backoff if the batch waited for the disk.
    fn end_batch(&mut self) {
        if let Some(start) = self.batch_start.take() {
            self.evaluate_batch(start.elapsed());
            self.batch.clear();
            (self.chunks, self.bytes) = (0, 0);
        }
    }

    /// Runs the recorded queries, and ends an expired backoff.
    fn query_residency(&mut self) {
        self.backoff_until = self.backoff_until.filter(|until| Instant::now() < *until);
        for (slot, offset, len) in self.queries.drain(..) {
            if let Some(Some(file)) = self.files.get(slot.as_usize()) {
                file.file_map().query(file, offset, len, || file.stat().ok().map(|stat| stat.len));
            }
        }
    }
}

/// Returns whether a batch that started at `start` is waiting for the disk: it has run for longer than [`STALL`], and
/// this thread had major faults since the last sample. Without faults the delay has another cause (preemption, first
/// access to guest memory), and the measurement starts again.
fn is_stalled(start: &mut Option<Instant>, sampled: i64) -> bool {
    if start.is_none_or(|start| start.elapsed() <= STALL) {
        return false;
    }
    let faulted = major_faults() > sampled;
    if !faulted {
        *start = Some(Instant::now());
    }
    faulted
}

/// Returns the number of major page faults of this thread.
fn major_faults() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage writes one rusage to the pointer. If it fails, the value is all zeros, which is valid for a
    // struct of integers.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_majflt
    }
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
