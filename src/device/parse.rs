//! What a chain asks for: a request for the disk, a status at once, or (where no status can be given) nothing.
//!
//! Everything is checked here, before any effect; what goes to the disk is in range, in size and in the guest's memory.

use super::chain::{Chain, part};
use super::config::{DISCARD, WRITE_ZEROES};
use super::guest::View;
use super::spec::{HEADER_LEN, Header, ID_LEN, Limits, SEGMENT_LEN, SEGMENT_UNMAP, Segment, Status, feature, kind};
use crate::disk::{Work, ZeroRange};
use crate::storage::Slices;
use crate::units::{SECTOR, SectorRange};

/// Most bytes of one read or write (V9).
pub const MAX_BYTES: u64 = 32 << 20;
/// Most ranges of a DISCARD or WRITE_ZEROES.
const MAX_SEGMENTS: usize = 32;
/// Runs for which a new [`Slices`] has room before it must grow.
const RUNS: usize = 16;

/// What requests are checked against. The capacity may change between turns.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Sectors.
    pub capacity: u64,
    /// Whether writing is refused.
    pub read_only: bool,
    /// Features that the driver took.
    pub features: u64,
    /// What GET_ID answers.
    pub serial: &'a [u8; ID_LEN],
}

/// What to do with a chain.
#[derive(Debug)]
pub enum Verdict {
    /// Hand it to the disk; when done, put a status byte at guest address `status_at` and say that `written` bytes were
    /// written (if it failed: 1, the status).
    Work {
        /// For the disk.
        work: Work,
        /// Mapped.
        status_at: u64,
        /// Status included.
        written: u32,
    },
    /// Answer it now.
    Answer {
        /// The answer.
        status: Status,
        /// Mapped.
        status_at: u64,
        /// Status included.
        written: u32,
    },
    /// There is no place for a status: give the chain back with length 0 (V7, V8).
    Return,
}

/// A request that ends before the disk sees it.
enum Early {
    Bad(Status),
    /// Done, with so many bytes written before the status.
    Done(u32),
}

use Early::{Bad, Done};

/// Judges a chain. Memory for data comes from `spare` where there is some.
pub fn parse(chain: &Chain, view: &View, rules: &Rules<'_>, spare: &mut Vec<Slices>) -> Verdict {
    // V8: the status is the last writable byte, wherever it lies.
    let last = chain.writable().iter().rev().find(|p| p.len > 0);
    let Some(status_at) = last.and_then(|p| p.addr.checked_add(u64::from(p.len) - 1)) else {
        return Verdict::Return;
    };
    if !view.holds(status_at, 1) || chain.readable_len() < HEADER_LEN as u64 {
        return Verdict::Return;
    }
    match judge(chain, view, rules, spare) {
        Ok((work, data)) => Verdict::Work { work, status_at, written: data + 1 },
        Err(Done(data)) => Verdict::Answer { status: Status::Ok, status_at, written: data + 1 },
        Err(Bad(status)) => Verdict::Answer { status, status_at, written: 1 },
    }
}

/// The work and the bytes it will write for the guest.
fn judge(chain: &Chain, view: &View, rules: &Rules<'_>, spare: &mut Vec<Slices>) -> Result<(Work, u32), Early> {
    // V7: the header is the first 16 readable bytes, over however many descriptors.
    let mut raw = [0; HEADER_LEN];
    copy_in(chain, view, 0, &mut raw)?;
    let header = Header::decode(&raw);
    let payload = chain.readable_len() - HEADER_LEN as u64;
    let room = chain.writable_len() - 1;
    match header.kind {
        kind::IN => {
            let (range, data) = transfer(header.sector, room, rules)?;
            let into = gather(view, part(chain.writable(), 0, room), spare)?;
            Ok((Work::Read { range, into }, data))
        }
        kind::OUT if rules.read_only => Err(Bad(Status::IoErr)),
        kind::OUT => {
            let (range, _) = transfer(header.sector, payload, rules)?;
            let from = gather(view, part(chain.readable(), HEADER_LEN as u64, payload), spare)?;
            Ok((Work::Write { range, from }, 0))
        }
        kind::FLUSH => Ok((Work::Flush, 0)),
        kind::GET_ID => {
            // V13.
            let len = room.min(ID_LEN as u64);
            let id = &rules.serial[..usize::try_from(len).expect("at most 20")];
            let mut done = 0;
            for (addr, n) in part(chain.writable(), 0, len) {
                if !view.write(addr, &id[done..done + n as usize]) {
                    return Err(Bad(Status::IoErr));
                }
                done += n as usize;
            }
            Err(Done(u32::try_from(len).expect("at most 20")))
        }
        kind::DISCARD if rules.features & feature::DISCARD != 0 && !rules.read_only => {
            let mut ranges = Vec::new();
            segments(chain, view, payload, rules, DISCARD, 0, |range, _| ranges.push(range))?;
            if ranges.is_empty() { Err(Done(0)) } else { Ok((Work::Discard { ranges }, 0)) }
        }
        kind::WRITE_ZEROES if rules.features & feature::WRITE_ZEROES != 0 && !rules.read_only => {
            let mut ranges = Vec::new();
            segments(chain, view, payload, rules, WRITE_ZEROES, SEGMENT_UNMAP, |range, flags| {
                ranges.push(ZeroRange { range, unmap: flags & SEGMENT_UNMAP != 0 });
            })?;
            if ranges.is_empty() { Err(Done(0)) } else { Ok((Work::WriteZeroes { ranges }, 0)) }
        }
        // V10, V11: also what was not negotiated, legacy barriers, SCSI, secure erase, zones.
        _ => Err(Bad(Status::Unsupp)),
    }
}

/// V9: the sectors of a read or write of `len` bytes, and `len`; nothing to do where it is 0.
fn transfer(sector: u64, len: u64, rules: &Rules<'_>) -> Result<(SectorRange, u32), Early> {
    if !len.is_multiple_of(SECTOR) || len > MAX_BYTES {
        return Err(Bad(Status::IoErr));
    }
    let range = in_disk(sector, len / SECTOR, rules)?;
    if range.is_empty() { Err(Done(0)) } else { Ok((range, u32::try_from(len).expect("at most 32 MiB"))) }
}

fn in_disk(sector: u64, count: u64, rules: &Rules<'_>) -> Result<SectorRange, Early> {
    SectorRange::new(sector, count).filter(|r| r.end() <= rules.capacity).ok_or(Bad(Status::IoErr))
}

/// V12: checks all ranges before the caller has any effect, and gives it those that are not empty with their flags.
fn segments(
    chain: &Chain,
    view: &View,
    payload: u64,
    rules: &Rules<'_>,
    limits: Limits,
    flags: u32,
    mut each: impl FnMut(SectorRange, u32),
) -> Result<(), Early> {
    let n = usize::try_from(payload / SEGMENT_LEN as u64).unwrap_or(usize::MAX);
    let whole = payload.is_multiple_of(SEGMENT_LEN as u64);
    if !whole || n == 0 || n > MAX_SEGMENTS.min(limits.segments as usize) {
        return Err(Bad(Status::IoErr));
    }
    let mut raw = [0; MAX_SEGMENTS * SEGMENT_LEN];
    let raw = &mut raw[..n * SEGMENT_LEN];
    copy_in(chain, view, HEADER_LEN as u64, raw)?;
    for one in raw.chunks_exact(SEGMENT_LEN) {
        let s = Segment::decode(one.try_into().expect("chunks of 16 bytes"));
        if s.flags & !flags != 0 {
            return Err(Bad(Status::Unsupp));
        }
        if s.count > limits.sectors {
            return Err(Bad(Status::IoErr));
        }
        let range = in_disk(s.sector, u64::from(s.count), rules)?;
        if !range.is_empty() {
            each(range, s.flags);
        }
    }
    Ok(())
}

/// Copies readable bytes from `skip` on, once. There are enough.
fn copy_in(chain: &Chain, view: &View, skip: u64, into: &mut [u8]) -> Result<(), Early> {
    let mut done = 0;
    for (addr, n) in part(chain.readable(), skip, into.len() as u64) {
        if !view.read(addr, &mut into[done..done + n as usize]) {
            return Err(Bad(Status::IoErr));
        }
        done += n as usize;
    }
    Ok(())
}

/// The guest's memory of a read or write (V6).
fn gather(view: &View, pieces: impl Iterator<Item = (u64, u32)>, spare: &mut Vec<Slices>) -> Result<Slices, Early> {
    let mut slices = spare.pop().unwrap_or_else(|| Slices::with_capacity(RUNS));
    if view.gather(pieces, &mut slices) {
        Ok(slices)
    } else {
        spare.push(slices);
        Err(Bad(Status::IoErr))
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{DATA, Driver, END, SEAM, STATUS, WRITE};
    use super::*;

    const CAPACITY: u64 = 1 << 20;
    const SERIAL: &[u8; ID_LEN] = b"0123456789abcdef\0\0\0\0";
    const ALL: u64 = feature::DISCARD | feature::WRITE_ZEROES;

    fn rules() -> Rules<'static> {
        Rules { capacity: CAPACITY, read_only: false, features: ALL, serial: SERIAL }
    }

    fn judge_by(d: &Driver, rules: &Rules<'_>, pieces: &[(u64, u32, u16)]) -> Verdict {
        parse(&d.walked(pieces), &d.view(), rules, &mut Vec::new())
    }

    /// A request whose status is at `STATUS`.
    fn ask(d: &Driver, rules: &Rules<'_>, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> Verdict {
        let mut pieces = vec![(d.header(0, kind, sector), 16, 0)];
        pieces.extend(data);
        pieces.push((STATUS, 1, WRITE));
        judge_by(d, rules, &pieces)
    }

    fn answer(verdict: Verdict) -> Option<(Status, u32)> {
        match verdict {
            Verdict::Answer { status, status_at, written } => {
                assert_eq!(status_at, STATUS);
                Some((status, written))
            }
            Verdict::Work { .. } | Verdict::Return => None,
        }
    }

    const IO_ERR: Option<(Status, u32)> = Some((Status::IoErr, 1));
    const UNSUPP: Option<(Status, u32)> = Some((Status::Unsupp, 1));
    const OK: Option<(Status, u32)> = Some((Status::Ok, 1));

    #[test]
    fn reads_and_writes() {
        let d = Driver::new(64);
        let data = [(DATA, 512, WRITE), (SEAM - 512, 1024, WRITE)];
        let Verdict::Work { work: Work::Read { range, into }, status_at, written } =
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
        let Verdict::Work { work: Work::Write { range, from }, written, .. } =
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
    fn the_header_may_be_in_any_number_of_descriptors() {
        let d = Driver::new(64);
        let at = d.header(0, kind::OUT, 9);
        let mut pieces: Vec<_> = (0..15).map(|i| (at + i, 1, 0)).collect();
        pieces.insert(7, (END, 0, 0));
        // The last byte of the header and the data in one.
        d.put(DATA - 1, &d.get(at + 15, 1));
        d.put(DATA, b"y");
        pieces.push((DATA - 1, 513, 0));
        pieces.push((STATUS, 1, WRITE));
        let Verdict::Work { work: Work::Write { range, from }, .. } = judge_by(&d, &rules(), &pieces) else {
            panic!("a write")
        };
        assert_eq!((range.start(), range.count(), from.len()), (9, 1, 512));
        let mut y = [0];
        from.copy_to(0, &mut y);
        assert_eq!(&y, b"y");
        // One byte short: there is nothing to answer to.
        let short = [(at, 15, 0), (STATUS, 1, WRITE)];
        assert!(matches!(judge_by(&d, &rules(), &short), Verdict::Return));
        assert!(matches!(judge_by(&d, &rules(), &[(STATUS, 1, WRITE)]), Verdict::Return));
        // It is not the guest's memory, but the status is.
        assert_eq!(answer(judge_by(&d, &rules(), &[(END - 15, 16, 0), (STATUS, 1, WRITE)])), IO_ERR);
    }

    #[test]
    fn the_status_is_the_last_writable_byte_wherever_it_lies() {
        let d = Driver::new(64);
        let header = (d.header(0, kind::IN, 0), 16, 0);
        // At the end of the data's descriptor, over a seam, with empty ones behind it.
        let pieces = [header, (SEAM - 512, 513, WRITE), (END, 0, WRITE), (u64::MAX, 0, WRITE)];
        let Verdict::Work { work: Work::Read { into, .. }, status_at, written } = judge_by(&d, &rules(), &pieces)
        else {
            panic!("a read")
        };
        assert_eq!((into.len(), status_at, written), (512, SEAM, 513));
        for none in
            [&[header][..], &[header, (DATA, 0, WRITE)], &[header, (END, 1, WRITE)], &[header, (END - 512, 513, WRITE)]]
        {
            assert!(matches!(judge_by(&d, &rules(), none), Verdict::Return), "{none:?}");
        }
        let over = [header, (u64::MAX, 513, WRITE)];
        assert!(matches!(judge_by(&d, &rules(), &over), Verdict::Return), "its address overflows");
    }

    #[test]
    fn transfers_are_whole_sectors_of_the_disk_and_not_too_many() {
        let d = Driver::new(64);
        for (kind, flag) in [(kind::IN, WRITE), (kind::OUT, 0)] {
            let go = |sector: u64, len: u32| ask(&d, &rules(), kind, sector, &[(SEAM, len, flag)]);
            assert_eq!(answer(go(0, 0)), OK, "nothing to do");
            for len in [1, 511, 513, 1023] {
                assert_eq!(answer(go(0, len)), IO_ERR, "{len}");
            }
            assert!(matches!(go(CAPACITY - 2, 1024), Verdict::Work { .. }));
            for sector in [CAPACITY - 1, CAPACITY, 1 << 55, (1 << 55) - 1, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
                assert_eq!(answer(go(sector, 1024)), IO_ERR, "{sector}");
            }
            assert!(matches!(go(0, 32 << 20), Verdict::Work { .. }));
            assert_eq!(answer(go(0, (32 << 20) + 512)), IO_ERR);
            assert_eq!(
                answer(ask(&d, &rules(), kind, 0, &[(SEAM, 512, flag), (END - 511, 512, flag)])),
                IO_ERR,
                "a hole"
            );
        }
    }

    #[test]
    fn memory_of_a_refused_request_is_kept_for_the_next() {
        let d = Driver::new(64);
        let mut spare = Vec::new();
        let header = (d.header(0, kind::IN, 0), 16, 0);
        let chain = d.walked(&[header, (SEAM, 512, WRITE), (END, 512, WRITE), (STATUS, 1, WRITE)]);
        for _ in 0..3 {
            assert_eq!(answer(parse(&chain, &d.view(), &rules(), &mut spare)), IO_ERR);
            assert_eq!((spare.len(), spare[0].len()), (1, 0));
        }
    }

    #[test]
    fn what_does_not_fit_the_direction_is_ignored() {
        let d = Driver::new(64);
        let header = d.header(0, kind::IN, 1);
        let extra = [(header, 16, 0), (END, 100, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        assert!(matches!(judge_by(&d, &rules(), &extra), Verdict::Work { work: Work::Read { .. }, written: 513, .. }));
        let header = d.header(0, kind::OUT, 1);
        let extra = [(header, 16, 0), (DATA, 512, 0), (END, 100, WRITE), (STATUS, 1, WRITE)];
        assert!(matches!(judge_by(&d, &rules(), &extra), Verdict::Work { work: Work::Write { .. }, written: 1, .. }));
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let d = Driver::new(64);
        d.segments(DATA, &[(0, 8, 0)]);
        let data = [(DATA, 512, 0)];
        let seg = [(DATA, 16, 0)];
        let ro = Rules { read_only: true, ..rules() };
        assert_eq!(answer(ask(&d, &ro, kind::OUT, 0, &data)), IO_ERR);
        assert_eq!(answer(ask(&d, &ro, kind::OUT, 0, &[])), IO_ERR);
        assert_eq!(answer(ask(&d, &ro, kind::DISCARD, 0, &seg)), UNSUPP);
        assert_eq!(answer(ask(&d, &ro, kind::WRITE_ZEROES, 0, &seg)), UNSUPP);
        assert!(matches!(ask(&d, &ro, kind::FLUSH, 0, &[]), Verdict::Work { work: Work::Flush, written: 1, .. }));
        let old = Rules { features: 0, ..rules() };
        assert_eq!(answer(ask(&d, &old, kind::DISCARD, 0, &seg)), UNSUPP);
        assert_eq!(answer(ask(&d, &old, kind::WRITE_ZEROES, 0, &seg)), UNSUPP);
        // SCSI, secure erase, zones, legacy barriers (also with a good type), anything.
        for kind in [2, 3, 14, 15, 24, 1 << 31, 1 << 31 | kind::OUT, u32::MAX] {
            assert_eq!(answer(ask(&d, &rules(), kind, 0, &data)), UNSUPP, "{kind:#x}");
        }
    }

    #[test]
    fn the_serial_is_cut_to_the_room() {
        let d = Driver::new(64);
        for room in [0, 1, 19, 20, 21, 512u32] {
            d.put(DATA, &[0xee; 512]);
            // In pieces of 7 and the rest.
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
    fn ranges_are_all_checked_first() {
        let d = Driver::new(64);
        let go = |kind: u32, segments: &[(u64, u32, u32)], extra: u32| {
            d.segments(DATA, segments);
            let len = 16 * u32::try_from(segments.len()).unwrap() + extra;
            // In two pieces, cut inside the first range.
            ask(&d, &rules(), kind, 0, &[(DATA, len.min(5), 0), (DATA + 5, len.saturating_sub(5), 0)])
        };
        for (kind, most) in [(kind::DISCARD, DISCARD), (kind::WRITE_ZEROES, WRITE_ZEROES)] {
            assert_eq!(answer(go(kind, &[], 0)), IO_ERR);
            for extra in [1, 8, 15] {
                assert_eq!(answer(go(kind, &[(0, 8, 0)], extra)), IO_ERR, "{extra}");
            }
            assert!(matches!(go(kind, &[(8, 8, 0); 32], 0), Verdict::Work { written: 1, .. }));
            assert_eq!(answer(go(kind, &[(8, 8, 0); 33], 0)), IO_ERR);
            for bad in [(CAPACITY - 7, 8, 0), (u64::MAX, 8, 0), (1 << 55, 1, 0), (0, most.sectors + 1, 0)] {
                assert_eq!(answer(go(kind, &[(0, 8, 0), bad], 0)), IO_ERR, "{bad:?}");
            }
            for flags in [2, 1 << 31, u32::MAX] {
                assert_eq!(answer(go(kind, &[(0, 8, 0), (8, 8, flags)], 0)), UNSUPP, "{flags:#x}");
            }
            assert_eq!(answer(go(kind, &[(0, 0, 0), (CAPACITY, 0, 0)], 0)), OK, "nothing to do");
        }
        assert_eq!(answer(go(kind::DISCARD, &[(0, 8, 1)], 0)), UNSUPP, "unmap is for zeroes only");
        let Verdict::Work { work: Work::WriteZeroes { ranges }, .. } =
            go(kind::WRITE_ZEROES, &[(0, 8, 1), (0, 0, 0), (9, 1, 0)], 0)
        else {
            panic!("zeroes")
        };
        let got: Vec<_> = ranges.iter().map(|z| (z.range.start(), z.range.count(), z.unmap)).collect();
        assert_eq!(got, [(0, 8, true), (9, 1, false)]);
        let Verdict::Work { work: Work::Discard { ranges }, .. } =
            go(kind::DISCARD, &[(CAPACITY - 8, 8, 0), (1, 2, 0)], 0)
        else {
            panic!("a discard")
        };
        assert_eq!(ranges, [SectorRange::new(CAPACITY - 8, 8).unwrap(), SectorRange::new(1, 2).unwrap()]);
        assert_eq!(answer(ask(&d, &rules(), kind::DISCARD, 0, &[(END - 8, 16, 0)])), IO_ERR, "a hole");
        let big = Rules { capacity: 1 << 40, ..rules() };
        d.segments(DATA, &[(0, DISCARD.sectors, 0)]);
        assert!(matches!(ask(&d, &big, kind::DISCARD, 0, &[(DATA, 16, 0)]), Verdict::Work { .. }));
    }
}
