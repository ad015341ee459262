//! Reads of what the host has in memory, made by a copy in place of a system call.
//!
//! A small read from the page cache is mostly the way into the kernel and back, and the kernel's copies stop at every page: 4 KiB
//! take 1.3 us by preadv(2), and 0.2 to 0.3 us by a copy from the mapped file whose pages were fetched before
//! (`disk/cached_reads.rs`); of a MiB the kernel reads 13,800 a second here, of 16 files in turns 5,300, and 16,000 and 13,800 are
//! copied (Linux 6.18 on AMD EPYC with its mitigations; 512 MiB in the page cache). So files are mapped, and what is known to be
//! in memory (`host/file_map.rs`) is copied; all else goes through the ring.
//!
//! A page may have left memory since it was known to be there. Then the copy waits for the disk, and with it the queue. It
//! is noticed: of a batch that takes longer than copies do the rest is left to the ring; and if the kernel says that this
//! thread has waited for a page, the batch is forgotten, and for a hundred times as long nothing is copied. So a queue waits
//! for a hundredth of its time, and not for more than some pages at once.
//! A page that cannot be had (a cut file, a failing disk) ends the copy; the ring then finds out why.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::copy_nofault;
use super::engine::{FILE_SLOTS, host_file};
use super::env::File;
use super::host::{HostFile, MapRegion, Residency, file_map};
use super::map_cache::MapCache;
use super::op::FileSlot;
use super::payload::GuestIovecs;

/// Most bytes that are copied from one place: longer copies would hold up what is behind them.
pub const MAX_COPY: usize = 2 << 20;
/// So many bytes are fetched while as many before them are copied.
const PIECE: usize = 4 << 10;
/// Ranges to ask the kernel about, at most, after a batch.
const QUESTIONS: usize = 4;
/// A batch of copies takes less, and so much for each page of it; what takes longer may have waited.
const LONG: Duration = Duration::from_micros(20);
const LONG_EACH: Duration = Duration::from_nanos(500);
/// For so many times as long as it waited nothing is copied.
const RECOVERY: u32 = 100;
/// After so many pieces, and as many again, it is looked whether they take far too long, which is looked into then.
const LOOK: usize = 8;
const FAR_TOO_LONG: Duration = Duration::from_millis(1);
/// After so many batches it is noted how often this thread has waited, whatever for.
const NOTE: u32 = 1024;

/// Bytes of a file that can be copied, while the file has its slot.
#[derive(Clone, Copy, Debug)]
pub struct CachedRange {
    from: NonNull<u8>,
    slot: FileSlot,
    offset: u64,
    len: usize,
}

impl CachedRange {
    /// What an engine that copies in its own way has found: `len` > 0 bytes at `offset` of the file.
    pub fn new(slot: FileSlot, offset: u64, len: usize) -> CachedRange {
        CachedRange { from: NonNull::dangling(), slot, offset, len }
    }

    /// The file's.
    pub fn slot(&self) -> FileSlot {
        self.slot
    }

    /// In the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Has the processor find the pages, without waiting for them.
    #[inline]
    pub fn prefetch_pages(&self) {
        copy_nofault::prefetch_pages(self.from.as_ptr(), self.len);
    }

    /// Has the processor fetch what is copied first, without waiting for it.
    #[inline]
    pub fn prefetch(&self) {
        copy_nofault::prefetch_range(self.from.as_ptr(), self.len.min(PIECE));
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: the pointer is to a mapping of a file, which any thread may read; it is used only by the engine that found it.
unsafe impl Send for CachedRange {}

/// The files of a ring that may be copied from.
pub(super) struct PageCacheReader {
    files: Vec<Option<HostFile>>,
    recent: MapCache,
    /// File, offset and bytes.
    questions: Vec<(FileSlot, u64, usize)>,
    /// When the batch began (or was last looked into), what was copied in it, in how many pieces, and how many bytes.
    began: Option<Instant>,
    batch: Vec<CachedRange>,
    pieces: usize,
    bytes: usize,
    /// Until when nothing is copied, as of the last batch.
    held: Option<Instant>,
    /// Pages this thread had waited for when that was last noted.
    waits: i64,
    batches: u32,
    copies: u64,
}

impl PageCacheReader {
    pub(super) fn new() -> PageCacheReader {
        PageCacheReader {
            files: (0..FILE_SLOTS).map(|_| None).collect(),
            recent: MapCache::new(),
            questions: Vec::with_capacity(QUESTIONS),
            began: None,
            batch: Vec::new(),
            pieces: 0,
            bytes: 0,
            held: None,
            waits: i64::MAX,
            batches: 0,
            copies: 0,
        }
    }

    /// Notes a file that the ring got; direct ones are to leave the host's memory alone.
    pub(super) fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let file = host_file(file)?;
        self.recent.invalidate(slot);
        *entry = (!file.is_direct() && copy_nofault::is_available()).then(|| file.clone());
        Ok(())
    }

    pub(super) fn unregister(&mut self, slot: FileSlot) {
        if let Some(entry) = self.files.get_mut(usize::from(slot.0)) {
            *entry = None;
        }
        self.recent.invalidate(slot);
        self.questions.retain(|(of, ..)| *of != slot);
    }

    /// See [`Engine::find`](super::Engine::find).
    #[inline]
    pub(super) fn find(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        if len > MAX_COPY {
            return None;
        }
        let (index, within) = file_map::locate(offset);
        let here = self.recent.get(slot, index).and_then(|region| region.resident_start(within, len));
        let from = here.or_else(|| self.find_in_file(slot, offset, len))?;
        self.held.is_none().then_some(CachedRange { from, slot, offset, len })
    }

    /// Finds what is in none of the recent regions, and remembers its region; or notes the question that is worth it.
    fn find_in_file(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let mapped = self.files.get(usize::from(slot.0))?.as_ref()?.file_map();
        match mapped.residency(offset, len) {
            Residency::Resident(from) => {
                let (index, _) = file_map::locate(offset);
                self.recent.insert(slot, index, mapped.region(index)?);
                Some(from)
            }
            Residency::Query(about, len) => {
                let known = |(of, from, bytes): &(FileSlot, u64, usize)| {
                    *of == slot && (*from..*from + *bytes as u64).contains(&about)
                };
                if self.questions.len() < QUESTIONS && !self.questions.iter().any(known) {
                    self.questions.push((slot, about, len));
                }
                None
            }
            Residency::Unknown => None,
        }
    }

    /// See [`Engine::fill`](super::Engine::fill).
    #[inline]
    pub(super) fn copy(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let (index, within) = file_map::locate(found.offset);
        let is_at = |region: &MapRegion| region.maps_at(within, found.from);
        if !self.recent.get(found.slot, index).is_some_and(is_at) {
            // Not remembered; or another engine's, or another file's.
            let file = self.files.get(usize::from(found.slot.0)).and_then(Option::as_ref);
            if !file.and_then(|file| file.file_map().region(index)).is_some_and(|region| is_at(region)) {
                return false;
            }
        }
        self.began.get_or_insert_with(Instant::now);
        let start = found.from.as_ptr().cast_const();
        // `Found::fetch` was for the first piece.
        let (mut done, mut fetched, mut whole, mut late) = (0, PIECE, true, false);
        into.for_each_run(at, found.len, |_, mut to, mut len| {
            while len > 0 && whole && !late {
                if self.pieces % LOOK == LOOK - 1 {
                    late = takes_too_long(&mut self.began, self.waits);
                }
                let piece = len.min(PIECE);
                let ahead = (done + piece + PIECE).min(found.len);
                if ahead > fetched {
                    copy_nofault::prefetch_range(start.wrapping_add(fetched), ahead - fetched);
                    fetched = ahead;
                }
                // SAFETY: in a region of this file (looked at above; no more than a region's bytes, by `place`), which keeps it
                // mapped, and `recent` or `files` keeps the region. The other side is mapped as long as the owner of `into`, and no
                // reference to it exists.
                whole = unsafe { copy_nofault::copy(start.wrapping_add(done), to, piece) };
                to = to.wrapping_add(piece);
                (done, len) = (done + piece, len - piece);
                self.pieces += 1;
            }
        });
        if done > 0 {
            self.batch.push(*found);
            self.bytes += done;
            self.copies += 1;
        }
        if !whole {
            self.forget(found);
        }
        whole && !late
    }

    /// Ends a batch of copies: looks whether they took long, and why.
    pub(super) fn end_batch(&mut self) {
        if let Some(began) = self.began.take() {
            self.judge_by(began.elapsed());
            self.batch.clear();
            (self.pieces, self.bytes) = (0, 0);
        }
    }

    /// Copies made so far.
    pub(super) fn copies(&self) -> u64 {
        self.copies
    }

    fn forget(&self, found: &CachedRange) {
        if let Some(Some(file)) = self.files.get(usize::from(found.slot.0)) {
            file.file_map().invalidate(found.offset, found.len);
        }
    }

    fn judge_by(&mut self, took: Duration) {
        let pages = u32::try_from(self.bytes.div_ceil(PIECE)).unwrap_or(u32::MAX);
        self.batches = self.batches.wrapping_add(1);
        if took <= LONG + LONG_EACH * pages {
            if self.batches.is_multiple_of(NOTE) {
                self.waits = waits();
            }
            return;
        }
        let before = std::mem::replace(&mut self.waits, waits());
        if self.waits <= before {
            return; // or nothing to compare with yet
        }
        self.batch.iter().for_each(|found| self.forget(found));
        self.held = Some(Instant::now() + took * RECOVERY);
    }

    /// See [`Engine::learn`](super::Engine::learn).
    pub(super) fn run_queries(&mut self) {
        self.held = self.held.filter(|until| Instant::now() < *until);
        for (slot, offset, len) in self.questions.drain(..) {
            if let Some(Some(file)) = self.files.get(usize::from(slot.0)) {
                file.file_map().query(file, offset, len, || file.stat().ok().map(|stat| stat.len));
            }
        }
    }
}

/// Whether copies that began then wait for pages: they take far too long, and this thread has waited since it was last noted how
/// often. Where it was for something else (a processor that was taken from us, memory of the guest that is touched for the first
/// time), they go on, and it is looked anew from now on.
fn takes_too_long(began: &mut Option<Instant>, noted: i64) -> bool {
    if began.is_none_or(|began| began.elapsed() <= FAR_TOO_LONG) {
        return false;
    }
    let waited = waits() > noted;
    if !waited {
        *began = Some(Instant::now());
    }
    waited
}

/// Pages that this thread has waited for.
fn waits() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills in what it is given; zeros are a value, too.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_majflt
    }
}

#[cfg(test)]
#[path = "warm_tests.rs"]
mod tests;
