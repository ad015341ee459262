//! The in-flight record of one queue: shared memory of the front-end in which the daemon records the chains that it has
//! popped and not yet completed. The memory survives a kill of the daemon, and the next daemon resubmits these chains.
//!
//! The layout is that of QEMU's `docs/interop/vhost-user.rst`, "Inflight I/O tracking", for split virtqueues:
//!
//! ```text
//!   0 features u64 | 8 version u16 | 10 desc_num u16 | 12 last_batch_head u16 | 14 used_idx u16
//!   16 + 16 * head:  inflight u8 | padding | 6 next u16 | 8 counter u64
//! ```
//!
//! # Order of the stores: a kill at any point loses no request and repeats no completed request
//!
//! A killed thread has executed its stores up to some point in program order. So it is enough that the compiler does
//! not reorder the stores: each store of this module, and the store to `used.idx`, is a release store.
//!
//! After a kill, the last of these stores decides what the next daemon does with the head:
//!
//! 1. `counter`, when the chain is popped: the head is not in flight. It is still next in the avail ring, and is popped
//!    from there.
//! 2. `inflight = 1`: the head is in flight, whether or not its I/O was started, and is resubmitted.
//! 3. Data, status byte or used element: the driver sees none of these before `used.idx`. The head is resubmitted.
//! 4. `next` or `last_batch_head`, when the chain is completed: `used_idx` equals the ring's index, so the list of
//!    completed heads (from `last_batch_head` along `next`) is not read. The head is resubmitted.
//! 5. `used.idx`, or `inflight = 0` of some heads: the driver has the batch and may have reused its heads. `used_idx`
//!    differs from the ring's index by the size of the batch. `resume` clears `inflight` of that number of heads of the
//!    list, so they are not resubmitted.
//! 6. `used_idx`: the heads of the batch are not in flight, and nothing is left to do.
//!
//! Every chain is recorded when it is popped, in the order of the avail ring, even if it needs no disk. So the number
//! of chains popped is the used index plus the number of heads in flight, and the index of the next chain to pop
//! follows from that number. The index that the front-end sends (QEMU: the used index, cloud-hypervisor: the avail
//! index) is not needed.
//!
//! A request may be executed twice, but never after it was answered. The repetition is harmless, since the data goes to
//! the same place.
//!
//! Only [`InFlightRecord::resume`] reads the region. The contents are not trusted: they decide only which descriptors
//! of the front-end's own guest are read, and in which order.

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

/// The only version that is defined. A region that was never used contains version 0.
const VERSION_1: u16 = 1;

/// The mapped region with the records of all queues.
#[derive(Debug)]
pub struct InFlightRegion {
    // Declared before the mapping that it guards, so that it is dropped first.
    guard: Option<Guard>,
    map: MmapRegion<()>,
}

impl InFlightRegion {
    /// Creates a region from its mapping. With a guard, an access to a lost page does not kill the process.
    pub fn new(map: MmapRegion<()>, guard: Option<Guard>) -> InFlightRegion {
        InFlightRegion { guard, map }
    }

    /// Whether a page of the region is lost: the front-end truncated the file, or the kernel had no memory for the
    /// page.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }
}

/// The in-flight record of one queue. Only [`InFlightRecord::resume`] reads the record.
#[derive(Clone)]
pub struct InFlightRecord {
    map: Arc<InFlightRegion>,
    offset: usize,
    entries: u16,
    last_completed: u16,
    counter: u64,
    /// Heads that were completed since `used.idx` was last stored.
    unpublished: Vec<u16>,
}

impl InFlightRecord {
    /// Size in bytes of the record of a queue of at most `entries` descriptors.
    pub const fn len(entries: u16) -> usize {
        (ENTRIES + ENTRY_LEN * entries as usize).next_multiple_of(64)
    }

    /// Creates the record of a queue of at most `entries` descriptors, at byte `at` of `map`.
    ///
    /// # Panics
    /// If the record does not lie inside `map`, or `at` is not a multiple of 64.
    pub fn new(map: Arc<InFlightRegion>, at: usize, entries: u16) -> InFlightRecord {
        let end = at.checked_add(InFlightRecord::len(entries));
        assert!(end.is_some_and(|end| end <= map.map.size()), "a record lies in its region");
        assert!(at.is_multiple_of(64), "a record is aligned");
        InFlightRecord { map, offset: at, entries, last_completed: 0, counter: 0, unpublished: Vec::new() }
    }

    /// Whether a page of the region is lost: the front-end truncated the file, or the kernel had no memory for the
    /// page.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Maximum number of descriptors of a ring whose chains the record can hold.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Takes over the record of the previous daemon. Returns the heads in flight, each once, in the order in which the
    /// chains were popped. `size` is the size of the ring, and `used_idx` is its used index.
    ///
    /// # Errors
    /// `Invalid` if the ring has more descriptors than the record, or the header of the record is not valid.
    pub fn resume(&mut self, size: u16, used_idx: u16) -> Result<Vec<u16>> {
        let invalid = |what| Err(Error::new(ErrorKind::Invalid, what));
        if size > self.entries {
            return invalid(format!(
                "the ring has {size} descriptors, but the front-end's in-flight record has room for {}",
                self.entries
            ));
        }
        self.unpublished.clear();
        (self.last_completed, self.counter) = (0, 0);
        match self.load(VERSION) {
            0 => self.initialise(used_idx),
            VERSION_1 => match self.load::<u16>(DESC_NUM) {
                n if n == self.entries => {}
                n => {
                    return invalid(format!(
                        "the front-end's in-flight record has room for {} descriptors, but its header contains {n}",
                        self.entries
                    ));
                }
            },
            other => {
                return invalid(format!(
                    "the front-end's in-flight record has version {other}; only version 1 is supported"
                ));
            }
        }
        let unmarked = used_idx.wrapping_sub(self.load(USED_IDX));
        if unmarked > size {
            // A batch never has more chains than its ring, so the record belongs to an earlier ring.
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

    /// Clears the record. Stores the version last, so that after a kill in between the record still counts as unused.
    fn initialise(&self, used_idx: u16) {
        self.store(VERSION, 0u16);
        (0..self.entries).for_each(|head| self.set_inflight(head, 0));
        self.store(DESC_NUM, self.entries);
        self.store(USED_IDX, used_idx);
        self.store(VERSION, VERSION_1);
    }

    /// Records a chain that was popped from the avail ring. The caller must call this before the chain has any effect.
    pub fn record_taken(&mut self, head: u16) {
        self.store(entry_offset(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.set_inflight(head, 1);
    }

    /// Records a completed chain. The caller must call this after it has written data, status and used element, and
    /// before it stores `used.idx`.
    pub fn record_completed(&mut self, head: u16) {
        self.store(entry_offset(head) + NEXT, self.last_completed);
        self.store(LAST_BATCH_HEAD, head);
        self.last_completed = head;
        self.unpublished.push(head);
    }

    /// Records that `used.idx` was stored, and so that the driver sees all completed chains.
    pub fn record_published(&mut self, used_idx: u16) {
        if self.unpublished.is_empty() {
            return;
        }
        self.unpublished.iter().for_each(|&head| self.set_inflight(head, 0));
        self.unpublished.clear();
        self.store(USED_IDX, used_idx);
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let word = self.map.map.get_slice(self.offset + at, size_of::<T>()).expect("a record lies in its region");
        word.load(0, Ordering::Acquire).expect("a record's words are aligned")
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let word = self.map.map.get_slice(self.offset + at, size_of::<T>()).expect("a record lies in its region");
        word.store(value, 0, Ordering::Release).expect("a record's words are aligned");
        #[cfg(test)]
        super::store_counter::count_store();
    }

    fn set_inflight(&self, head: u16, inflight: u8) {
        self.store(entry_offset(head), inflight);
    }
}

/// Returns the offset of the entry of a head in the record.
fn entry_offset(head: u16) -> usize {
    ENTRIES + ENTRY_LEN * usize::from(head)
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;
