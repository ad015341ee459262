//! The rings of a split virtqueue (virtio 1.2, 2.7): available heads, used elements, and notifications in both
//! directions.
//!
//! virtio-queue's `Queue` only stores the ring state that the front-end has sent. This module serves the ring itself,
//! for three reasons:
//!
//! - `Queue::add_used` publishes `used.idx` for every element. One release store for a batch is enough (measured: 23 to
//!   40 ns an element, against 10 ns in batches of 32).
//! - `Queue` decides on an interrupt by the elements that the same `Queue` added, and ignores `NO_INTERRUPT`.
//! - `Queue` looks up the memory region of a ring for every word. This module checks the rings once (V1).

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use super::guest_memory::{GuestSpan, GuestView};
use super::spec::{self, AVAIL_NO_INTERRUPT, Descriptor, USED_NO_NOTIFY, desc, used_element};
use crate::error::{Error, ErrorKind, Result};

/// Offset of `flags` in both rings.
const FLAGS: usize = 0;
/// Offset of `idx` in both rings.
const IDX: usize = 2;
/// Offset of the first element in both rings.
const ELEMENTS: usize = 4;
const AVAIL_ELEMENT: usize = 2;
const USED_ELEMENT: usize = 8;

/// Size and addresses of the rings, as the driver has set them up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub table: u64,
    /// Guest address of the avail ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// Reason for which a ring is broken. The avail ring of a broken ring is not trusted and must not be polled again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingError {
    /// V2: `avail.idx` announces more chains than the ring has entries.
    AvailIndexJump,
    /// V3: a head is not smaller than the size of the ring.
    BadHead,
    /// V3: a head is in flight already.
    HeadInFlight,
    /// A page of the guest's memory or of the in-flight record is lost: bytes that were read since then may be zeros.
    MemoryLost,
}

/// The rings of one virtqueue that is being served.
pub struct SplitRing {
    table: GuestSpan,
    avail: GuestSpan,
    used: GuestSpan,
    size: u16,
    event_idx: bool,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The last value stored to `used.idx`.
    published: Wrapping<u16>,
    /// The value of `published` at the last decision on an interrupt.
    interrupt_decided: Wrapping<u16>,
    /// Whether the next call of [`SplitRing::publish`] requires an interrupt in any case. The reason is given at
    /// [`SplitRing::new`].
    force_interrupt: bool,
    /// Whether kicks are enabled. Unused with `EVENT_IDX`.
    kicks_enabled: bool,
}

impl SplitRing {
    /// Checks V1, and continues at `next_avail` and at the used index in memory.
    ///
    /// A previous daemon may have been killed after its last used element and before the interrupt for that element. So
    /// the first [`SplitRing::publish`] requires an interrupt. An interrupt without a new used element is harmless.
    ///
    /// # Errors
    /// `Invalid` if the ring violates V1.
    pub fn new(
        view: &GuestView,
        layout: RingLayout,
        max_size: u16,
        event_idx: bool,
        next_avail: u16,
    ) -> Result<SplitRing> {
        let size = layout.size;
        let invalid = |what: String| Error::new(ErrorKind::Invalid, what);
        if !size.is_power_of_two() || size > max_size {
            return Err(invalid(format!(
                "a virtqueue has {size} descriptors; the number must be a power of two up to {max_size}"
            )));
        }
        let count = usize::from(size);
        let span = |what: &str, addr: u64, len: usize, align: usize| {
            view.span(addr, len, align).ok_or_else(|| {
                invalid(format!(
                    "the {what} of {len} bytes at guest address {addr:#x} is misaligned or not inside one memory region"
                ))
            })
        };
        let table = span("descriptor table", layout.table, count * desc::LEN, 16)?;
        let avail = span("avail ring", layout.avail, ELEMENTS + count * AVAIL_ELEMENT + 2, 2)?;
        let used = span("used ring", layout.used, ELEMENTS + count * USED_ELEMENT + 2, 4)?;
        let next_used = Wrapping(used.load(IDX, Ordering::Acquire));
        Ok(SplitRing {
            table,
            avail,
            used,
            size,
            event_idx,
            next_avail: Wrapping(next_avail),
            next_used,
            published: next_used,
            interrupt_decided: next_used,
            force_interrupt: true,
            kicks_enabled: true,
        })
    }

    /// Number of descriptors in the table.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    pub fn table(&self) -> &GuestSpan {
        &self.table
    }

    /// Index of the next entry of the avail ring to pop.
    pub fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// Index of the next element of the used ring to write.
    pub fn next_used(&self) -> u16 {
        self.next_used.0
    }

    /// Number of chains that the driver has made available and that were not popped (V2).
    ///
    /// # Errors
    /// - [`RingError::AvailIndexJump`] if there are more chains than the ring has entries.
    pub fn available(&self) -> Result<u16, RingError> {
        // Acquire: later reads see everything that the driver wrote before it advanced `avail.idx`.
        let available = (Wrapping(self.avail.load(IDX, Ordering::Acquire)) - self.next_avail).0;
        if available > self.size { Err(RingError::AvailIndexJump) } else { Ok(available) }
    }

    /// Returns the head of the next chain (V3). Requires an available chain. [`SplitRing::advance`] moves on to the
    /// chain after it.
    ///
    /// # Errors
    /// - [`RingError::BadHead`] if the head is not smaller than the size of the ring.
    pub fn head(&self) -> Result<u16, RingError> {
        let head = self.avail_entry(0);
        if head < self.size { Ok(head) } else { Err(RingError::BadHead) }
    }

    /// Returns the entry of the avail ring that is `n` entries after the next one.
    #[inline]
    fn avail_entry(&self, n: u16) -> u16 {
        let at = ELEMENTS + usize::from((self.next_avail + Wrapping(n)).0 & (self.size - 1)) * AVAIL_ELEMENT;
        self.avail.load(at, Ordering::Relaxed)
    }

    /// Prefetches the first descriptor of the chain that is `n` chains after the next chain. Usually another processor
    /// wrote the descriptor, so the caches of this processor do not contain it.
    #[inline]
    pub fn prefetch_descriptor(&self, n: u16) {
        self.table.prefetch(self.descriptor_offset(n));
    }

    /// Returns the buffer address in the descriptor that [`SplitRing::prefetch_descriptor`] prefetches. The address is
    /// for a prefetch only: it is not checked, and the descriptor is read again later.
    #[inline]
    pub fn header_addr_hint(&self, n: u16) -> u64 {
        Descriptor::decode(self.table.load_raw64(self.descriptor_offset(n)), 0).addr
    }

    /// Returns the offset of the first descriptor of the chain that is `n` chains after the next one. A head that is
    /// too large is reduced modulo the size of the ring.
    #[inline]
    fn descriptor_offset(&self, n: u16) -> usize {
        usize::from(self.avail_entry(n) & (self.size - 1)) * desc::LEN
    }

    /// Sets the next available index for a ring of which the previous daemon had `taken` chains in flight.
    pub fn resume_after(&mut self, taken: u16) {
        self.next_avail = self.next_used + Wrapping(taken);
    }

    /// Moves past the next chain, after the caller has popped it.
    pub fn advance(&mut self) {
        self.next_avail += 1;
    }

    /// Adds a used element for a chain, with the number of bytes that were written to its buffers. The driver sees the
    /// element after [`SplitRing::publish`].
    pub fn put_used(&mut self, head: u16, written: u32) {
        let at = ELEMENTS + usize::from(self.next_used.0 & (self.size - 1)) * USED_ELEMENT;
        let [id, len] = used_element(head, written);
        self.used.store_raw32(at, id);
        self.used.store_raw32(at + 4, len);
        self.next_used += 1;
    }

    /// Publishes all used elements to the driver. Returns whether the driver requires an interrupt.
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used && !self.force_interrupt {
            return false;
        }
        // Release: status bytes and used elements become visible before `used.idx`.
        self.used.store(IDX, self.next_used.0, Ordering::Release);
        self.published = self.next_used;
        // The driver stores `used_event` and then loads `used.idx`; the device stores `used.idx` and then loads
        // `used_event`. A full fence between the two accesses on each side guarantees that at least one side sees the
        // store of the other.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = Wrapping(self.avail.load(self.used_event_offset(), Ordering::Relaxed));
            self.published - event - Wrapping(1) < self.published - self.interrupt_decided
        } else {
            self.avail.load(FLAGS, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        };
        self.interrupt_decided = self.published;
        std::mem::take(&mut self.force_interrupt) || wanted
    }

    /// Enables kicks: the driver kicks when it adds a chain. Returns whether the driver added chains before it could
    /// see that kicks are enabled.
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let at = ELEMENTS + usize::from(self.size) * USED_ELEMENT;
            self.used.store(at, self.next_avail.0, Ordering::Relaxed);
        } else if !self.kicks_enabled {
            self.used.store(FLAGS, 0, Ordering::Relaxed);
            self.kicks_enabled = true;
        }
        // The driver stores `avail.idx` and then loads `avail_event`; the device stores `avail_event` and then loads
        // `avail.idx`. The fence has the same purpose as in `publish`.
        fence(Ordering::SeqCst);
        self.avail.load(IDX, Ordering::Relaxed) != self.next_avail.0
    }

    /// Disables kicks of the driver. With `EVENT_IDX` nothing is stored, since the driver kicks only once after
    /// [`SplitRing::enable_kicks`].
    pub fn disable_kicks(&mut self) {
        if !self.event_idx && self.kicks_enabled {
            self.used.store(FLAGS, USED_NO_NOTIFY, Ordering::Relaxed);
            self.kicks_enabled = false;
        }
    }

    /// Returns the offset of `used_event` in the avail ring.
    fn used_event_offset(&self) -> usize {
        ELEMENTS + usize::from(self.size) * AVAIL_ELEMENT
    }
}

// No offset in the largest virtqueue can overflow.
const _: () = assert!(spec::MAX_QUEUE_SIZE as usize * desc::LEN < 1 << 20);

#[cfg(test)]
#[path = "split_ring_tests.rs"]
mod tests;
