//! Parsing of a descriptor chain into a request for the disk, or into a status that is returned at once.
//!
//! This module makes all checks of a request, before the request has any effect on the disk. A request that reaches the
//! disk has a valid range and size, and its buffers lie in guest memory.

use super::config::{MAX_ZEROED_SECTORS, ZEROING_LIMITS};
use super::descriptor_chain::{DescriptorChain, clip_buffers};
use super::guest_memory::GuestView;
use super::spec::{HEADER_LEN, ID_LEN, RequestHeader, SEGMENT_LEN, SEGMENT_UNMAP, Segment, Status, feature, kind};
use crate::disk::{Work, ZeroRange};
use crate::storage::GuestIovecs;
use crate::units::{SECTOR, SectorRange};

/// Maximum number of bytes of one read or write (V9).
pub const MAX_BYTES: u64 = 32 << 20;
/// Maximum number of ranges of a DISCARD or WRITE_ZEROES.
const MAX_SEGMENTS: usize = ZEROING_LIMITS.segments as usize;
/// Initial capacity of a new [`GuestIovecs`].
const IOVEC_CAPACITY: usize = 16;

/// Properties of the device by which requests are checked. The capacity may change between batches.
#[derive(Clone, Copy)]
pub struct RequestRules<'a> {
    /// Size of the disk in sectors.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Features that the driver acknowledged.
    pub features: u64,
    /// Serial that `GET_ID` returns.
    pub serial: &'a [u8; ID_LEN],
}

/// The result of parsing a chain.
#[derive(Debug)]
pub enum ParsedChain {
    /// A request for the disk.
    Submit {
        /// The request.
        work: Work,
        /// Guest address of the status byte, which is guest memory.
        status_at: u64,
        /// Used length if the request succeeds, including the status byte. If the request fails, the used length is 1.
        written: u32,
    },
    /// A request that is complete already.
    Complete {
        /// The status of the request.
        status: Status,
        /// Guest address of the status byte, which is guest memory.
        status_at: u64,
        /// Used length, including the status byte.
        written: u32,
    },
    /// A chain without a whole header, or without a writable byte of guest memory for a status. The chain is returned
    /// with used length 0 (V7, V8).
    Return,
}

/// Outcome of a request that does not reach the disk.
enum EarlyEnd {
    Failed(Status),
    /// The request succeeded, and wrote this number of bytes before the status.
    Done(u32),
}

use EarlyEnd::{Done, Failed};

/// Parses a chain. Takes iovecs for the data of the request from `spare` if `spare` has any.
#[inline]
pub fn parse(
    chain: &DescriptorChain,
    view: &GuestView,
    rules: &RequestRules<'_>,
    spare: &mut Vec<GuestIovecs>,
) -> ParsedChain {
    // V8: the status is the last writable byte of the chain, in any descriptor.
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

/// Parses the request of a chain. Returns the request with the number of data bytes that it writes to guest memory.
fn parse_request(
    chain: &DescriptorChain,
    view: &GuestView,
    rules: &RequestRules<'_>,
    spare: &mut Vec<GuestIovecs>,
) -> Result<(Work, u32), EarlyEnd> {
    // V7: the header is the first 16 readable bytes, over any number of descriptors.
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
            // V13: at most 20 bytes of the serial are written.
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
        // V10, V11: features that were not negotiated, discards and zeroing on a read-only disk, legacy barriers, SCSI,
        // secure erase, zones, unknown types.
        _ => Err(Failed(Status::Unsupp)),
    }
}

/// V9: checks a read or write of `len` bytes. Returns the sectors and the length. A request of zero bytes succeeds at
/// once if its first sector is not after the end of the disk.
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

/// V12: checks all segments, and calls `each` with the range and flags of each segment that is not empty. `each` may be
/// called before a later segment is found to be invalid, so `each` must have no effect on the disk.
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

/// Reads bytes of a chain from offset `skip` on, each byte once. The chain must have enough readable bytes.
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

/// Returns the guest memory of a read or write (V6).
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
