//! Reads of what the host has in memory: copies, which are planned and made at the end of a turn, all together.
//!
//! A read goes this way where all of its bytes are known to be there: it needs no task, and no system call. Any other, and one
//! that turns out not to be there after all, is a request as all are (`stages.rs`).
//!
//! Between the two the processor is told what will be copied: a page of a large file is in none of its caches, and neither is
//! the way there. It stops at a page until it has found it, even to fetch it; told of all pages of a turn one close behind the
//! other, it looks for several at once. And while one part is copied, the next is fetched whole. Reads of 4 KiB, 16 layers, 512
//! MiB in the page cache, each fetched as it is planned: 1,000,000 a second; found together: 1,250,000; and the next fetched:
//! 1,550,000 (AMD EPYC). Into buffers that lie anywhere in 1 GiB of the guest, found together as well, a quarter more.

use std::collections::VecDeque;

use super::lane::Lane;
use super::request::{Answer, Outcome, Request, Work};
use crate::chain::Source;
use crate::storage::{CachedRange, GuestIovecs, MAX_COPY};
use crate::units::SectorRange;

/// What is asked for, or planned, and not made yet.
#[derive(Default)]
pub(super) struct CachedReads {
    /// Not planned yet.
    candidates: VecDeque<CachedRead>,
    /// Planned, with the number of their parts.
    planned: Vec<(CachedRead, usize)>,
    /// Of all reads, in their order.
    parts: Vec<CachedPart>,
}

/// A read that needs nothing but copies, perhaps.
struct CachedRead {
    tag: u64,
    range: SectorRange,
    into: GuestIovecs,
}

/// A part of a read: a copy, or zeros.
struct CachedPart {
    cached: Option<CachedRange>,
    len: usize,
}

impl CachedReads {
    /// Reads.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.candidates.len() + self.planned.len()
    }
}

impl Lane {
    /// Takes a read that may be a copy, to be planned with the others of a turn; gives the memory of any other back. There is
    /// `room`.
    #[inline]
    pub(super) fn queue_cached_read(
        &mut self,
        tag: u64,
        range: SectorRange,
        into: GuestIovecs,
    ) -> Result<(), GuestIovecs> {
        if range.bytes() > MAX_COPY as u64 {
            return Err(into);
        }
        self.cached_reads.candidates.push_back(CachedRead { tag, range, into });
        Ok(())
    }

    /// Plans what was asked for: copies, where all bytes are known to be in memory, or nowhere; requests as all are, else.
    pub(super) fn plan_cached_reads(&mut self) {
        for read in &self.cached_reads.candidates {
            self.disk.version().prefetch(read.range, &mut self.plan);
        }
        while let Some(read) = self.cached_reads.candidates.pop_front() {
            let range = read.range;
            if let Err(CachedRead { tag, range, into }) = self.plan_cached_read(read) {
                self.planned = true;
                self.start_request(Request { tag, work: Work::Read { range, into } });
            }
            self.track_read(range);
        }
    }

    /// Plans a read as copies, if it can be.
    #[inline]
    fn plan_cached_read(&mut self, read: CachedRead) -> Result<(), CachedRead> {
        self.disk.version().plan_read(read.range, &mut self.plan);
        let (before, mut whole) = (self.cached_reads.parts.len(), self.plan.missing.is_empty());
        if whole {
            for extent in &self.plan.extents {
                let len = usize::try_from(extent.range.bytes()).expect("a range on a disk of 2040 GiB");
                let found = match extent.source {
                    Source::Zero => None,
                    Source::File { slot, offset } => {
                        // Those behind one that is not found are asked for all the same: it counts how often they are wanted.
                        let found = self.engine.find_cached(slot, offset, len);
                        whole &= found.is_some();
                        found
                    }
                };
                self.cached_reads.parts.push(CachedPart { cached: found, len });
            }
        }
        if !whole {
            self.cached_reads.parts.truncate(before);
            return Err(read);
        }
        let parts = self.cached_reads.parts.len() - before;
        self.cached_reads.planned.push((read, parts));
        Ok(())
    }

    /// Makes the copies that were planned; true where some of it is left to the host after all.
    pub(super) fn copy_cached_reads(&mut self) -> bool {
        if self.cached_reads.planned.is_empty() {
            return false;
        }
        let mut left = false;
        let (mut reads, mut parts) =
            (std::mem::take(&mut self.cached_reads.planned), std::mem::take(&mut self.cached_reads.parts));
        let found = || parts.iter().filter_map(|part| part.cached.as_ref());
        found().for_each(CachedRange::prefetch_pages);
        reads.iter().for_each(|(read, _)| read.into.prefetch_pages());
        let mut next = found();
        next.next().into_iter().for_each(CachedRange::prefetch);
        let mut rest = parts.iter();
        for (CachedRead { tag, range, into }, parts) in reads.drain(..) {
            let (mut whole, mut at) = (true, 0);
            for CachedPart { cached: found, len } in rest.by_ref().take(parts) {
                match found {
                    Some(found) => {
                        next.next().into_iter().for_each(CachedRange::prefetch);
                        whole = whole && self.engine.copy_cached(found, &into, at);
                    }
                    None => into.zero(at, *len),
                }
                at += len;
            }
            if whole {
                self.answers.push(Answer { tag, outcome: Outcome::Done, memory: Some(into) });
            } else {
                // It takes too long, or a page cannot be had: then the host says why.
                left = true;
                self.start_request(Request { tag, work: Work::Read { range, into } });
            }
        }
        parts.clear();
        (self.cached_reads.planned, self.cached_reads.parts) = (reads, parts);
        self.engine.end_copy_batch();
        left
    }
}
