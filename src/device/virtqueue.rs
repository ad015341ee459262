//! One virtqueue without its disk. A [`Virtqueue`] pops descriptor chains and turns them into requests, turns answers
//! into used elements, and records which heads are in flight.
//!
//! This file uses neither lanes nor eventfds, so unit tests can test every rule of a ring without a disk.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, compiler_fence};

use super::descriptor_chain::DescriptorChain;
use super::guest_memory::GuestView;
use super::inflight::InFlightRecord;
use super::parse::{MAX_BYTES, ParsedChain, RequestRules, parse};
use super::spec::Status;
use super::split_ring::{RingError, SplitRing};
use crate::disk::{Answer, Outcome, Request, Work};
use crate::error::{Error, ErrorKind};
use crate::storage::{GuestIovecs, sigbus};

/// Maximum number of chains of one batch (V17).
///
/// A batch is half of the available chains, at least 4 and at most 16. So the driver processes the first answers while
/// the device serves the rest of the queue. If a batch contained all available chains, driver and device would work
/// alternately (figures in `docs/performance.md`, section 3).
pub const MAX_BATCH: u16 = 16;
/// Minimum number of chains of one batch, if that number of chains is available.
const MIN_BATCH: u16 = 4;
/// Number of bytes of reads and writes at which a batch ends. The reason is that given at [`MAX_BATCH`].
pub const MAX_BATCH_BYTES: u64 = 512 << 10;
/// Maximum number of bytes of reads and writes in flight for one queue (V15). The bytes are guest memory, so this limit
/// does not bound the memory of the daemon. It bounds the share of the disk that one queue can occupy. No single
/// request exceeds the limit.
pub const MAX_BYTES_IN_FLIGHT: u64 = 2 * MAX_BYTES;

/// Reason for which a batch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PopResult {
    /// No more chains are available, or no more chains are left to resubmit.
    Empty,
    /// The batch has its full size (V17).
    BatchFull,
    /// The lane or the number of bytes in flight is at its limit. Answers free capacity (V15).
    NoCapacity,
    /// The ring is broken (V2, V3), or memory is lost. [`Virtqueue::broken`] returns the reason.
    Broken,
}

/// The state of one head.
#[derive(Clone, Copy, Default)]
struct InFlightChain {
    in_flight: bool,
    /// Guest address of the status byte.
    status_at: u64,
    /// Used length if the request succeeds, including the status byte.
    written: u32,
    /// Length of the data in bytes, which counts as in flight.
    bytes: u32,
}

/// A virtqueue that is being served.
pub struct Virtqueue {
    view: GuestView,
    ring: SplitRing,
    /// The state of each head, by head. The tag of a request is its head.
    heads: Vec<InFlightChain>,
    bytes_in_flight: u64,
    chain: DescriptorChain,
    iovec_pool: Vec<GuestIovecs>,
    broken: Option<RingError>,
    record: Option<InFlightRecord>,
    /// Heads that were in flight when the previous daemon was killed. Their chains are resubmitted before new chains
    /// are popped.
    to_resubmit: VecDeque<u16>,
    /// Number of chains that were refused since the caller last reset the number.
    pub(super) refused: u64,
    /// The value of [`sigbus::loss_count`] at the last check that found no page of this queue's memory lost.
    losses_seen: u32,
}

impl Virtqueue {
    /// Starts to serve a ring. Without a record, no chain is in flight. With a record, the chains that it has in flight
    /// are resubmitted first, and new chains are popped after them.
    ///
    /// # Errors
    /// - `Io` if there is a record, and a page of the guest's memory or of the record is lost.
    /// - Any error of [`InFlightRecord::resume`].
    pub fn new(
        view: GuestView,
        mut ring: SplitRing,
        mut record: Option<InFlightRecord>,
    ) -> crate::error::Result<Virtqueue> {
        let mut to_resubmit = VecDeque::new();
        if let Some(record) = &mut record {
            // A lost page reads as zeros, and a used index of zero would erase the marks of requests in flight.
            if view.is_lost() || record.is_lost() {
                let what = "a page of the guest's memory cannot be had";
                return Err(Error::new(ErrorKind::Io, what));
            }
            to_resubmit = record.resume(ring.size(), ring.next_used())?.into();
            ring.resume_after(u16::try_from(to_resubmit.len()).expect("a head is in flight once"));
        }
        let heads = vec![InFlightChain::default(); usize::from(ring.size())];
        Ok(Virtqueue {
            view,
            ring,
            heads,
            bytes_in_flight: 0,
            chain: DescriptorChain::default(),
            iovec_pool: Vec::new(),
            broken: None,
            record,
            to_resubmit,
            refused: 0,
            // The current loss count would be wrong here, since a page of this queue's memory may be lost already.
            losses_seen: 0,
        })
    }

    /// Returns whether a page of the guest's memory or of the in-flight record is lost. While the loss count is
    /// unchanged, the check costs one load and one comparison.
    #[inline]
    fn is_memory_lost(&mut self) -> bool {
        let losses = sigbus::loss_count();
        losses != self.losses_seen && self.check_loss(losses)
    }

    #[cold]
    fn check_loss(&mut self, losses: u32) -> bool {
        let lost = self.view.is_lost() || self.record.as_ref().is_some_and(InFlightRecord::is_lost);
        if lost {
            self.broken = Some(RingError::MemoryLost);
        } else {
            // The lost pages belong to other memory than that of this queue.
            self.losses_seen = losses;
        }
        lost
    }

    /// The rings of the queue.
    pub fn ring(&mut self) -> &mut SplitRing {
        &mut self.ring
    }

    /// Whether all indices of the rings are zero, as if no driver had used them.
    pub fn is_unused(&self) -> bool {
        self.ring.next_avail() == 0 && self.ring.next_used() == 0 && self.available_chains() == 0
    }

    /// Number of chains of the previous daemon that were not resubmitted yet.
    pub fn chains_to_resubmit(&self) -> usize {
        self.to_resubmit.len()
    }

    /// Publishes all completed chains to the driver. Returns whether the driver requires an interrupt. Publishes
    /// nothing if memory is lost, since the data of a write may then have been read as zeros.
    pub fn publish(&mut self) -> bool {
        if self.is_memory_lost() {
            return false;
        }
        let wanted = self.ring.publish();
        // If `used.idx` was stored to a lost page, the driver cannot see the store, and the record must not count the
        // chains as published. A record that lags is harmless.
        compiler_fence(Ordering::SeqCst);
        if self.is_memory_lost() {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.record_published(self.ring.next_used());
        }
        wanted
    }

    /// Returns the reason for which the ring is broken, or `None` if it is not broken.
    pub fn broken(&self) -> Option<RingError> {
        self.broken
    }

    /// Number of chains that the driver has made available and that were not popped. Zero if `avail.idx` is not valid.
    pub fn available_chains(&self) -> u16 {
        self.ring.available().unwrap_or(0)
    }

    /// Pops the chains of a batch and passes their requests to `push`. `room` is the number of requests that may be
    /// pushed; `push` returns the number of requests that may be pushed after it. Requests that need no disk are
    /// completed at once.
    pub fn pop_chains(
        &mut self,
        rules: &RequestRules<'_>,
        room: usize,
        push: impl FnMut(Request) -> usize,
    ) -> PopResult {
        if self.broken.is_some() {
            return PopResult::Broken;
        }
        self.try_pop_chains(rules, room, push).unwrap_or_else(|broken| {
            // A lost page reads as zeros, which can look like an error of the driver. Then the reason stays
            // `MemoryLost`.
            if !self.is_memory_lost() {
                self.broken = Some(broken);
            }
            PopResult::Broken
        })
    }

    /// Resubmits chains of the previous daemon, until [`MAX_BATCH`] chains or [`MAX_BATCH_BYTES`] are reached. The
    /// parameters have the same meaning as those of [`Virtqueue::pop_chains`].
    pub fn pop_resubmitted(
        &mut self,
        rules: &RequestRules<'_>,
        mut room: usize,
        mut push: impl FnMut(Request) -> usize,
    ) -> PopResult {
        let enough = self.bytes_in_flight + MAX_BATCH_BYTES;
        for _ in 0..MAX_BATCH {
            let Some(&head) = self.to_resubmit.front() else { return PopResult::Empty };
            if self.bytes_in_flight >= enough {
                return PopResult::BatchFull;
            }
            if room == 0 {
                return PopResult::NoCapacity;
            }
            match self.start_chain(head, true, rules, &mut room, &mut push) {
                Ok(true) => self.to_resubmit.pop_front(),
                Ok(false) => return PopResult::NoCapacity,
                Err(_) => return PopResult::Broken,
            };
        }
        if self.to_resubmit.is_empty() { PopResult::Empty } else { PopResult::BatchFull }
    }

    fn try_pop_chains(
        &mut self,
        rules: &RequestRules<'_>,
        mut room: usize,
        mut push: impl FnMut(Request) -> usize,
    ) -> Result<PopResult, RingError> {
        assert!(
            self.to_resubmit.is_empty(),
            "chains of the previous daemon are resubmitted before new ones are popped"
        );
        let available = self.ring.available()?;
        let (batch, enough) = ((available / 2).clamp(MIN_BATCH, MAX_BATCH), self.bytes_in_flight + MAX_BATCH_BYTES);
        let count = available.min(batch);
        self.prefetch_batch(count);
        for _ in 0..count {
            if self.bytes_in_flight >= enough {
                return Ok(PopResult::BatchFull);
            }
            if room == 0 {
                return Ok(PopResult::NoCapacity);
            }
            let head = self.ring.head()?;
            if self.heads[usize::from(head)].in_flight {
                return Err(RingError::HeadInFlight);
            }
            if !self.start_chain(head, false, rules, &mut room, &mut push)? {
                return Ok(PopResult::NoCapacity);
            }
        }
        Ok(if available > batch { PopResult::BatchFull } else { PopResult::Empty })
    }

    /// Prefetches the descriptors and headers of a batch together. Usually another processor wrote them, so without the
    /// prefetch each access is a cache miss (4 KiB reads, 16 layers: 798,000 a second without, 882,000 with).
    fn prefetch_batch(&self, count: u16) {
        if count > 1 {
            (0..count).for_each(|n| self.ring.prefetch_descriptor(n));
            (0..count).for_each(|n| self.view.prefetch(self.ring.header_addr_hint(n)));
        }
    }

    /// Parses a chain and starts its request. Returns false, and has no effect, if the request would exceed
    /// [`MAX_BYTES_IN_FLIGHT`]. `resubmitted` is true for a chain of the previous daemon.
    ///
    /// # Errors
    /// - [`RingError::MemoryLost`]: the request may consist of zeros read from lost pages, and has no effect.
    fn start_chain(
        &mut self,
        head: u16,
        resubmitted: bool,
        rules: &RequestRules<'_>,
        room: &mut usize,
        push: &mut impl FnMut(Request) -> usize,
    ) -> Result<bool, RingError> {
        let walked = self.chain.walk(&self.view, self.ring.table(), self.ring.size(), head);
        if self.is_memory_lost() {
            return Err(RingError::MemoryLost);
        }
        if walked.is_err() {
            // V4: the chain is returned, and the ring stays in service.
            self.refused += 1;
            self.record_taken(head, resubmitted);
            self.return_chain(head, 0);
            return Ok(true);
        }
        let parsed = parse(&self.chain, &self.view, rules, &mut self.iovec_pool);
        if self.is_memory_lost() {
            return Err(RingError::MemoryLost);
        }
        match parsed {
            ParsedChain::Submit { work, status_at, written } => {
                let bytes = data_len(&work);
                if self.bytes_in_flight + u64::from(bytes) > MAX_BYTES_IN_FLIGHT {
                    // Answers free capacity. Then the chain is parsed again.
                    self.recycle(data_memory(work));
                    return Ok(false);
                }
                self.record_taken(head, resubmitted);
                self.bytes_in_flight += u64::from(bytes);
                self.heads[usize::from(head)] = InFlightChain { in_flight: true, status_at, written, bytes };
                *room = push(Request { tag: u64::from(head), work });
            }
            ParsedChain::Complete { status, status_at, written } => {
                self.record_taken(head, resubmitted);
                self.refused += u64::from(status != Status::Ok);
                self.complete_chain(head, status, status_at, written);
            }
            ParsedChain::Return => {
                self.refused += 1;
                self.record_taken(head, resubmitted);
                self.return_chain(head, 0);
            }
        }
        Ok(true)
    }

    /// Records a new chain as in flight and advances the ring. If this daemon is killed later, the next daemon
    /// resubmits the chain. A resubmitted chain is in the record already.
    fn record_taken(&mut self, head: u16, resubmitted: bool) {
        if resubmitted {
            return;
        }
        if let Some(record) = &mut self.record {
            record.record_taken(head);
        }
        self.ring.advance();
    }

    /// Puts a chain into the used ring. The driver sees the chain after the next [`Virtqueue::publish`].
    fn return_chain(&mut self, head: u16, written: u32) {
        self.ring.put_used(head, written);
        if let Some(record) = &mut self.record {
            record.record_completed(head);
        }
    }

    /// Completes the chain of an answered request. The driver sees the chain after the next [`Virtqueue::publish`].
    pub fn complete(&mut self, answer: Answer) {
        let head = u16::try_from(answer.tag).expect("a tag is a head");
        let chain = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(chain.in_flight, "every request is answered once");
        self.bytes_in_flight -= u64::from(chain.bytes);
        if let (Outcome::Failed, Some(memory)) = (answer.outcome, &answer.memory) {
            // If the kernel accessed a lost page, it only reported a failure. An access by this process marks the
            // memory as lost.
            memory.touch_pages();
        }
        self.recycle(answer.memory);
        let (status, written) = match answer.outcome {
            Outcome::Done => (Status::Ok, chain.written),
            // V14: bytes that a failed read left in the buffers are not part of the used length.
            Outcome::Failed => (Status::IoErr, 1),
            Outcome::Unsupported => (Status::Unsupp, 1),
        };
        self.complete_chain(head, status, chain.status_at, written);
    }

    /// Writes the status byte, after the data and before the used element.
    fn complete_chain(&mut self, head: u16, status: Status, status_at: u64, written: u32) {
        let there = self.view.write_byte(status_at, status as u8);
        assert!(there, "the address of the status was checked when the chain was parsed");
        self.return_chain(head, written);
    }

    fn recycle(&mut self, memory: Option<GuestIovecs>) {
        // The iovecs keep guest memory mapped, but `self.view` keeps the same memory mapped at least as long.
        if let Some(iovecs) = memory {
            self.iovec_pool.push(iovecs);
        }
    }
}

fn data_len(work: &Work) -> u32 {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => u32::try_from(s.len()).expect("at most 32 MiB"),
        Work::Flush | Work::Prefetch { .. } | Work::Discard { .. } | Work::WriteZeroes { .. } => 0,
    }
}

fn data_memory(work: Work) -> Option<GuestIovecs> {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => Some(s),
        Work::Flush | Work::Prefetch { .. } | Work::Discard { .. } | Work::WriteZeroes { .. } => None,
    }
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
