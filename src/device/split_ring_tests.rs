//! Tests of `split_ring.rs`.

use super::super::testing::{AVAIL, SEAM, TABLE, TestDriver, USED};
use super::*;

const USED_EVENT: u64 = AVAIL + 4 + 2 * 8;
const AVAIL_EVENT: u64 = USED + 4 + 8 * 8;

/// Creates a ring of 8 descriptors whose first interrupt, which is always required, was already sent.
fn ring(d: &TestDriver, event_idx: bool) -> SplitRing {
    let mut ring = d.ring(event_idx);
    assert!(ring.publish(), "the interrupt that a killed daemon may not have sent");
    assert!(!ring.publish());
    ring
}

#[test]
fn rings_are_checked_at_the_start() {
    let d = TestDriver::new(8);
    let good = d.layout();
    let new = |layout| SplitRing::new(&d.view(), layout, 64, false, 0).map(|_| ()).map_err(|e| e.kind());
    let bad = Err(ErrorKind::Invalid);
    assert_eq!(new(good), Ok(()));
    for size in [1, 2, 64] {
        assert_eq!(new(RingLayout { size, ..good }), Ok(()), "{size}");
    }
    for size in [0, 3, 12, 63, 65, 128, 32768, u16::MAX] {
        assert_eq!(new(RingLayout { size, ..good }), bad, "{size}");
    }
    assert_eq!(new(RingLayout { table: TABLE + 8, ..good }), bad);
    assert_eq!(new(RingLayout { avail: AVAIL + 1, ..good }), bad);
    assert_eq!(new(RingLayout { avail: AVAIL + 2, ..good }), Ok(()));
    assert_eq!(new(RingLayout { used: USED + 2, ..good }), bad);
    assert_eq!(new(RingLayout { used: USED + 4, ..good }), Ok(()));
    // Each part may reach up to the last byte of a region, but not into the next region. The three parts have 128, 22
    // and 70 bytes.
    assert_eq!(new(RingLayout { table: SEAM - 128, ..good }), Ok(()));
    assert_eq!(new(RingLayout { table: SEAM - 112, ..good }), bad);
    assert_eq!(new(RingLayout { avail: SEAM - 22, ..good }), Ok(()));
    assert_eq!(new(RingLayout { avail: SEAM - 20, ..good }), bad);
    assert_eq!(new(RingLayout { used: SEAM - 72, ..good }), Ok(()));
    assert_eq!(new(RingLayout { used: SEAM - 68, ..good }), bad);
    for lost in [u64::MAX - 15, 1 << 60] {
        assert_eq!(new(RingLayout { table: lost, ..good }), bad);
    }
}

#[test]
fn the_avail_index_may_not_jump() {
    let d = TestDriver::new(8);
    let mut ring = d.ring(false);
    for next in [0u16, 1, 7, u16::MAX] {
        while ring.next_avail() != next {
            ring.advance();
        }
        for (there, want) in [
            (0, Ok(0)),
            (1, Ok(1)),
            (8, Ok(8)),
            (9, Err(RingError::AvailIndexJump)),
            (u16::MAX, Err(RingError::AvailIndexJump)),
        ] {
            d.put_word(AVAIL + 2, next.wrapping_add(there));
            assert_eq!(ring.available(), want, "{there} after {next}");
        }
    }
}

#[test]
fn heads_are_descriptors() {
    let d = TestDriver::new(8);
    let ring = d.ring(false);
    for (head, want) in [(0, Ok(0)), (7, Ok(7)), (8, Err(RingError::BadHead)), (u16::MAX, Err(RingError::BadHead))] {
        d.put_word(AVAIL + 4, head);
        assert_eq!(ring.head(), want);
    }
    // A prefetch accepts any head.
    d.desc(TABLE, 3, (0x1234, 5, 0, 0));
    for (n, head, want) in [(1, 3, 0x1234), (8, u16::MAX, 0), (9, 3, 0x1234)] {
        d.put_word(AVAIL + 4 + n % 8 * 2, head);
        let n = u16::try_from(n).unwrap();
        ring.prefetch_descriptor(n);
        assert_eq!(ring.header_addr_hint(n), want, "{head} in entry {n}");
    }
}

#[test]
fn a_batch_is_published_as_a_whole_and_wraps() {
    let mut d = TestDriver::new(8);
    // Both rings have been used, as after a reconnection.
    d.put_word(USED + 2, u16::MAX - 1);
    d.seen = u16::MAX - 1;
    let mut ring = SplitRing::new(&d.view(), d.layout(), 8, false, u16::MAX).unwrap();
    assert_eq!((ring.next_avail(), ring.next_used()), (u16::MAX, u16::MAX - 1));
    for i in 0..5u16 {
        ring.put_used(i, u32::from(i) * 100);
        assert_eq!(d.used(), [], "not before publish");
    }
    ring.publish();
    assert_eq!(d.used(), [(0, 0), (1, 100), (2, 200), (3, 300), (4, 400)]);
    assert_eq!(ring.next_used(), 3);
}

#[test]
fn interrupts_follow_used_event() {
    let d = TestDriver::new(8);
    let mut ring = ring(&d, true);
    d.put_word(AVAIL, AVAIL_NO_INTERRUPT);
    let mut give = |n: u16, event: u16| {
        d.put_word(USED_EVENT, event);
        (0..n).for_each(|_| ring.put_used(0, 0));
        ring.publish()
    };
    assert!(give(1, 0), "the flag has no effect with EVENT_IDX");
    assert!(!give(0, 1), "nothing new");
    assert!(!give(1, 2), "element 1 was added, used_event is 2");
    assert!(give(3, 2), "used_event is in the middle of the batch");
    assert!(!give(2, 2), "used_event lies before the batch");
    assert!(give(1, 7), "used_event is the last element");
    for _ in 0..(u16::MAX - 8) / 7 {
        give(7, 0);
    }
    assert!(give(14, 2), "used_event after the wrap");
}

#[test]
fn interrupts_follow_the_flag_without_event_idx() {
    let d = TestDriver::new(8);
    let mut ring = ring(&d, false);
    d.put_word(USED_EVENT, 1000);
    ring.put_used(0, 0);
    assert!(ring.publish());
    d.put_word(AVAIL, AVAIL_NO_INTERRUPT);
    ring.put_used(0, 0);
    assert!(!ring.publish());
}

#[test]
fn kicks_are_enabled_and_disabled() {
    let mut d = TestDriver::new(8);
    let mut plain = ring(&d, false);
    plain.disable_kicks();
    assert_eq!(d.word(USED), USED_NO_NOTIFY);
    assert!(!plain.enable_kicks());
    assert_eq!(d.word(USED), 0);
    d.add(3);
    assert!(plain.enable_kicks(), "it was added before kicks were enabled");
    plain.advance();
    assert!(!plain.enable_kicks());

    let mut event = ring(&d, true);
    d.put_word(AVAIL_EVENT, 77);
    event.disable_kicks();
    assert_eq!((d.word(USED), d.word(AVAIL_EVENT)), (0, 77));
    assert!(event.enable_kicks());
    event.advance();
    assert!(!event.enable_kicks());
    assert_eq!(d.word(AVAIL_EVENT), 1);
}
