//! One ring's traffic: chains in, requests out; answers in, used elements out; and which heads are in flight.
//!
//! Knows neither lane nor event fds, so that every rule of a ring can be tried without a disk.

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

/// Most chains taken in one turn (V17), and what a turn takes at least where there is as much. In between it is half of
/// what there is: the driver sees the first answers, and goes to work on them, while the rest of its queue is served.
/// With all of a queue in one turn the two work one after the other (figures in `disk/lane.rs`).
pub const MAX_BATCH: u16 = 16;
const MIN_BATCH: u16 = 4;
/// Bytes of reads and writes after which a turn takes no more chains, for the same reason.
pub const MAX_BATCH_BYTES: u64 = 512 << 10;
/// Most bytes of reads and writes in flight for one queue (V15). They are the guest's own memory, so this bounds how
/// far one queue gets ahead of the others, not what it costs us; it is more than one request may have.
pub const MAX_BYTES_IN_FLIGHT: u64 = 2 * MAX_BYTES;

/// Why no more chains were taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PopResult {
    /// There are none.
    Empty,
    /// The turn is over (V17).
    BatchFull,
    /// The lane or the bytes in flight are at their limit; answers will make room (V15).
    NoCapacity,
    /// The ring is broken (V2, V3), now or since earlier.
    Broken,
}

/// What is to be done when a head's request is over.
#[derive(Clone, Copy, Default)]
struct InFlightChain {
    in_flight: bool,
    status_at: u64,
    /// If all goes well, status included.
    written: u32,
    bytes: u32,
}

/// A ring in service.
pub struct Virtqueue {
    view: GuestView,
    ring: SplitRing,
    /// By head: a request's tag is its head.
    heads: Vec<InFlightChain>,
    bytes_in_flight: u64,
    chain: DescriptorChain,
    iovec_pool: Vec<GuestIovecs>,
    broken: Option<RingError>,
    record: Option<InFlightRecord>,
    /// Heads that a predecessor had in flight when it was killed, to be carried out before any other.
    to_resubmit: VecDeque<u16>,
    /// [`sigbus::losses`] when it was last found that nothing of this ring's memory is lost.
    losses_seen: u32,
}

impl Virtqueue {
    /// Goes on where the ring says, with nothing in flight; or, with a record, where that and the used ring say, with
    /// what a predecessor took and did not give back.
    ///
    /// # Errors
    /// As [`InFlightRecord::resume`].
    pub fn new(
        view: GuestView,
        mut ring: SplitRing,
        mut record: Option<InFlightRecord>,
    ) -> crate::error::Result<Virtqueue> {
        let mut owed = VecDeque::new();
        if let Some(record) = &mut record {
            // An index of zeros of ours would wipe marks of requests that are in flight.
            if view.is_lost() || record.is_lost() {
                let what = "a page of the guest's memory cannot be had";
                return Err(Error::new(ErrorKind::Io, what));
            }
            owed = record.resume(ring.size(), ring.next_used())?.into();
            ring.resume_after(u16::try_from(owed.len()).expect("a head is in flight once"));
        }
        let heads = vec![InFlightChain::default(); usize::from(ring.size())];
        let (chain, spare) = (DescriptorChain::default(), Vec::new());
        // Losses are not counted from here: a page may have been lost already.
        Ok(Virtqueue {
            view,
            ring,
            heads,
            bytes_in_flight: 0,
            chain,
            iovec_pool: spare,
            broken: None,
            record,
            to_resubmit: owed,
            losses_seen: 0,
        })
    }

    /// Whether a page of the guest's memory, or of the record, could not be had. While no page of any mapping is lost, this
    /// is a load and a comparison.
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
            // Those of other guests.
            self.losses_seen = losses;
        }
        lost
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut SplitRing {
        &mut self.ring
    }

    /// Whether the ring looks as if no driver had used it: all indices are zero.
    pub fn is_unused(&self) -> bool {
        self.ring.next_avail() == 0 && self.ring.next_used() == 0 && self.available_chains() == 0
    }

    /// Chains left by a predecessor that are not begun yet.
    pub fn chains_to_resubmit(&self) -> usize {
        self.to_resubmit.len()
    }

    /// Shows the driver all chains given back; true if it wants a signal. Nothing is shown once memory is lost: the data of a
    /// write may have been zeros of ours.
    pub fn publish(&mut self) -> bool {
        if self.is_memory_lost() {
            return false;
        }
        let wanted = self.ring.publish();
        // If the index went into zeros of ours, the record must not say that the driver has seen it. If not, it may lag.
        compiler_fence(Ordering::SeqCst);
        if self.is_memory_lost() {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.record_published(self.ring.next_used());
        }
        wanted
    }

    /// The rule that the driver broke, once it did.
    pub fn broken(&self) -> Option<RingError> {
        self.broken
    }

    /// Chains that the driver has added and that were not taken.
    pub fn available_chains(&self) -> u16 {
        self.ring.available().unwrap_or(0)
    }

    /// Takes chains, at most [`MAX_BATCH`], while there is room for requests; `push` takes one and says how many more there
    /// is room for. What needs no disk is answered at once.
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
            // Zeros of ours look like a driver's mistake.
            if !self.is_memory_lost() {
                self.broken = Some(broken);
            }
            PopResult::Broken
        })
    }

    /// Begins what a predecessor left, at most [`MAX_BATCH`] chains or [`MAX_BATCH_BYTES`], as [`Virtqueue::pop_chains`] does with new ones.
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
        assert!(self.to_resubmit.is_empty(), "what a predecessor left comes before all else");
        let available = self.ring.available()?;
        let (turn, enough) = ((available / 2).clamp(MIN_BATCH, MAX_BATCH), self.bytes_in_flight + MAX_BATCH_BYTES);
        let count = available.min(turn);
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
        Ok(if available > turn { PopResult::BatchFull } else { PopResult::Empty })
    }

    /// Has the processor fetch the descriptors and headers of a turn all at once: the driver's processor wrote them, so
    /// each is a miss (reads of 4 KiB, 16 layers: 798,000 a second without, 882,000 with).
    fn prefetch_batch(&self, count: u16) {
        if count > 1 {
            (0..count).for_each(|behind| self.ring.prefetch_descriptor(behind));
            (0..count).for_each(|behind| self.view.prefetch(self.ring.header_addr_hint(behind)));
        }
    }

    /// Takes a chain, unless the bytes in flight are at their limit, and begins what it asks for.
    ///
    /// # Errors
    /// `LostRange`: nothing may follow from a request that is made of zeros of ours.
    fn start_chain(
        &mut self,
        head: u16,
        owed: bool,
        rules: &RequestRules<'_>,
        room: &mut usize,
        push: &mut impl FnMut(Request) -> usize,
    ) -> Result<bool, RingError> {
        let walked = self.chain.walk(&self.view, self.ring.table(), self.ring.size(), head);
        if self.is_memory_lost() {
            return Err(RingError::MemoryLost);
        }
        if walked.is_err() {
            // V4: the head is known, so the driver gets it back, and the ring goes on.
            self.record_taken(head, owed);
            self.return_chain(head, 0);
            return Ok(true);
        }
        let verdict = parse(&self.chain, &self.view, rules, &mut self.iovec_pool);
        if self.is_memory_lost() {
            return Err(RingError::MemoryLost);
        }
        match verdict {
            ParsedChain::Submit { work, status_at, written } => {
                let bytes = data_len(&work);
                if self.bytes_in_flight + u64::from(bytes) > MAX_BYTES_IN_FLIGHT {
                    // It stays where it is and is looked at afresh when answers have made room.
                    self.recycle(data_memory(work));
                    return Ok(false);
                }
                self.record_taken(head, owed);
                self.bytes_in_flight += u64::from(bytes);
                self.heads[usize::from(head)] = InFlightChain { in_flight: true, status_at, written, bytes };
                *room = push(Request { tag: u64::from(head), work });
            }
            ParsedChain::Complete { status, status_at, written } => {
                self.record_taken(head, owed);
                self.complete_chain(head, status, status_at, written);
            }
            ParsedChain::Return => {
                self.record_taken(head, owed);
                self.return_chain(head, 0);
            }
        }
        Ok(true)
    }

    /// From here on a successor would carry the chain out, if we were killed. One that we owe is on record already.
    fn record_taken(&mut self, head: u16, owed: bool) {
        if owed {
            return;
        }
        if let Some(record) = &mut self.record {
            record.record_taken(head);
        }
        self.ring.advance();
    }

    fn return_chain(&mut self, head: u16, written: u32) {
        self.ring.put_used(head, written);
        if let Some(record) = &mut self.record {
            record.record_completed(head);
        }
    }

    /// Gives the chain of a request that is over back to the driver, who sees it at the next [`Virtqueue::publish`].
    pub fn complete(&mut self, answer: Answer) {
        let head = u16::try_from(answer.tag).expect("a tag is a head");
        let slot = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(slot.in_flight, "every request is answered once");
        self.bytes_in_flight -= u64::from(slot.bytes);
        if let (Outcome::Failed, Some(memory)) = (answer.outcome, &answer.memory) {
            // The kernel reports a page that cannot be had as a failure; an access of ours marks the memory as lost.
            memory.touch_pages();
        }
        self.recycle(answer.memory);
        let (status, written) = match answer.outcome {
            Outcome::Done => (Status::Ok, slot.written),
            // V14: what a failed read left in the buffers does not count.
            Outcome::Failed => (Status::IoErr, 1),
            Outcome::Unsupported => (Status::Unsupp, 1),
        };
        self.complete_chain(head, status, slot.status_at, written);
    }

    /// The status byte goes after the data and before the used element.
    fn complete_chain(&mut self, head: u16, status: Status, status_at: u64, written: u32) {
        let there = self.view.write_byte(status_at, status as u8);
        assert!(there, "the place of a status was checked when its chain was taken");
        self.return_chain(head, written);
    }

    fn recycle(&mut self, memory: Option<GuestIovecs>) {
        // They keep the guest's memory mapped, no longer than `view` does.
        if let Some(slices) = memory {
            self.iovec_pool.push(slices);
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
#[path = "exchange_tests.rs"]
mod tests;
