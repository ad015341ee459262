//! Tests of `virtqueue.rs`.

use super::super::spec::{ID_LEN, kind};
use super::super::testing::{AVAIL, DATA, END, INDIRECT_FLAG, NEXT, SEAM, STATUS, TABLE, TestDriver, WRITE};
use super::*;
use crate::units::SectorRange;

const SERIAL: [u8; ID_LEN] = [b's'; ID_LEN];
const RULES: RequestRules<'static> = RequestRules { capacity: 1 << 20, read_only: false, features: 0, serial: &SERIAL };

/// A virtqueue with its driver, and the requests that a disk would have in flight.
struct TestVirtqueue {
    d: TestDriver,
    x: Virtqueue,
    disk: Vec<Request>,
    depth: usize,
}

impl TestVirtqueue {
    fn new(size: u16) -> TestVirtqueue {
        let d = TestDriver::new(size);
        let x = Virtqueue::new(d.view(), d.ring(false), None).unwrap();
        TestVirtqueue { d, x, disk: Vec::new(), depth: 1000 }
    }

    fn take(&mut self) -> PopResult {
        let (disk, depth) = (&mut self.disk, self.depth);
        self.x.pop_chains(&RULES, depth - disk.len(), |r| {
            disk.push(r);
            depth - disk.len()
        })
    }

    /// Adds a request of three descriptors, beginning with descriptor `3 * i`.
    fn ask(&mut self, i: u16, kind: u32, len: u32) {
        let header = self.d.header(i, kind, u64::from(i));
        let flag = if kind == kind::IN { WRITE } else { 0 };
        let status = STATUS + u64::from(i);
        self.d.put(status, &[0xff]);
        self.d.chain(TABLE, 3 * i, &[(header, 16, 0), (SEAM, len, flag), (status, 1, WRITE)]);
        self.d.add(3 * i);
    }

    /// Answers the oldest request.
    fn answer(&mut self, outcome: Outcome) {
        let request = self.disk.remove(0);
        self.x.complete(Answer { tag: request.tag, outcome, memory: data_memory(request.work) });
    }

    fn used(&mut self) -> Vec<(u32, u32)> {
        self.x.publish();
        self.d.used()
    }

    fn status(&self, i: u16) -> u8 {
        self.d.get(STATUS + u64::from(i), 1)[0]
    }

    /// Checks by a read that the ring still works.
    fn works(&mut self, i: u16) {
        self.ask(i, kind::IN, 512);
        assert_eq!(self.take(), PopResult::Empty);
        self.answer(Outcome::Done);
        assert_eq!((self.used(), self.status(i)), (vec![(3 * u32::from(i), 513)], 0));
    }
}

#[test]
fn requests_can_be_answered_in_any_order() {
    let mut b = TestVirtqueue::new(64);
    b.ask(0, kind::IN, 1024);
    b.ask(1, kind::OUT, 512);
    b.ask(2, kind::FLUSH, 0);
    b.ask(3, kind::GET_ID, 0);
    assert_eq!(b.take(), PopResult::Empty);
    assert_eq!(b.used(), [(9, 1)], "a request that needs no disk is complete");
    assert_eq!(b.disk.iter().map(|r| r.tag).collect::<Vec<_>>(), [0, 3, 6]);
    assert!(matches!(&b.disk[1].work, Work::Write { range, .. } if *range == SectorRange::new(1, 1).unwrap()));
    b.disk.rotate_left(1);
    for outcome in [Outcome::Unsupported, Outcome::Done, Outcome::Failed] {
        b.answer(outcome);
    }
    assert_eq!(b.used(), [(3, 1), (6, 1), (0, 1)], "a failed read has no data");
    assert_eq!([0, 1, 2, 3].map(|i| b.status(i)), [1, 2, 0, 0]);
    b.works(0);
    assert_eq!((b.x.bytes_in_flight, b.x.iovec_pool.len()), (0, 2), "iovecs are reused");
}

#[test]
fn an_invalid_chain_is_returned_and_the_ring_stays_in_service() {
    let mut b = TestVirtqueue::new(64);
    let header = b.d.header(0, kind::IN, 0);
    let table = |d: &TestDriver, descs: &[(u64, u32, u16, u16)]| {
        (30..).zip(descs).for_each(|(i, &desc)| d.desc(TABLE, i, desc));
    };
    let cases: [&[(u64, u32, u16, u16)]; 7] = [
        &[(header, 16, 0, 0)],                                // no status
        &[(header, 15, NEXT, 31), (STATUS, 1, WRITE, 0)],     // no header
        &[(header, 16, NEXT, 30)],                            // a loop
        &[(header, 16, NEXT, 64)],                            // out of the table
        &[(DATA, 16 * 65, INDIRECT_FLAG, 0)],                 // the table is too long
        &[(STATUS, 1, WRITE | NEXT, 31), (header, 16, 0, 0)], // the writable descriptor comes first
        &[(header, 16, NEXT, 31), (END, 1, WRITE, 0)],        // the status is not guest memory
    ];
    for (n, case) in cases.into_iter().enumerate() {
        table(&b.d, case);
        b.d.add(30);
        assert_eq!(b.take(), PopResult::Empty, "case {n}");
        assert_eq!(b.used(), [(30, 0)], "case {n}");
        assert!(b.disk.is_empty());
        b.works(1);
    }
    // Invalid requests with a valid status byte.
    b.ask(5, kind::IN, 513);
    b.ask(6, 77, 0);
    assert_eq!(b.take(), PopResult::Empty);
    assert_eq!((b.used(), b.status(5), b.status(6)), (vec![(15, 1), (18, 1)], 1, 2));
    b.works(1);
}

#[test]
fn a_head_in_flight_breaks_the_ring_and_requests_in_flight_complete() {
    let mut b = TestVirtqueue::new(64);
    b.ask(0, kind::IN, 512);
    b.ask(1, kind::IN, 512);
    b.d.add(0);
    assert_eq!(b.take(), PopResult::Broken);
    assert_eq!(b.x.broken(), Some(RingError::HeadInFlight));
    assert_eq!(b.disk.len(), 2);
    b.ask(2, kind::IN, 512);
    assert_eq!((b.take(), b.disk.len()), (PopResult::Broken, 2), "a broken ring stays broken");
    b.answer(Outcome::Done);
    b.answer(Outcome::Done);
    assert_eq!(b.used(), [(0, 513), (3, 513)]);
    assert_eq!(b.take(), PopResult::Broken);
}

#[test]
fn a_returned_head_may_be_added_again() {
    let mut b = TestVirtqueue::new(4);
    for _ in 0..100 {
        b.works(0);
    }
    // A head may occur twice in one batch if its first request needs no disk and so is never in flight.
    b.ask(0, kind::GET_ID, 0);
    b.ask(0, kind::GET_ID, 0);
    assert_eq!(b.take(), PopResult::Empty);
    assert_eq!(b.used().len(), 2);
}

#[test]
fn a_jump_and_a_bad_head_break_the_ring() {
    for (idx, head, rule) in
        [(65, 0, RingError::AvailIndexJump), (1, 64, RingError::BadHead), (u16::MAX, 0, RingError::AvailIndexJump)]
    {
        let mut b = TestVirtqueue::new(64);
        b.works(1);
        b.d.put_word(AVAIL + 4 + 2, head);
        b.d.put_word(AVAIL + 2, idx.wrapping_add(1));
        assert_eq!((b.take(), b.x.broken()), (PopResult::Broken, Some(rule)));
        b.d.put_word(AVAIL + 2, 1);
        assert_eq!(b.take(), PopResult::Broken, "the ring is not read again");
        assert_eq!(b.used(), []);
    }
}

#[test]
fn a_batch_is_bounded() {
    let mut b = TestVirtqueue::new(256);
    for _ in 0..41 {
        b.ask(0, kind::GET_ID, 0);
    }
    for taken in [16, 12, 6] {
        assert_eq!(
            (b.take(), b.used().len()),
            (PopResult::BatchFull, taken),
            "half of the available chains, at most 16"
        );
    }
    assert_eq!((b.take(), b.used().len()), (PopResult::BatchFull, 4), "at least 4");
    assert_eq!((b.take(), b.used().len()), (PopResult::Empty, 3));
    let much = u32::try_from(MAX_BATCH_BYTES).unwrap();
    (0..3).for_each(|i| b.ask(i, kind::IN, much / 2));
    assert_eq!((b.take(), b.disk.len()), (PopResult::BatchFull, 2), "a batch is bounded in bytes, too");
    assert_eq!((b.take(), b.disk.len()), (PopResult::Empty, 3));
}

#[test]
fn a_full_lane_leaves_chains_in_the_ring() {
    let mut b = TestVirtqueue::new(64);
    b.depth = 2;
    (0..5).for_each(|i| b.ask(i, kind::IN, 512));
    assert_eq!((b.take(), b.disk.len(), b.x.ring().next_avail()), (PopResult::NoCapacity, 2, 2));
    assert_eq!((b.take(), b.disk.len()), (PopResult::NoCapacity, 2));
    b.answer(Outcome::Done);
    assert_eq!((b.take(), b.disk.len()), (PopResult::NoCapacity, 2));
    b.answer(Outcome::Done);
    b.answer(Outcome::Done);
    assert_eq!((b.take(), b.disk.len()), (PopResult::Empty, 2));
    assert_eq!(b.used().len(), 3);
}

#[test]
fn bytes_in_flight_are_bounded() {
    let mut b = TestVirtqueue::new(64);
    let most = u32::try_from(MAX_BYTES).unwrap();
    b.ask(0, kind::IN, most);
    b.ask(1, kind::OUT, most - 512);
    b.ask(2, kind::IN, 512);
    b.ask(3, kind::IN, 512);
    b.ask(4, kind::FLUSH, 0);
    assert_eq!((b.take(), b.take()), (PopResult::BatchFull, PopResult::BatchFull));
    assert_eq!((b.take(), b.disk.len()), (PopResult::NoCapacity, 3), "exactly at the limit");
    assert_eq!((b.x.bytes_in_flight, b.x.iovec_pool.len()), (MAX_BYTES_IN_FLIGHT, 1));
    assert_eq!((b.take(), b.disk.len()), (PopResult::NoCapacity, 3));
    b.answer(Outcome::Failed);
    assert_eq!((b.take(), b.disk.len()), (PopResult::Empty, 4));
    (0..4).for_each(|_| b.answer(Outcome::Done));
    assert_eq!((b.x.bytes_in_flight, b.used().len()), (0, 5));
}

#[test]
fn overlapping_buffers_harm_only_the_guest() {
    let mut b = TestVirtqueue::new(64);
    // The status lies in the header, and the data buffer covers the descriptor table.
    let header = b.d.header(0, kind::IN, 0);
    b.d.chain(TABLE, 0, &[(header, 16, 0), (TABLE, 512, WRITE), (header, 1, WRITE)]);
    b.d.add(0);
    assert_eq!(b.take(), PopResult::Empty);
    let Work::Read { into, .. } = &b.disk[0].work else { panic!("a read") };
    into.copy_from(0, &[0xff; 512]);
    b.answer(Outcome::Done);
    assert_eq!((b.used(), b.d.get(header, 1)), (vec![(0, 513)], vec![0]));
    b.works(3);
}
