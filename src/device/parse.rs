//! What a chain asks for: a request for the disk, a status at once, or (where no status can be given) nothing.
//!
//! Everything is checked here, before any effect; what goes to the disk is in range, in size and in the guest's memory.

use super::config::{MAX_ZEROED_SECTORS, ZEROING_LIMITS};
use super::descriptor_chain::{DescriptorChain, clip_buffers};
use super::guest_memory::GuestView;
use super::spec::{HEADER_LEN, ID_LEN, RequestHeader, SEGMENT_LEN, SEGMENT_UNMAP, Segment, Status, feature, kind};
use crate::disk::{Work, ZeroRange};
use crate::storage::GuestIovecs;
use crate::units::{SECTOR, SectorRange};

/// Most bytes of one read or write (V9).
pub const MAX_BYTES: u64 = 32 << 20;
/// Most ranges of a DISCARD or WRITE_ZEROES.
const MAX_SEGMENTS: usize = ZEROING_LIMITS.segments as usize;
/// Runs for which a new [`GuestIovecs`] has room before it must grow.
const IOVEC_CAPACITY: usize = 16;

/// What requests are checked against. The capacity may change between turns.
#[derive(Clone, Copy)]
pub struct RequestRules<'a> {
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
pub enum ParsedChain {
    /// Hand it to the disk; when done, put a status byte at guest address `status_at` and say that `written` bytes were
    /// written (if it failed: 1, the status).
    Submit {
        /// For the disk.
        work: Work,
        /// Mapped.
        status_at: u64,
        /// Status included.
        written: u32,
    },
    /// Answer it now.
    Complete {
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
enum EarlyEnd {
    Failed(Status),
    /// Done, with so many bytes written before the status.
    Done(u32),
}

use EarlyEnd::{Done, Failed};

/// Judges a chain. Memory for data comes from `spare` where there is some.
#[inline]
pub fn parse(
    chain: &DescriptorChain,
    view: &GuestView,
    rules: &RequestRules<'_>,
    spare: &mut Vec<GuestIovecs>,
) -> ParsedChain {
    // V8: the status is the last writable byte, wherever it lies.
    let last = chain.writable().iter().rev().find(|p| p.len > 0);
    let Some(status_at) = last.and_then(|p| p.addr.checked_add(u64::from(p.len) - 1)) else {
        return ParsedChain::Return;
    };
    if !view.contains(status_at, 1) || chain.readable_len() < HEADER_LEN as u64 {
        return ParsedChain::Return;
    }
    match parse_request(chain, view, rules, spare) {
        Ok((work, data)) => ParsedChain::Submit { work, status_at, written: data + 1 },
        Err(Done(data)) => ParsedChain::Complete { status: Status::Ok, status_at, written: data + 1 },
        Err(Failed(status)) => ParsedChain::Complete { status, status_at, written: 1 },
    }
}

/// The work and the bytes it will write for the guest.
fn parse_request(
    chain: &DescriptorChain,
    view: &GuestView,
    rules: &RequestRules<'_>,
    spare: &mut Vec<GuestIovecs>,
) -> Result<(Work, u32), EarlyEnd> {
    // V7: the header is the first 16 readable bytes, over however many descriptors.
    let mut raw = [0; HEADER_LEN];
    read_bytes(chain, view, 0, &mut raw)?;
    let header = RequestHeader::decode(&raw);
    let payload = chain.readable_len() - HEADER_LEN as u64;
    let room = chain.writable_len() - 1;
    match header.kind {
        kind::IN => {
            let (range, data) = data_range(header.sector, room, rules)?;
            let into = data_iovecs(view, clip_buffers(chain.writable(), 0, room), spare)?;
            Ok((Work::Read { range, into }, data))
        }
        kind::OUT if rules.read_only => Err(Failed(Status::IoErr)),
        kind::OUT => {
            let (range, _) = data_range(header.sector, payload, rules)?;
            let from = data_iovecs(view, clip_buffers(chain.readable(), HEADER_LEN as u64, payload), spare)?;
            Ok((Work::Write { range, from }, 0))
        }
        kind::FLUSH => Ok((Work::Flush, 0)),
        kind::GET_ID => {
            // V13.
            let len = room.min(ID_LEN as u64);
            let id = &rules.serial[..usize::try_from(len).expect("at most 20")];
            let mut done = 0;
            for (addr, n) in clip_buffers(chain.writable(), 0, len) {
                if !view.write(addr, &id[done..done + n as usize]) {
                    return Err(Failed(Status::IoErr));
                }
                done += n as usize;
            }
            Err(Done(u32::try_from(len).expect("at most 20")))
        }
        kind::DISCARD if rules.features & feature::DISCARD != 0 && !rules.read_only => {
            let mut ranges = Vec::new();
            parse_segments(chain, view, payload, rules, 0, |range, _| ranges.push(range))?;
            if ranges.is_empty() { Err(Done(0)) } else { Ok((Work::Discard { ranges }, 0)) }
        }
        kind::WRITE_ZEROES if rules.features & feature::WRITE_ZEROES != 0 && !rules.read_only => {
            let mut ranges = Vec::new();
            parse_segments(chain, view, payload, rules, SEGMENT_UNMAP, |range, flags| {
                ranges.push(ZeroRange { range, unmap: flags & SEGMENT_UNMAP != 0 });
            })?;
            if ranges.is_empty() { Err(Done(0)) } else { Ok((Work::WriteZeroes { ranges }, 0)) }
        }
        // V10, V11: also what was not negotiated, legacy barriers, SCSI, secure erase, zones.
        _ => Err(Failed(Status::Unsupp)),
    }
}

/// V9: the sectors of a read or write of `len` bytes, and `len`; nothing to do where it is 0.
fn data_range(sector: u64, len: u64, rules: &RequestRules<'_>) -> Result<(SectorRange, u32), EarlyEnd> {
    if !len.is_multiple_of(SECTOR) || len > MAX_BYTES {
        return Err(Failed(Status::IoErr));
    }
    let range = check_range(sector, len / SECTOR, rules)?;
    if range.is_empty() { Err(Done(0)) } else { Ok((range, u32::try_from(len).expect("at most 32 MiB"))) }
}

fn check_range(sector: u64, count: u64, rules: &RequestRules<'_>) -> Result<SectorRange, EarlyEnd> {
    SectorRange::new(sector, count).filter(|r| r.end() <= rules.capacity).ok_or(Failed(Status::IoErr))
}

/// V12: checks all ranges before the caller has any effect, and gives it those that are not empty with their flags.
fn parse_segments(
    chain: &DescriptorChain,
    view: &GuestView,
    payload: u64,
    rules: &RequestRules<'_>,
    flags: u32,
    mut each: impl FnMut(SectorRange, u32),
) -> Result<(), EarlyEnd> {
    let n = usize::try_from(payload / SEGMENT_LEN as u64).unwrap_or(usize::MAX);
    let whole = payload.is_multiple_of(SEGMENT_LEN as u64);
    if !whole || n == 0 || n > MAX_SEGMENTS {
        return Err(Failed(Status::IoErr));
    }
    let mut raw = [0; MAX_SEGMENTS * SEGMENT_LEN];
    let raw = &mut raw[..n * SEGMENT_LEN];
    read_bytes(chain, view, HEADER_LEN as u64, raw)?;
    for one in raw.chunks_exact(SEGMENT_LEN) {
        let s = Segment::decode(one.try_into().expect("chunks of 16 bytes"));
        if s.flags & !flags != 0 {
            return Err(Failed(Status::Unsupp));
        }
        if s.count > MAX_ZEROED_SECTORS {
            return Err(Failed(Status::IoErr));
        }
        let range = check_range(s.sector, u64::from(s.count), rules)?;
        if !range.is_empty() {
            each(range, s.flags);
        }
    }
    Ok(())
}

/// Copies readable bytes from `skip` on, once. There are enough.
#[inline]
fn read_bytes(chain: &DescriptorChain, view: &GuestView, skip: u64, into: &mut [u8]) -> Result<(), EarlyEnd> {
    let mut done = 0;
    for (addr, n) in clip_buffers(chain.readable(), skip, into.len() as u64) {
        if !view.read(addr, &mut into[done..done + n as usize]) {
            return Err(Failed(Status::IoErr));
        }
        done += n as usize;
    }
    Ok(())
}

/// The guest's memory of a read or write (V6).
#[inline]
fn data_iovecs(
    view: &GuestView,
    pieces: impl Iterator<Item = (u64, u32)>,
    spare: &mut Vec<GuestIovecs>,
) -> Result<GuestIovecs, EarlyEnd> {
    let mut slices = spare.pop().unwrap_or_else(|| GuestIovecs::with_capacity(IOVEC_CAPACITY));
    if view.gather(pieces, &mut slices) {
        Ok(slices)
    } else {
        spare.push(slices);
        Err(Failed(Status::IoErr))
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
