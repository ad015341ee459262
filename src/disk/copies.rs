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
use crate::storage::{CachedRange, MAX_COPY, GuestIovecs};
use crate::units::SectorRange;

/// What is asked for, or planned, and not made yet.
#[derive(Default)]
pub(super) struct Copies {
    /// Not planned yet.
    asked: VecDeque<AskedRead>,
    /// Planned, with the number of their parts.
    reads: Vec<(AskedRead, usize)>,
    /// Of all reads, in their order.
    parts: Vec<Part>,
}

/// A read that needs nothing but copies, perhaps.
struct AskedRead {
    tag: u64,
    range: SectorRange,
    into: GuestIovecs,
}

/// A part of a read: a copy, or zeros.
struct Part {
    found: Option<CachedRange>,
    len: usize,
}

impl Copies {
    /// Reads.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.asked.len() + self.reads.len()
    }
}

impl Lane {
    /// Takes a read that may be a copy, to be planned with the others of a turn; gives the memory of any other back. There is
    /// `room`.
    #[inline]
    pub(super) fn ask_copies(&mut self, tag: u64, range: SectorRange, into: GuestIovecs) -> Result<(), GuestIovecs> {
        if range.bytes() > MAX_COPY as u64 {
            return Err(into);
        }
        self.copies.asked.push_back(AskedRead { tag, range, into });
        Ok(())
    }

    /// Plans what was asked for: copies, where all bytes are known to be in memory, or nowhere; requests as all are, else.
    pub(super) fn plan_copies(&mut self) {
        for read in &self.copies.asked {
            self.disk.version().prefetch(read.range, &mut self.plan);
        }
        while let Some(read) = self.copies.asked.pop_front() {
            let range = read.range;
            if let Err(AskedRead { tag, range, into }) = self.plan_one(read) {
                self.planned = true;
                self.begin(Request { tag, work: Work::Read { range, into } });
            }
            self.follow(range);
        }
    }

    /// Plans a read as copies, if it can be.
    #[inline]
    fn plan_one(&mut self, read: AskedRead) -> Result<(), AskedRead> {
        self.disk.version().plan_read(read.range, &mut self.plan);
        let (before, mut whole) = (self.copies.parts.len(), self.plan.missing.is_empty());
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
                self.copies.parts.push(Part { found, len });
            }
        }
        if !whole {
            self.copies.parts.truncate(before);
            return Err(read);
        }
        let parts = self.copies.parts.len() - before;
        self.copies.reads.push((read, parts));
        Ok(())
    }

    /// Makes the copies that were planned; true where some of it is left to the host after all.
    pub(super) fn copy_all(&mut self) -> bool {
        if self.copies.reads.is_empty() {
            return false;
        }
        let mut left = false;
        let (mut reads, mut parts) = (std::mem::take(&mut self.copies.reads), std::mem::take(&mut self.copies.parts));
        let found = || parts.iter().filter_map(|part| part.found.as_ref());
        found().for_each(CachedRange::prefetch_pages);
        reads.iter().for_each(|(read, _)| read.into.prefetch_pages());
        let mut next = found();
        next.next().into_iter().for_each(CachedRange::prefetch);
        let mut rest = parts.iter();
        for (AskedRead { tag, range, into }, parts) in reads.drain(..) {
            let (mut whole, mut at) = (true, 0);
            for Part { found, len } in rest.by_ref().take(parts) {
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
                self.begin(Request { tag, work: Work::Read { range, into } });
            }
        }
        parts.clear();
        (self.copies.reads, self.copies.parts) = (reads, parts);
        self.engine.end_copy_batch();
        left
    }
}
