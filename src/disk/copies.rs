//! Reads of what the host has in memory: copies, which are planned with the requests of a turn and made at its end.
//!
//! A read goes this way where all of its bytes are known to be there: it needs no task, and no system call. Any other, and one
//! that turns out not to be there after all, is a request as all are (`stages.rs`).
//!
//! Between the two the processor fetches what will be copied: a page of a large file is in none of its caches, and neither is
//! the way there. Copied as they are planned, 4 KiB take 0.5 to 0.6 us; fetched for a turn of 16 first, 0.35 to 0.4 (AMD EPYC,
//! 512 MiB in the page cache).

use super::lane::Lane;
use super::request::{Answer, Outcome, Request, Work};
use crate::chain::Source;
use crate::storage::{Found, Slices};
use crate::units::SectorRange;

/// Most bytes of a read that is copied: what is longer would hold up those behind it, and mostly has parts too long to copy.
const MOST: u64 = 256 << 10;

/// What is planned, and not made yet.
#[derive(Default)]
pub(super) struct Copies {
    reads: Vec<CopiedRead>,
    /// Of all reads, in their order.
    parts: Vec<Part>,
}

/// A read that needs nothing but copies.
struct CopiedRead {
    tag: u64,
    range: SectorRange,
    into: Slices,
    parts: usize,
}

/// A part of a read: a copy, or zeros.
struct Part {
    found: Option<Found>,
    len: usize,
}

impl Copies {
    /// Reads that are planned.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.reads.len()
    }
}

impl Lane {
    /// Plans a read all of whose bytes are known to be in memory, or nowhere; gives the memory of any other back. There is
    /// `room`.
    #[inline]
    pub(super) fn plan_copies(&mut self, tag: u64, range: SectorRange, into: Slices) -> Result<(), Slices> {
        if range.bytes() > MOST {
            return Err(into);
        }
        self.disk.version().plan_read(range, &mut self.plan);
        let (before, mut whole) = (self.copies.parts.len(), self.plan.missing.is_empty());
        if whole {
            for extent in &self.plan.extents {
                let len = usize::try_from(extent.range.bytes()).expect("a range on a disk of 2040 GiB");
                let found = match extent.source {
                    Source::Zero => None,
                    Source::File { slot, offset } => {
                        // Those behind one that is not found are asked for all the same: it counts how often they are wanted.
                        let found = self.engine.find(slot, offset, len);
                        whole &= found.is_some();
                        found
                    }
                };
                self.copies.parts.push(Part { found, len });
            }
        }
        if !whole {
            self.copies.parts.truncate(before);
            self.planned = true;
            return Err(into);
        }
        let parts = self.copies.parts.len() - before;
        self.copies.reads.push(CopiedRead { tag, range, into, parts });
        Ok(())
    }

    /// Makes the copies that were planned; true where some of it is left to the host after all.
    pub(super) fn copy_all(&mut self) -> bool {
        if self.copies.reads.is_empty() {
            return false;
        }
        let mut left = false;
        let Copies { mut reads, mut parts } = std::mem::take(&mut self.copies);
        let mut rest = parts.iter();
        for CopiedRead { tag, range, into, parts } in reads.drain(..) {
            let (mut whole, mut at) = (true, 0);
            for Part { found, len } in rest.by_ref().take(parts) {
                match found {
                    Some(found) => whole = whole && self.engine.fill(found, &into, at),
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
        self.copies = Copies { reads, parts };
        self.engine.filled();
        left
    }
}
