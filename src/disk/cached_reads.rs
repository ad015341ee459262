//! Reads from the page cache: copies that need neither a task nor a system call.
//!
//! A lane collects the reads of a batch. Before it submits, it plans them; a read whose bytes are all known to be resident becomes
//! a list of copies, any other read becomes a task (`stages.rs`). After the submit all copies are made. A read whose copy fails
//! becomes a task, too.
//!
//! A page of a large file is in none of the processor's caches, and neither is its page table entry. So all pages of a batch are
//! prefetched together before the first copy, and the next part while one is copied. The invariants are in `docs/page-cache.md`,
//! the figures in `docs/performance.md`, section 3.

use std::collections::VecDeque;

use super::request::{Answer, Outcome};
use crate::chain::{PlanBuffer, Source, Version};
use crate::storage::{CachedRange, Engine, GuestIovecs, MAX_COPY};
use crate::units::SectorRange;

/// The reads of a batch that may need copies only.
#[derive(Default)]
pub(super) struct CachedReads {
    /// Reads that are not planned yet.
    candidates: VecDeque<CachedRead>,
    /// Reads to copy, with the number of their parts.
    planned: Vec<(CachedRead, usize)>,
    /// Parts of all planned reads, in the order of the reads.
    parts: Vec<CachedPart>,
    /// Reads whose copy failed.
    failed: VecDeque<CachedRead>,
}

/// A read that may need copies only.
pub(super) struct CachedRead {
    pub(super) tag: u64,
    pub(super) range: SectorRange,
    pub(super) into: GuestIovecs,
}

/// A part of a read: `len` bytes to copy, or zeros if `cached` is `None`.
struct CachedPart {
    cached: Option<CachedRange>,
    len: usize,
}

impl CachedReads {
    /// Number of reads that may still need a task.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.candidates.len() + self.planned.len()
    }

    /// Queues a read for the next batch. Returns its memory if the read is too large to be copied.
    #[inline]
    pub(super) fn queue(&mut self, tag: u64, range: SectorRange, into: GuestIovecs) -> Result<(), GuestIovecs> {
        if range.bytes() > MAX_COPY as u64 {
            return Err(into);
        }
        self.candidates.push_back(CachedRead { tag, range, into });
        Ok(())
    }

    /// Prefetches into the processor's cache the memory that the planning of the queued reads accesses.
    pub(super) fn prefetch_plans(&self, version: &Version, plan: &mut PlanBuffer) {
        for read in &self.candidates {
            version.prefetch(read.range, plan);
        }
    }

    /// Takes the next queued read.
    pub(super) fn next_candidate(&mut self) -> Option<CachedRead> {
        self.candidates.pop_front()
    }

    /// Plans a read as copies. Returns the read if some of its bytes are not known to be resident; `plan` then holds its plan.
    #[inline]
    pub(super) fn plan(
        &mut self,
        read: CachedRead,
        version: &Version,
        engine: &mut dyn Engine,
        plan: &mut PlanBuffer,
    ) -> Result<(), CachedRead> {
        version.plan_read(read.range, plan);
        let (before, mut whole) = (self.parts.len(), plan.missing.is_empty());
        if whole {
            for extent in &plan.extents {
                let len = usize::try_from(extent.range.bytes()).expect("a range on a disk of 2040 GiB");
                let cached = match extent.source {
                    Source::Zero => None,
                    Source::File { slot, offset } => {
                        // The engine counts how often each part is requested, so parts after one that is not resident
                        // are looked up, too.
                        let cached = engine.find_cached(slot, offset, len);
                        whole &= cached.is_some();
                        cached
                    }
                };
                self.parts.push(CachedPart { cached, len });
            }
        }
        if !whole {
            self.parts.truncate(before);
            return Err(read);
        }
        let parts = self.parts.len() - before;
        self.planned.push((read, parts));
        Ok(())
    }

    /// Makes all planned copies and appends the answers. Returns false if nothing was planned. Reads whose copy failed are
    /// returned by [`CachedReads::next_failed`].
    pub(super) fn copy_all(&mut self, engine: &mut dyn Engine, answers: &mut Vec<Answer>) -> bool {
        let CachedReads { planned, parts, failed, .. } = self;
        if planned.is_empty() {
            return false;
        }
        let cached = || parts.iter().filter_map(|part| part.cached.as_ref());
        cached().for_each(CachedRange::prefetch_pages);
        planned.iter().for_each(|(read, _)| read.into.prefetch_pages());
        let mut next = cached();
        next.next().into_iter().for_each(CachedRange::prefetch);
        let mut rest = parts.iter();
        for (read, parts) in planned.drain(..) {
            let (mut whole, mut at) = (true, 0);
            for CachedPart { cached, len } in rest.by_ref().take(parts) {
                match cached {
                    Some(cached) => {
                        next.next().into_iter().for_each(CachedRange::prefetch);
                        whole = whole && engine.copy_cached(cached, &read.into, at);
                    }
                    None => read.into.zero(at, *len),
                }
                at += len;
            }
            if whole {
                answers.push(Answer { tag: read.tag, outcome: Outcome::Done, memory: Some(read.into) });
            } else {
                failed.push_back(read);
            }
        }
        parts.clear();
        true
    }

    /// Takes a read whose copy failed: the copy took too long, or a page could not be read. An operation finds out why.
    pub(super) fn next_failed(&mut self) -> Option<CachedRead> {
        self.failed.pop_front()
    }
}
