//! One queue's part of the in-flight region: memory of the front-end's that outlives us, in which we note what we have
//! taken and not yet given back, so that whoever comes after a kill carries it out.
//!
//! The words are those of QEMU's `docs/interop/vhost-user.rst`, "Inflight I/O tracking", split virtqueues:
//!
//! ```text
//!   0 features u64 | 8 version u16 | 10 desc_num u16 | 12 last_batch_head u16 | 14 used_idx u16
//!   16 + 16 * head:  inflight u8 | padding | 6 next u16 | 8 counter u64
//! ```
//!
//! # Order, and why a kill at any failpoint loses and doubles nothing
//!
//! A killed thread has done its stores up to some failpoint, in the order of the program; so only the compiler must be
//! kept from moving them, and so each store here, and that of `used.idx`, is a release store.
//!
//! | a kill after this store | what the next daemon finds, and does |
//! | --- | --- |
//! | (take) `counter` | the head is not in flight: it is the next in the avail ring, and is taken from there |
//! | `inflight = 1` | in flight, whether or not its I/O was begun: carried out (again) |
//! | data, status byte, used element | the driver sees none of them before `used.idx`: carried out again |
//! | (give) `next`, `last_batch_head` | `used_idx` is that of the ring, so the list is not looked at: carried out again |
//! | `used.idx`, some `inflight = 0` | the driver has the batch, and may have reused its heads. `used_idx` lags by the batch's size: so many heads of the list lose their marks, and are not carried out again |
//! | `used_idx` | nothing is left to do |
//!
//! Every chain taken is marked, in the order of the avail ring, and chains that need no disk too. So at any failpoint the
//! chains taken are those the used ring counts and those in flight, and the next one is that many after the start:
//! what the front-end says (QEMU: the used index, cloud-hypervisor: the avail index) does not matter.
//!
//! A request may be carried out twice, never after it was answered. That is harmless: data goes to its final place.
//!
//! What stands in the region is read once, by [`InFlightRecord::resume`], and may be anything: it decides which descriptors of
//! the front-end's own guest are looked at, and in which order, and nothing more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::sigbus::Guard;

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const ENTRIES: usize = 16;
const ENTRY_LEN: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The only version there is; zero is a region that nobody used yet.
const VERSION_1: u16 = 1;

/// The mapped region of the records.
#[derive(Debug)]
pub struct InFlightRegion {
    // Before the mapping: a guard goes before what it guards is unmapped.
    guard: Option<Guard>,
    map: MmapRegion<()>,
}

impl InFlightRegion {
    /// The region `map`. With a guard, a page of it that cannot be had does not end the process.
    pub fn new(map: MmapRegion<()>, guard: Option<Guard>) -> InFlightRegion {
        InFlightRegion { guard, map }
    }

    /// Whether a page of the region could not be had.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }
}

/// What one queue notes. Between `resume` calls it is only written.
#[derive(Clone)]
pub struct InFlightRecord {
    map: Arc<InFlightRegion>,
    offset: usize,
    entries: u16,
    last_completed: u16,
    counter: u64,
    /// Heads given back since `used.idx` was last stored.
    unpublished: Vec<u16>,
}

impl InFlightRecord {
    /// Bytes of the record of a queue of at most `entries` descriptors.
    pub const fn len(entries: u16) -> usize {
        (ENTRIES + ENTRY_LEN * entries as usize).next_multiple_of(64)
    }

    /// The record of a queue of at most `entries` descriptors, at byte `at` of `map`.
    ///
    /// # Panics
    /// Where it does not lie in `map`, or not at a multiple of 64.
    pub fn new(map: Arc<InFlightRegion>, at: usize, entries: u16) -> InFlightRecord {
        let end = at.checked_add(InFlightRecord::len(entries));
        assert!(end.is_some_and(|end| end <= map.map.size()), "a record lies in its region");
        assert!(at.is_multiple_of(64), "a record is aligned");
        InFlightRecord { map, offset: at, entries, last_completed: 0, counter: 0, unpublished: Vec::new() }
    }

    /// Whether a page of the region could not be had.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Descriptors of the largest ring that it is for.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Goes on where the last user of the record stopped: the heads in flight, in the order in which they were taken,
    /// each once. `size` is the size of the ring and `used_idx` what stands in it now.
    ///
    /// # Errors
    /// `Invalid` where the ring has more descriptors than the record, or the record was written by somebody else.
    pub fn resume(&mut self, size: u16, used_idx: u16) -> Result<Vec<u16>> {
        let invalid = |what| Err(Error::new(ErrorKind::Invalid, what));
        if size > self.entries {
            return invalid(format!("a ring of {size} descriptors, and an in-flight record of {}", self.entries));
        }
        self.unpublished.clear();
        (self.last_completed, self.counter) = (0, 0);
        match self.load(VERSION) {
            0 => self.initialise(used_idx),
            VERSION_1 => match self.load::<u16>(DESC_NUM) {
                n if n == self.entries => {}
                n => return invalid(format!("an in-flight record of {} descriptors says {n}", self.entries)),
            },
            other => return invalid(format!("an in-flight record of version {other}; version 1 is known")),
        }
        let unmarked = used_idx.wrapping_sub(self.load(USED_IDX));
        if unmarked > size {
            // No batch is longer than its ring: this is about a ring that is no more.
            self.initialise(used_idx);
        } else {
            let mut head: u16 = self.load(LAST_BATCH_HEAD);
            for _ in 0..unmarked {
                if head >= self.entries {
                    break;
                }
                self.set_inflight(head, 0);
                head = self.load(entry_offset(head) + NEXT);
            }
            self.store(USED_IDX, used_idx);
        }
        let marked = (0..size).filter(|head| self.load::<u8>(entry_offset(*head)) == 1);
        let mut heads: Vec<(u64, u16)> = marked.map(|head| (self.load(entry_offset(head) + COUNTER), head)).collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// As new. The version comes last: a kill before it leaves a region that nobody used.
    fn initialise(&self, used_idx: u16) {
        self.store(VERSION, 0u16);
        (0..self.entries).for_each(|head| self.set_inflight(head, 0));
        self.store(DESC_NUM, self.entries);
        self.store(USED_IDX, used_idx);
        self.store(VERSION, VERSION_1);
    }

    /// A chain was taken from the avail ring. To be called before anything is done with it.
    pub fn record_taken(&mut self, head: u16) {
        self.store(entry_offset(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.set_inflight(head, 1);
    }

    /// A chain's data and status are in place, and `used.idx` will soon say so.
    pub fn record_completed(&mut self, head: u16) {
        self.store(entry_offset(head) + NEXT, self.last_completed);
        self.store(LAST_BATCH_HEAD, head);
        self.last_completed = head;
        self.unpublished.push(head);
    }

    /// `used.idx` was stored: the driver has all chains given.
    pub fn record_published(&mut self, used_idx: u16) {
        if self.unpublished.is_empty() {
            return;
        }
        self.unpublished.iter().for_each(|&head| self.set_inflight(head, 0));
        self.unpublished.clear();
        self.store(USED_IDX, used_idx);
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let place = self.map.map.get_slice(self.offset + at, size_of::<T>()).expect("a record lies in its region");
        place.load(0, Ordering::Acquire).expect("a record's words are aligned")
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let place = self.map.map.get_slice(self.offset + at, size_of::<T>()).expect("a record lies in its region");
        place.store(value, 0, Ordering::Release).expect("a record's words are aligned");
        #[cfg(test)]
        super::testing::count_store();
    }

    fn set_inflight(&self, head: u16, inflight: u8) {
        self.store(entry_offset(head), inflight);
    }
}

/// Where the notes on a head begin.
fn entry_offset(head: u16) -> usize {
    ENTRIES + ENTRY_LEN * usize::from(head)
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
