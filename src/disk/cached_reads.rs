//! Reads from the page cache: copies that need neither a task nor a system call.
//!
//! A lane collects the reads of a batch. Before the submit it plans them: a read whose bytes are all zeros or known to
//! be resident becomes a list of copies, any other read becomes a task (`stages.rs`). After the submit the lane makes
//! all copies. A read whose copy fails becomes a task, too.
//!
//! Neither the data of a page in a large file nor its page table entry is likely to be in the processor's caches. So
//! the pages of all reads in a batch are prefetched before the first copy, and each part is prefetched while the part
//! before it is copied. `docs/page-cache.md` states the invariants, and `docs/performance.md`, section 3, has the
//! figures.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::request::{Answer, Outcome};
use super::statistics::LaneCounters;
use crate::chain::{FrozenCacheHandle, PlanBuffer, Source, Version};
use crate::storage::{CachedRange, File, FileSlot, GuestIovecs, MAX_COPY, PageCache};
use crate::units::SectorRange;

/// The reads of a batch that copies alone may answer.
pub(super) struct CachedReads {
    /// The page cache; `None` if every read is an operation.
    page_cache: Option<Box<dyn PageCache>>,
    counters: Arc<LaneCounters>,
    /// Reads that are not planned yet.
    candidates: VecDeque<CachedRead>,
    /// Reads to copy, each with its number of parts.
    planned: Vec<(CachedRead, usize)>,
    /// Parts of all planned reads, in the order of the reads.
    parts: Vec<CachedPart>,
    /// Reads whose copy failed.
    failed: VecDeque<CachedRead>,
    /// Number of reads that were answered without a task.
    copied: u64,
}

/// A read that copies alone may answer.
pub(super) struct CachedRead {
    pub(super) tag: u64,
    pub(super) range: SectorRange,
    pub(super) into: GuestIovecs,
}

/// A part of a read: `len` bytes to copy from `cached`, or `len` zeros if `cached` is `None`.
struct CachedPart {
    cached: Option<CachedRange>,
    len: usize,
}

impl CachedPart {
    /// Counts the part after it was copied.
    #[inline]
    fn count(&self, counters: &LaneCounters) {
        match &self.cached {
            Some(cached) => counters.count_copy(cached.slot(), self.len),
            None => counters.zero_filled_bytes.add(self.len as u64),
        }
    }
}

impl CachedReads {
    /// Creates an empty list of reads, whose copies are counted in `counters`. Without a page cache every read becomes
    /// a task.
    pub(super) fn new(page_cache: Option<Box<dyn PageCache>>, counters: Arc<LaneCounters>) -> CachedReads {
        let (candidates, planned, parts, failed) = Default::default();
        CachedReads { page_cache, counters, candidates, planned, parts, failed, copied: 0 }
    }

    /// Number of reads that may still need a task.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.candidates.len() + self.planned.len()
    }

    /// Adds a file from which reads may be copied.
    ///
    /// # Errors
    /// Those of [`PageCache::register`].
    pub(super) fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        self.page_cache.as_mut().map_or(Ok(()), |page_cache| page_cache.register(slot, file))
    }

    /// Removes the file in a slot.
    pub(super) fn unregister(&mut self, slot: FileSlot) {
        if let Some(page_cache) = &mut self.page_cache {
            page_cache.unregister(slot);
        }
    }

    /// Adds a read to the batch.
    ///
    /// # Errors
    /// Returns `into` if the read cannot be a copy: there is no page cache, or the read is larger than `MAX_COPY`.
    #[inline]
    pub(super) fn queue(&mut self, tag: u64, range: SectorRange, into: GuestIovecs) -> Result<(), GuestIovecs> {
        if self.page_cache.is_none() || range.bytes() > MAX_COPY as u64 {
            return Err(into);
        }
        self.candidates.push_back(CachedRead { tag, range, into });
        Ok(())
    }

    /// Prefetches, into the processor's caches, the memory that planning the queued reads accesses.
    pub(super) fn prefetch_plans(&self, version: &Version, frozen_cache: &mut FrozenCacheHandle) {
        for read in &self.candidates {
            version.prefetch(read.range, frozen_cache);
        }
    }

    /// Takes the next queued read.
    pub(super) fn next_candidate(&mut self) -> Option<CachedRead> {
        self.candidates.pop_front()
    }

    /// Plans a read as copies.
    ///
    /// # Errors
    /// Returns the read if some of its bytes are neither zeros nor known to be resident, or if there is no page cache.
    /// Then `plan` contains the plan of the read.
    #[inline]
    pub(super) fn plan(
        &mut self,
        read: CachedRead,
        version: &Version,
        frozen_cache: &mut FrozenCacheHandle,
        plan: &mut PlanBuffer,
    ) -> Result<(), CachedRead> {
        version.plan_read(read.range, frozen_cache, plan);
        let CachedReads { page_cache: Some(page_cache), planned, parts, .. } = self else { return Err(read) };
        let (before, mut whole) = (parts.len(), plan.missing.is_empty());
        if whole {
            for extent in &plan.extents {
                let len = usize::try_from(extent.range.bytes()).expect("a range on a disk of 2040 GiB");
                let cached = match extent.source {
                    Source::Zero => None,
                    Source::File { slot, offset } => {
                        // `find` also counts how often a part is requested. So the parts after one that is not resident
                        // are looked up, too.
                        let cached = page_cache.find(slot, offset, len);
                        whole &= cached.is_some();
                        cached
                    }
                };
                parts.push(CachedPart { cached, len });
            }
        }
        if !whole {
            parts.truncate(before);
            return Err(read);
        }
        planned.push((read, parts.len() - before));
        Ok(())
    }

    /// Makes all planned copies and appends the answers. [`CachedReads::next_failed`] returns the reads whose copy
    /// failed.
    pub(super) fn copy_all(&mut self, answers: &mut Vec<Answer>) {
        let CachedReads { page_cache: Some(page_cache), counters, planned, parts, failed, copied, .. } = self else {
            return;
        };
        if planned.is_empty() {
            return;
        }
        let cached = || parts.iter().filter_map(|part| part.cached.as_ref());
        cached().for_each(CachedRange::prefetch_pages);
        planned.iter().for_each(|(read, _)| read.into.prefetch_pages());
        let mut next = cached();
        next.next().into_iter().for_each(CachedRange::prefetch);
        let mut rest = parts.as_slice();
        for (read, count) in planned.drain(..) {
            let parts = rest.split_off(..count).expect("the parts of all planned reads");
            let (mut whole, mut at) = (true, 0);
            for CachedPart { cached, len } in parts {
                match cached {
                    Some(cached) => {
                        next.next().into_iter().for_each(CachedRange::prefetch);
                        whole = whole && page_cache.copy(cached, &read.into, at);
                    }
                    None => read.into.zero(at, *len),
                }
                at += len;
            }
            if whole {
                *copied += 1;
                parts.iter().for_each(|part| part.count(counters));
                answers.push(Answer { tag: read.tag, outcome: Outcome::Done, memory: Some(read.into) });
            } else {
                failed.push_back(read);
            }
        }
        page_cache.end_batch();
        parts.clear();
    }

    /// Queries the kernel for the residency of ranges that were not found.
    pub(super) fn query_residency(&mut self) {
        if let Some(page_cache) = &mut self.page_cache {
            page_cache.query_residency();
        }
    }

    /// Number of reads that were answered without a task so far: by copies, or by zeros.
    pub(super) fn copied(&self) -> u64 {
        self.copied
    }

    /// Takes a read whose copy failed: the copy took too long, a page could not be accessed, or the file is not mapped
    /// there any more. The caller must start the read as a task, whose operation reports the error if there is one.
    pub(super) fn next_failed(&mut self) -> Option<CachedRead> {
        self.failed.pop_front()
    }
}
