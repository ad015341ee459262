//! One ring's traffic: chains in, requests out; answers in, used elements out; and which heads are in flight.
//!
//! Knows neither lane nor event fds, so that every rule of a ring can be tried without a disk.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, compiler_fence};

use super::chain::Chain;
use super::guest::View;
use super::inflight::Record;
use super::parse::{MAX_BYTES, Rules, Verdict, parse};
use super::ring::{Broken, Ring};
use super::spec::Status;
use crate::disk::{Answer, Outcome, Request, Work};
use crate::error::{Error, ErrorKind};
use crate::storage::{GuestIovecs, sigbus};

/// Most chains taken in one turn (V17), and what a turn takes at least where there is as much. In between it is half of
/// what there is: the driver sees the first answers, and goes to work on them, while the rest of its queue is served.
/// With all of a queue in one turn the two work one after the other (figures in `disk/lane.rs`).
pub const TURN: u16 = 16;
const LEAST_TURN: u16 = 4;
/// Bytes of reads and writes after which a turn takes no more chains, for the same reason.
pub const TURN_BYTES: u64 = 512 << 10;
/// Most bytes of reads and writes in flight for one queue (V15). They are the guest's own memory, so this bounds how
/// far one queue gets ahead of the others, not what it costs us; it is more than one request may have.
pub const MAX_BYTES_IN_FLIGHT: u64 = 2 * MAX_BYTES;

/// Why no more chains were taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pause {
    /// There are none.
    Empty,
    /// The turn is over (V17).
    Turn,
    /// The lane or the bytes in flight are at their limit; answers will make room (V15).
    Full,
    /// The ring is broken (V2, V3), now or since earlier.
    Broken,
}

/// What is to be done when a head's request is over.
#[derive(Clone, Copy, Default)]
struct InFlight {
    taken: bool,
    status_at: u64,
    /// If all goes well, status included.
    written: u32,
    bytes: u32,
}

/// A ring in service.
pub struct Exchange {
    view: View,
    ring: Ring,
    /// By head: a request's tag is its head.
    heads: Vec<InFlight>,
    bytes: u64,
    chain: Chain,
    spare: Vec<GuestIovecs>,
    broken: Option<Broken>,
    record: Option<Record>,
    /// Heads that a predecessor had in flight when it was killed, to be carried out before any other.
    owed: VecDeque<u16>,
    /// [`sigbus::losses`] when it was last found that nothing of this ring's memory is lost.
    losses: u32,
}

impl Exchange {
    /// Goes on where the ring says, with nothing in flight; or, with a record, where that and the used ring say, with
    /// what a predecessor took and did not give back.
    ///
    /// # Errors
    /// As [`Record::resume`].
    pub fn new(view: View, mut ring: Ring, mut record: Option<Record>) -> crate::error::Result<Exchange> {
        let mut owed = VecDeque::new();
        if let Some(record) = &mut record {
            // An index of zeros of ours would wipe marks of requests that are in flight.
            if view.is_lost() || record.is_lost() {
                let what = "a page of the guest's memory cannot be had";
                return Err(Error::new(ErrorKind::Io, what));
            }
            owed = record.resume(ring.size(), ring.next_used())?.into();
            ring.resume(u16::try_from(owed.len()).expect("a head is in flight once"));
        }
        let heads = vec![InFlight::default(); usize::from(ring.size())];
        let (chain, spare) = (Chain::default(), Vec::new());
        // Losses are not counted from here: a page may have been lost already.
        Ok(Exchange { view, ring, heads, bytes: 0, chain, spare, broken: None, record, owed, losses: 0 })
    }

    /// Whether a page of the guest's memory, or of the record, could not be had. While no page of any mapping is lost, this
    /// is a load and a comparison.
    #[inline]
    fn is_memory_lost(&mut self) -> bool {
        let losses = sigbus::loss_count();
        losses != self.losses && self.find_loss(losses)
    }

    #[cold]
    fn find_loss(&mut self, losses: u32) -> bool {
        let lost = self.view.is_lost() || self.record.as_ref().is_some_and(Record::is_lost);
        if lost {
            self.broken = Some(Broken::Lost);
        } else {
            // Those of other guests.
            self.losses = losses;
        }
        lost
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Whether the ring looks as if no driver had used it: all indices are zero.
    pub fn is_blank(&self) -> bool {
        self.ring.next_avail() == 0 && self.ring.next_used() == 0 && self.left() == 0
    }

    /// Chains left by a predecessor that are not begun yet.
    pub fn owed(&self) -> usize {
        self.owed.len()
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
            record.settle(self.ring.next_used());
        }
        wanted
    }

    /// The rule that the driver broke, once it did.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Chains that the driver has added and that were not taken.
    pub fn left(&self) -> u16 {
        self.ring.available().unwrap_or(0)
    }

    /// Takes chains, at most [`TURN`], while there is room for requests; `push` takes one and says how many more there
    /// is room for. What needs no disk is answered at once.
    pub fn take(&mut self, rules: &Rules<'_>, room: usize, push: impl FnMut(Request) -> usize) -> Pause {
        if self.broken.is_some() {
            return Pause::Broken;
        }
        self.try_take(rules, room, push).unwrap_or_else(|broken| {
            // Zeros of ours look like a driver's mistake.
            if !self.is_memory_lost() {
                self.broken = Some(broken);
            }
            Pause::Broken
        })
    }

    /// Begins what a predecessor left, at most [`TURN`] chains or [`TURN_BYTES`], as [`Exchange::take`] does with new ones.
    pub fn take_owed(&mut self, rules: &Rules<'_>, mut room: usize, mut push: impl FnMut(Request) -> usize) -> Pause {
        let enough = self.bytes + TURN_BYTES;
        for _ in 0..TURN {
            let Some(&head) = self.owed.front() else { return Pause::Empty };
            if self.bytes >= enough {
                return Pause::Turn;
            }
            if room == 0 {
                return Pause::Full;
            }
            match self.begin(head, true, rules, &mut room, &mut push) {
                Ok(true) => self.owed.pop_front(),
                Ok(false) => return Pause::Full,
                Err(_) => return Pause::Broken,
            };
        }
        if self.owed.is_empty() { Pause::Empty } else { Pause::Turn }
    }

    fn try_take(
        &mut self,
        rules: &Rules<'_>,
        mut room: usize,
        mut push: impl FnMut(Request) -> usize,
    ) -> Result<Pause, Broken> {
        assert!(self.owed.is_empty(), "what a predecessor left comes before all else");
        let available = self.ring.available()?;
        let (turn, enough) = ((available / 2).clamp(LEAST_TURN, TURN), self.bytes + TURN_BYTES);
        let count = available.min(turn);
        self.fetch(count);
        for _ in 0..count {
            if self.bytes >= enough {
                return Ok(Pause::Turn);
            }
            if room == 0 {
                return Ok(Pause::Full);
            }
            let head = self.ring.head()?;
            if self.heads[usize::from(head)].taken {
                return Err(Broken::Twice);
            }
            if !self.begin(head, false, rules, &mut room, &mut push)? {
                return Ok(Pause::Full);
            }
        }
        Ok(if available > turn { Pause::Turn } else { Pause::Empty })
    }

    /// Has the processor fetch the descriptors and headers of a turn all at once: the driver's processor wrote them, so
    /// each is a miss (reads of 4 KiB, 16 layers: 798,000 a second without, 882,000 with).
    fn fetch(&self, count: u16) {
        if count > 1 {
            (0..count).for_each(|behind| self.ring.fetch(behind));
            (0..count).for_each(|behind| self.view.fetch(self.ring.hint(behind)));
        }
    }

    /// Takes a chain, unless the bytes in flight are at their limit, and begins what it asks for.
    ///
    /// # Errors
    /// `Lost`: nothing may follow from a request that is made of zeros of ours.
    fn begin(
        &mut self,
        head: u16,
        owed: bool,
        rules: &Rules<'_>,
        room: &mut usize,
        push: &mut impl FnMut(Request) -> usize,
    ) -> Result<bool, Broken> {
        let walked = self.chain.walk(&self.view, self.ring.table(), self.ring.size(), head);
        if self.is_memory_lost() {
            return Err(Broken::Lost);
        }
        if walked.is_err() {
            // V4: the head is known, so the driver gets it back, and the ring goes on.
            self.taken(head, owed);
            self.give(head, 0);
            return Ok(true);
        }
        let verdict = parse(&self.chain, &self.view, rules, &mut self.spare);
        if self.is_memory_lost() {
            return Err(Broken::Lost);
        }
        match verdict {
            Verdict::Work { work, status_at, written } => {
                let bytes = bytes_of(&work);
                if self.bytes + u64::from(bytes) > MAX_BYTES_IN_FLIGHT {
                    // It stays where it is and is looked at afresh when answers have made room.
                    self.recycle(memory_of(work));
                    return Ok(false);
                }
                self.taken(head, owed);
                self.bytes += u64::from(bytes);
                self.heads[usize::from(head)] = InFlight { taken: true, status_at, written, bytes };
                *room = push(Request { tag: u64::from(head), work });
            }
            Verdict::Answer { status, status_at, written } => {
                self.taken(head, owed);
                self.finish(head, status, status_at, written);
            }
            Verdict::Return => {
                self.taken(head, owed);
                self.give(head, 0);
            }
        }
        Ok(true)
    }

    /// From here on a successor would carry the chain out, if we were killed. One that we owe is on record already.
    fn taken(&mut self, head: u16, owed: bool) {
        if owed {
            return;
        }
        if let Some(record) = &mut self.record {
            record.take(head);
        }
        self.ring.advance();
    }

    fn give(&mut self, head: u16, written: u32) {
        self.ring.put_used(head, written);
        if let Some(record) = &mut self.record {
            record.give(head);
        }
    }

    /// Gives the chain of a request that is over back to the driver, who sees it at the next [`Exchange::publish`].
    pub fn complete(&mut self, answer: Answer) {
        let head = u16::try_from(answer.tag).expect("a tag is a head");
        let slot = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(slot.taken, "every request is answered once");
        self.bytes -= u64::from(slot.bytes);
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
        self.finish(head, status, slot.status_at, written);
    }

    /// The status byte goes after the data and before the used element.
    fn finish(&mut self, head: u16, status: Status, status_at: u64, written: u32) {
        let there = self.view.write_byte(status_at, status as u8);
        assert!(there, "the place of a status was checked when its chain was taken");
        self.give(head, written);
    }

    fn recycle(&mut self, memory: Option<GuestIovecs>) {
        // They keep the guest's memory mapped, no longer than `view` does.
        if let Some(slices) = memory {
            self.spare.push(slices);
        }
    }
}

fn bytes_of(work: &Work) -> u32 {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => u32::try_from(s.len()).expect("at most 32 MiB"),
        Work::Flush | Work::Prefetch { .. } | Work::Discard { .. } | Work::WriteZeroes { .. } => 0,
    }
}

fn memory_of(work: Work) -> Option<GuestIovecs> {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => Some(s),
        Work::Flush | Work::Prefetch { .. } | Work::Discard { .. } | Work::WriteZeroes { .. } => None,
    }
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
