//! One ring's traffic: chains in, requests out; answers in, used elements out; and which heads are in flight.
//!
//! Knows neither lane nor event fds, so that every rule of a ring can be tried without a disk.

use super::chain::Chain;
use super::guest::View;
use super::parse::{MAX_BYTES, Rules, Verdict, parse};
use super::ring::{Broken, Ring};
use super::spec::Status;
use crate::disk::{Answer, Outcome, Request, Work};
use crate::storage::Slices;

/// Most chains taken in one turn (V17).
pub const TURN: u16 = 64;
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
    spare: Vec<Slices>,
    broken: Option<Broken>,
}

impl Exchange {
    /// Nothing is in flight.
    pub fn new(view: View, ring: Ring) -> Exchange {
        let heads = vec![InFlight::default(); usize::from(ring.size())];
        Exchange { view, ring, heads, bytes: 0, chain: Chain::default(), spare: Vec::new(), broken: None }
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// The rule that the driver broke, once it did.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Takes chains, at most [`TURN`], while there is room for requests; `push` takes one and says how many more there
    /// is room for. What needs no disk is answered at once.
    pub fn take(&mut self, rules: &Rules<'_>, room: usize, push: impl FnMut(Request) -> usize) -> Pause {
        if self.broken.is_some() {
            return Pause::Broken;
        }
        self.try_take(rules, room, push).unwrap_or_else(|broken| {
            self.broken = Some(broken);
            Pause::Broken
        })
    }

    fn try_take(
        &mut self,
        rules: &Rules<'_>,
        mut room: usize,
        mut push: impl FnMut(Request) -> usize,
    ) -> Result<Pause, Broken> {
        let available = self.ring.available()?;
        for _ in 0..available.min(TURN) {
            if room == 0 {
                return Ok(Pause::Full);
            }
            let head = self.ring.head()?;
            if self.heads[usize::from(head)].taken {
                return Err(Broken::Twice);
            }
            if self.chain.walk(&self.view, self.ring.table(), self.ring.size(), head).is_err() {
                // V4: the head is known, so the driver gets it back, and the ring goes on.
                self.ring.advance();
                self.ring.put_used(head, 0);
                continue;
            }
            match parse(&self.chain, &self.view, rules, &mut self.spare) {
                Verdict::Work { work, status_at, written } => {
                    let bytes = bytes_of(&work);
                    if self.bytes + u64::from(bytes) > MAX_BYTES_IN_FLIGHT {
                        // It stays in the avail ring and is looked at afresh when answers have made room.
                        self.recycle(memory_of(work));
                        return Ok(Pause::Full);
                    }
                    self.ring.advance();
                    self.bytes += u64::from(bytes);
                    self.heads[usize::from(head)] = InFlight { taken: true, status_at, written, bytes };
                    room = push(Request { tag: u64::from(head), work });
                }
                Verdict::Answer { status, status_at, written } => {
                    self.ring.advance();
                    self.finish(head, status, status_at, written);
                }
                Verdict::Return => {
                    self.ring.advance();
                    self.ring.put_used(head, 0);
                }
            }
        }
        Ok(if available > TURN { Pause::Turn } else { Pause::Empty })
    }

    /// Gives the chain of a request that is over back to the driver, who sees it at the next [`Ring::publish`].
    pub fn complete(&mut self, answer: Answer) {
        let head = u16::try_from(answer.tag).expect("a tag is a head");
        let slot = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(slot.taken, "every request is answered once");
        self.bytes -= u64::from(slot.bytes);
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
        self.ring.put_used(head, written);
    }

    fn recycle(&mut self, memory: Option<Slices>) {
        if let Some(mut slices) = memory {
            // Not a moment longer than needed do they keep memory mapped that the front-end may have taken back.
            slices.clear();
            self.spare.push(slices);
        }
    }
}

fn bytes_of(work: &Work) -> u32 {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => u32::try_from(s.len()).expect("at most 32 MiB"),
        Work::Flush | Work::Discard { .. } | Work::WriteZeroes { .. } => 0,
    }
}

fn memory_of(work: Work) -> Option<Slices> {
    match work {
        Work::Read { into: s, .. } | Work::Write { from: s, .. } => Some(s),
        Work::Flush | Work::Discard { .. } | Work::WriteZeroes { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{AVAIL, DATA, Driver, END, INDIRECT_FLAG, NEXT, SEAM, STATUS, TABLE, WRITE};
    use super::super::spec::{ID_LEN, kind};
    use super::*;
    use crate::units::SectorRange;

    const SERIAL: [u8; ID_LEN] = [b's'; ID_LEN];
    const RULES: Rules<'static> = Rules { capacity: 1 << 20, read_only: false, features: 0, serial: &SERIAL };

    /// A ring, and a disk that keeps its requests until told.
    struct Bench {
        d: Driver,
        x: Exchange,
        disk: Vec<Request>,
        depth: usize,
    }

    impl Bench {
        fn new(size: u16) -> Bench {
            let d = Driver::new(size);
            let x = Exchange::new(d.view(), d.ring(false));
            Bench { d, x, disk: Vec::new(), depth: 1000 }
        }

        fn take(&mut self) -> Pause {
            let (disk, depth) = (&mut self.disk, self.depth);
            self.x.take(&RULES, depth - disk.len(), |r| {
                disk.push(r);
                depth - disk.len()
            })
        }

        /// Puts a one-descriptor-a-part request at descriptors `3 * i ..` and adds it.
        fn ask(&mut self, i: u16, kind: u32, len: u32) {
            let header = self.d.header(i, kind, u64::from(i));
            let flag = if kind == kind::IN { WRITE } else { 0 };
            let status = STATUS + u64::from(i);
            self.d.put(status, &[0xff]);
            self.d.chain(TABLE, 3 * i, &[(header, 16, 0), (SEAM, len, flag), (status, 1, WRITE)]);
            self.d.add(3 * i);
        }

        /// The disk answers its oldest request.
        fn answer(&mut self, outcome: Outcome) {
            let request = self.disk.remove(0);
            self.x.complete(Answer { tag: request.tag, outcome, memory: memory_of(request.work) });
        }

        fn used(&mut self) -> Vec<(u32, u32)> {
            self.x.ring().publish();
            self.d.used()
        }

        fn status(&self, i: u16) -> u8 {
            self.d.get(STATUS + u64::from(i), 1)[0]
        }

        /// The ring still works: a read goes through from end to end.
        fn works(&mut self, i: u16) {
            self.ask(i, kind::IN, 512);
            assert_eq!(self.take(), Pause::Empty);
            self.answer(Outcome::Done);
            assert_eq!((self.used(), self.status(i)), (vec![(3 * u32::from(i), 513)], 0));
        }
    }

    #[test]
    fn requests_go_to_the_disk_and_answers_come_back_in_any_order() {
        let mut b = Bench::new(64);
        b.ask(0, kind::IN, 1024);
        b.ask(1, kind::OUT, 512);
        b.ask(2, kind::FLUSH, 0);
        b.ask(3, kind::GET_ID, 0);
        assert_eq!(b.take(), Pause::Empty);
        assert_eq!(b.used(), [(9, 1)], "what needs no disk is over");
        assert_eq!(b.disk.iter().map(|r| r.tag).collect::<Vec<_>>(), [0, 3, 6]);
        assert!(matches!(&b.disk[1].work, Work::Write { range, .. } if *range == SectorRange::new(1, 1).unwrap()));
        b.disk.rotate_left(1);
        for outcome in [Outcome::Unsupported, Outcome::Done, Outcome::Failed] {
            b.answer(outcome);
        }
        assert_eq!(b.used(), [(3, 1), (6, 1), (0, 1)], "a failed read says nothing of its data");
        assert_eq!([0, 1, 2, 3].map(|i| b.status(i)), [1, 2, 0, 0]);
        b.works(0);
        assert_eq!((b.x.bytes, b.x.spare.len()), (0, 2), "memory is used again");
    }

    #[test]
    fn a_bad_chain_comes_back_and_the_ring_goes_on() {
        let mut b = Bench::new(64);
        let header = b.d.header(0, kind::IN, 0);
        let table = |d: &Driver, descs: &[(u64, u32, u16, u16)]| {
            (30..).zip(descs).for_each(|(i, &desc)| d.desc(TABLE, i, desc));
        };
        let cases: [&[(u64, u32, u16, u16)]; 7] = [
            &[(header, 16, 0, 0)],                                // no status
            &[(header, 15, NEXT, 31), (STATUS, 1, WRITE, 0)],     // no header
            &[(header, 16, NEXT, 30)],                            // a loop
            &[(header, 16, NEXT, 64)],                            // out of the table
            &[(DATA, 16 * 65, INDIRECT_FLAG, 0)],                 // too long a table
            &[(STATUS, 1, WRITE | NEXT, 31), (header, 16, 0, 0)], // the wrong way round
            &[(header, 16, NEXT, 31), (END, 1, WRITE, 0)],        // nowhere to answer to
        ];
        for (n, case) in cases.into_iter().enumerate() {
            table(&b.d, case);
            b.d.add(30);
            assert_eq!(b.take(), Pause::Empty, "case {n}");
            assert_eq!(b.used(), [(30, 0)], "case {n}");
            assert!(b.disk.is_empty());
            b.works(1);
        }
        // Bad, but with a place to say so.
        b.ask(5, kind::IN, 513);
        b.ask(6, 77, 0);
        assert_eq!(b.take(), Pause::Empty);
        assert_eq!((b.used(), b.status(5), b.status(6)), (vec![(15, 1), (18, 1)], 1, 2));
        b.works(1);
    }

    #[test]
    fn a_head_in_flight_breaks_the_ring_and_what_is_in_flight_completes() {
        let mut b = Bench::new(64);
        b.ask(0, kind::IN, 512);
        b.ask(1, kind::IN, 512);
        b.d.add(0);
        assert_eq!(b.take(), Pause::Broken);
        assert_eq!(b.x.broken(), Some(Broken::Twice));
        assert_eq!(b.disk.len(), 2);
        b.ask(2, kind::IN, 512);
        assert_eq!((b.take(), b.disk.len()), (Pause::Broken, 2), "latched");
        b.answer(Outcome::Done);
        b.answer(Outcome::Done);
        assert_eq!(b.used(), [(0, 513), (3, 513)]);
        assert_eq!(b.take(), Pause::Broken);
    }

    #[test]
    fn a_head_may_come_again_once_it_was_given_back() {
        let mut b = Bench::new(4);
        for _ in 0..100 {
            b.works(0);
        }
        // Also within one turn, where it never was in flight.
        b.ask(0, kind::GET_ID, 0);
        b.ask(0, kind::GET_ID, 0);
        assert_eq!(b.take(), Pause::Empty);
        assert_eq!(b.used().len(), 2);
    }

    #[test]
    fn a_jump_and_a_bad_head_break_the_ring() {
        for (idx, head, rule) in [(65, 0, Broken::Jump), (1, 64, Broken::Head), (u16::MAX, 0, Broken::Jump)] {
            let mut b = Bench::new(64);
            b.works(1);
            b.d.put_word(AVAIL + 4 + 2, head);
            b.d.put_word(AVAIL + 2, idx.wrapping_add(1));
            assert_eq!((b.take(), b.x.broken()), (Pause::Broken, Some(rule)));
            b.d.put_word(AVAIL + 2, 1);
            assert_eq!(b.take(), Pause::Broken, "it is not looked at again");
            assert_eq!(b.used(), []);
        }
    }

    #[test]
    fn a_turn_is_bounded() {
        let mut b = Bench::new(256);
        for _ in 0..65 {
            b.ask(0, kind::GET_ID, 0);
        }
        assert_eq!((b.take(), b.used().len()), (Pause::Turn, 64));
        assert_eq!((b.take(), b.used().len()), (Pause::Empty, 1));
        for _ in 0..64 {
            b.ask(0, kind::GET_ID, 0);
        }
        assert_eq!((b.take(), b.used().len()), (Pause::Empty, 64));
    }

    #[test]
    fn a_full_lane_leaves_chains_in_the_ring() {
        let mut b = Bench::new(64);
        b.depth = 2;
        (0..5).for_each(|i| b.ask(i, kind::IN, 512));
        assert_eq!((b.take(), b.disk.len(), b.x.ring().next_avail()), (Pause::Full, 2, 2));
        assert_eq!((b.take(), b.disk.len()), (Pause::Full, 2));
        b.answer(Outcome::Done);
        assert_eq!((b.take(), b.disk.len()), (Pause::Full, 2));
        b.answer(Outcome::Done);
        b.answer(Outcome::Done);
        assert_eq!((b.take(), b.disk.len()), (Pause::Empty, 2));
        assert_eq!(b.used().len(), 3);
    }

    #[test]
    fn bytes_in_flight_are_bounded() {
        let mut b = Bench::new(64);
        let most = u32::try_from(MAX_BYTES).unwrap();
        b.ask(0, kind::IN, most);
        b.ask(1, kind::OUT, most - 512);
        b.ask(2, kind::IN, 512);
        b.ask(3, kind::IN, 512);
        b.ask(4, kind::FLUSH, 0);
        assert_eq!((b.take(), b.disk.len()), (Pause::Full, 3), "exactly at the limit");
        assert_eq!((b.x.bytes, b.x.spare.len()), (MAX_BYTES_IN_FLIGHT, 1));
        assert_eq!((b.take(), b.disk.len()), (Pause::Full, 3));
        b.answer(Outcome::Failed);
        assert_eq!((b.take(), b.disk.len()), (Pause::Empty, 4));
        (0..4).for_each(|_| b.answer(Outcome::Done));
        assert_eq!((b.x.bytes, b.used().len()), (0, 5));
    }

    #[test]
    fn overlaps_hurt_only_the_guest() {
        let mut b = Bench::new(64);
        // The status lies in the header, the data over the descriptor table and the avail ring's element.
        let header = b.d.header(0, kind::IN, 0);
        b.d.chain(TABLE, 0, &[(header, 16, 0), (TABLE, 512, WRITE), (header, 1, WRITE)]);
        b.d.add(0);
        assert_eq!(b.take(), Pause::Empty);
        let Work::Read { into, .. } = &b.disk[0].work else { panic!("a read") };
        into.copy_from(0, &[0xff; 512]);
        b.answer(Outcome::Done);
        assert_eq!((b.used(), b.d.get(header, 1)), (vec![(0, 513)], vec![0]));
        b.works(3);
    }
}
