//! Tests of `parse.rs`.

use super::super::testing::{DATA, END, SEAM, STATUS, TestDriver, WRITE};
use super::*;

const CAPACITY: u64 = 1 << 20;
const SERIAL: &[u8; ID_LEN] = b"0123456789abcdef\0\0\0\0";
const ALL: u64 = feature::DISCARD | feature::WRITE_ZEROES;

fn rules() -> RequestRules<'static> {
    RequestRules { capacity: CAPACITY, read_only: false, features: ALL, serial: SERIAL }
}

fn judge_by(d: &TestDriver, rules: &RequestRules<'_>, pieces: &[(u64, u32, u16)]) -> ParsedChain {
    parse(&d.walked(pieces), &d.view(), rules, &mut Vec::new())
}

/// Parses a request whose status is at `STATUS`.
fn ask(d: &TestDriver, rules: &RequestRules<'_>, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> ParsedChain {
    let mut pieces = vec![(d.header(0, kind, sector), 16, 0)];
    pieces.extend(data);
    pieces.push((STATUS, 1, WRITE));
    judge_by(d, rules, &pieces)
}

fn answer(verdict: ParsedChain) -> Option<(Status, u32)> {
    match verdict {
        ParsedChain::Complete { status, status_at, written } => {
            assert_eq!(status_at, STATUS);
            Some((status, written))
        }
        ParsedChain::Submit { .. } | ParsedChain::Return => None,
    }
}

const IO_ERR: Option<(Status, u32)> = Some((Status::IoErr, 1));
const UNSUPP: Option<(Status, u32)> = Some((Status::Unsupp, 1));
const OK: Option<(Status, u32)> = Some((Status::Ok, 1));

#[test]
fn reads_and_writes() {
    let d = TestDriver::new(64);
    let data = [(DATA, 512, WRITE), (SEAM - 512, 1024, WRITE)];
    let ParsedChain::Submit { work: Work::Read { range, into }, status_at, written } =
        ask(&d, &rules(), kind::IN, 7, &data)
    else {
        panic!("a read")
    };
    assert_eq!((range, status_at, written), (SectorRange::new(7, 3).unwrap(), STATUS, 1537));
    into.copy_from(510, b"abcd");
    into.copy_from(1022, b"efgh");
    assert_eq!(
        (d.get(DATA + 510, 2), d.get(SEAM - 512, 2), d.get(SEAM - 2, 4)),
        (b"ab".into(), b"cd".into(), b"efgh".into())
    );

    d.put(DATA + 3, b"x");
    let data = [(DATA, 512, 0), (0, 0, 0)];
    let ParsedChain::Submit { work: Work::Write { range, from }, written, .. } =
        ask(&d, &rules(), kind::OUT, CAPACITY - 1, &data)
    else {
        panic!("a write")
    };
    assert_eq!((range.start(), range.count(), written), (CAPACITY - 1, 1, 1));
    let mut x = [0];
    from.copy_to(3, &mut x);
    assert_eq!(&x, b"x");
}

#[test]
fn the_header_may_span_any_number_of_descriptors() {
    let d = TestDriver::new(64);
    let at = d.header(0, kind::OUT, 9);
    let mut pieces: Vec<_> = (0..15).map(|i| (at + i, 1, 0)).collect();
    pieces.insert(7, (END, 0, 0));
    // One descriptor contains the last byte of the header and the data.
    d.put(DATA - 1, &d.get(at + 15, 1));
    d.put(DATA, b"y");
    pieces.push((DATA - 1, 513, 0));
    pieces.push((STATUS, 1, WRITE));
    let ParsedChain::Submit { work: Work::Write { range, from }, .. } = judge_by(&d, &rules(), &pieces) else {
        panic!("a write")
    };
    assert_eq!((range.start(), range.count(), from.len()), (9, 1, 512));
    let mut y = [0];
    from.copy_to(0, &mut y);
    assert_eq!(&y, b"y");
    // A header that is one byte short: the chain is returned.
    let short = [(at, 15, 0), (STATUS, 1, WRITE)];
    assert!(matches!(judge_by(&d, &rules(), &short), ParsedChain::Return));
    assert!(matches!(judge_by(&d, &rules(), &[(STATUS, 1, WRITE)]), ParsedChain::Return));
    // The header is not guest memory, but the status is.
    assert_eq!(answer(judge_by(&d, &rules(), &[(END - 15, 16, 0), (STATUS, 1, WRITE)])), IO_ERR);
}

#[test]
fn the_status_is_the_last_writable_byte() {
    let d = TestDriver::new(64);
    let header = (d.header(0, kind::IN, 0), 16, 0);
    // The status is the last byte of the descriptor with the data, after the border of two regions. Empty descriptors
    // follow.
    let pieces = [header, (SEAM - 512, 513, WRITE), (END, 0, WRITE), (u64::MAX, 0, WRITE)];
    let ParsedChain::Submit { work: Work::Read { into, .. }, status_at, written } = judge_by(&d, &rules(), &pieces)
    else {
        panic!("a read")
    };
    assert_eq!((into.len(), status_at, written), (512, SEAM, 513));
    for none in
        [&[header][..], &[header, (DATA, 0, WRITE)], &[header, (END, 1, WRITE)], &[header, (END - 512, 513, WRITE)]]
    {
        assert!(matches!(judge_by(&d, &rules(), none), ParsedChain::Return), "{none:?}");
    }
    let over = [header, (u64::MAX, 513, WRITE)];
    assert!(matches!(judge_by(&d, &rules(), &over), ParsedChain::Return), "its address overflows");
}

#[test]
fn transfers_are_whole_sectors_inside_the_disk_up_to_the_limit() {
    let d = TestDriver::new(64);
    for (kind, flag) in [(kind::IN, WRITE), (kind::OUT, 0)] {
        let go = |sector: u64, len: u32| ask(&d, &rules(), kind, sector, &[(SEAM, len, flag)]);
        assert_eq!(answer(go(0, 0)), OK, "nothing to do");
        for len in [1, 511, 513, 1023] {
            assert_eq!(answer(go(0, len)), IO_ERR, "{len}");
        }
        assert!(matches!(go(CAPACITY - 2, 1024), ParsedChain::Submit { .. }));
        for sector in [CAPACITY - 1, CAPACITY, 1 << 55, (1 << 55) - 1, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
            assert_eq!(answer(go(sector, 1024)), IO_ERR, "{sector}");
        }
        assert!(matches!(go(0, 32 << 20), ParsedChain::Submit { .. }));
        assert_eq!(answer(go(0, (32 << 20) + 512)), IO_ERR);
        assert_eq!(answer(ask(&d, &rules(), kind, 0, &[(SEAM, 512, flag), (END - 511, 512, flag)])), IO_ERR, "a hole");
    }
}

#[test]
fn iovecs_of_a_refused_request_are_reused() {
    let d = TestDriver::new(64);
    let mut spare = Vec::new();
    let header = (d.header(0, kind::IN, 0), 16, 0);
    let chain = d.walked(&[header, (SEAM, 512, WRITE), (END, 512, WRITE), (STATUS, 1, WRITE)]);
    for _ in 0..3 {
        assert_eq!(answer(parse(&chain, &d.view(), &rules(), &mut spare)), IO_ERR);
        assert_eq!((spare.len(), spare[0].len()), (1, 0));
    }
}

#[test]
fn buffers_of_the_wrong_direction_are_ignored() {
    let d = TestDriver::new(64);
    let header = d.header(0, kind::IN, 1);
    let extra = [(header, 16, 0), (END, 100, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    assert!(matches!(
        judge_by(&d, &rules(), &extra),
        ParsedChain::Submit { work: Work::Read { .. }, written: 513, .. }
    ));
    let header = d.header(0, kind::OUT, 1);
    let extra = [(header, 16, 0), (DATA, 512, 0), (END, 100, WRITE), (STATUS, 1, WRITE)];
    assert!(matches!(judge_by(&d, &rules(), &extra), ParsedChain::Submit { work: Work::Write { .. }, written: 1, .. }));
}

#[test]
fn requests_that_were_not_offered_are_refused() {
    let d = TestDriver::new(64);
    d.segments(DATA, &[(0, 8, 0)]);
    let data = [(DATA, 512, 0)];
    let seg = [(DATA, 16, 0)];
    let ro = RequestRules { read_only: true, ..rules() };
    assert_eq!(answer(ask(&d, &ro, kind::OUT, 0, &data)), IO_ERR);
    assert_eq!(answer(ask(&d, &ro, kind::OUT, 0, &[])), IO_ERR);
    assert_eq!(answer(ask(&d, &ro, kind::DISCARD, 0, &seg)), UNSUPP);
    assert_eq!(answer(ask(&d, &ro, kind::WRITE_ZEROES, 0, &seg)), UNSUPP);
    assert!(matches!(ask(&d, &ro, kind::FLUSH, 0, &[]), ParsedChain::Submit { work: Work::Flush, written: 1, .. }));
    let old = RequestRules { features: 0, ..rules() };
    assert_eq!(answer(ask(&d, &old, kind::DISCARD, 0, &seg)), UNSUPP);
    assert_eq!(answer(ask(&d, &old, kind::WRITE_ZEROES, 0, &seg)), UNSUPP);
    // SCSI, secure erase, zones, legacy barriers (also combined with a valid type), and unknown types.
    for kind in [2, 3, 14, 15, 24, 1 << 31, 1 << 31 | kind::OUT, u32::MAX] {
        assert_eq!(answer(ask(&d, &rules(), kind, 0, &data)), UNSUPP, "{kind:#x}");
    }
}

#[test]
fn the_serial_is_cut_to_the_size_of_the_buffer() {
    let d = TestDriver::new(64);
    for room in [0, 1, 19, 20, 21, 512u32] {
        d.put(DATA, &[0xee; 512]);
        // The request has two buffers: 7 bytes, and the rest.
        let pieces = [(DATA, room.min(7), WRITE), (DATA + 7, room.saturating_sub(7), WRITE)];
        let n = room.min(20);
        assert_eq!(answer(ask(&d, &rules(), kind::GET_ID, 99, &pieces)), Some((Status::Ok, n + 1)));
        let got = d.get(DATA, 512);
        assert_eq!(
            (&got[..n as usize], &got[n as usize..]),
            (&SERIAL[..n as usize], &vec![0xee; 512 - n as usize][..])
        );
    }
    assert_eq!(answer(ask(&d, &rules(), kind::GET_ID, 0, &[(END, 20, WRITE)])), IO_ERR);
}

#[test]
fn all_segments_are_checked_before_any_effect() {
    let d = TestDriver::new(64);
    let go = |kind: u32, segments: &[(u64, u32, u32)], extra: u32| {
        d.segments(DATA, segments);
        let len = 16 * u32::try_from(segments.len()).unwrap() + extra;
        // The request has two buffers, the first of which ends inside the first segment.
        ask(&d, &rules(), kind, 0, &[(DATA, len.min(5), 0), (DATA + 5, len.saturating_sub(5), 0)])
    };
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        assert_eq!(answer(go(kind, &[], 0)), IO_ERR);
        for extra in [1, 8, 15] {
            assert_eq!(answer(go(kind, &[(0, 8, 0)], extra)), IO_ERR, "{extra}");
        }
        assert!(matches!(go(kind, &[(8, 8, 0); 32], 0), ParsedChain::Submit { written: 1, .. }));
        assert_eq!(answer(go(kind, &[(8, 8, 0); 33], 0)), IO_ERR);
        for bad in [(CAPACITY - 7, 8, 0), (u64::MAX, 8, 0), (1 << 55, 1, 0), (0, MAX_ZEROED_SECTORS + 1, 0)] {
            assert_eq!(answer(go(kind, &[(0, 8, 0), bad], 0)), IO_ERR, "{bad:?}");
        }
        for flags in [2, 1 << 31, u32::MAX] {
            assert_eq!(answer(go(kind, &[(0, 8, 0), (8, 8, flags)], 0)), UNSUPP, "{flags:#x}");
        }
        assert_eq!(answer(go(kind, &[(0, 0, 0), (CAPACITY, 0, 0)], 0)), OK, "nothing to do");
    }
    assert_eq!(answer(go(kind::DISCARD, &[(0, 8, 1)], 0)), UNSUPP, "the unmap flag is valid for WRITE_ZEROES only");
    let ParsedChain::Submit { work: Work::WriteZeroes { ranges }, .. } =
        go(kind::WRITE_ZEROES, &[(0, 8, 1), (0, 0, 0), (9, 1, 0)], 0)
    else {
        panic!("zeroes")
    };
    let got: Vec<_> = ranges.iter().map(|z| (z.range.start(), z.range.count(), z.unmap)).collect();
    assert_eq!(got, [(0, 8, true), (9, 1, false)]);
    let ParsedChain::Submit { work: Work::Discard { ranges }, .. } =
        go(kind::DISCARD, &[(CAPACITY - 8, 8, 0), (1, 2, 0)], 0)
    else {
        panic!("a discard")
    };
    assert_eq!(ranges, [SectorRange::new(CAPACITY - 8, 8).unwrap(), SectorRange::new(1, 2).unwrap()]);
    assert_eq!(answer(ask(&d, &rules(), kind::DISCARD, 0, &[(END - 8, 16, 0)])), IO_ERR, "a hole");
    let big = RequestRules { capacity: 1 << 40, ..rules() };
    // Segments larger than the offered limit, as sent by a guest that was started with an older daemon.
    d.segments(DATA, &[(0, MAX_ZEROED_SECTORS, 0)]);
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        assert!(matches!(ask(&d, &big, kind, 0, &[(DATA, 16, 0)]), ParsedChain::Submit { .. }));
    }
}
