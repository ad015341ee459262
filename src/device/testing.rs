//! The driver's side of a virtqueue, for unit tests: guest memory, descriptors and rings, which may be invalid.
#![allow(clippy::little_endian_bytes, clippy::cast_possible_truncation)]

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::descriptor_chain::{ChainDefect, DescriptorChain};
use super::guest_memory::{GuestView, MemoryRegions, SharedMemory};
use super::split_ring::{RingLayout, SplitRing};

pub(super) const TABLE: u64 = 0x1000;
pub(super) const AVAIL: u64 = 0x8000;
pub(super) const USED: u64 = 0x9000;
/// Headers of requests, 16 bytes each.
pub(super) const HEADERS: u64 = 0xa000;
/// Status bytes.
pub(super) const STATUS: u64 = 0xb000;
/// An indirect table.
pub(super) const INDIRECT: u64 = 0xc000;
/// The border of two adjacent regions.
pub(super) const SEAM: u64 = 0x10_0000;
/// Start of the data, which ends at [`END`].
pub(super) const DATA: u64 = 0x8_0000;
/// The first address that is not guest memory.
pub(super) const END: u64 = 0x600_0000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT_FLAG: u16 = 4;

pub(super) struct TestDriver {
    pub(super) memory: Arc<SharedMemory>,
    pub(super) size: u16,
    /// Number of chains that were added to the avail ring.
    pub(super) added: u16,
    /// Number of used elements that were read.
    pub(super) seen: u16,
}

impl TestDriver {
    pub(super) fn new(size: u16) -> TestDriver {
        let ranges = [(GuestAddress(0), SEAM as usize), (GuestAddress(SEAM), (END - SEAM) as usize)];
        let memory = Arc::new(MemoryRegions::from_ranges(&ranges).unwrap().into());
        TestDriver { memory, size, added: 0, seen: 0 }
    }

    pub(super) fn view(&self) -> GuestView {
        GuestView::new(self.memory.clone())
    }

    pub(super) fn layout(&self) -> RingLayout {
        RingLayout { size: self.size, table: TABLE, avail: AVAIL, used: USED }
    }

    pub(super) fn ring(&self, event_idx: bool) -> SplitRing {
        SplitRing::new(&self.view(), self.layout(), 1024, event_idx, 0).unwrap()
    }

    pub(super) fn put(&self, addr: u64, bytes: &[u8]) {
        self.memory.regions().write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(super) fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.regions().read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub(super) fn word(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.get(addr, 2).try_into().unwrap())
    }

    pub(super) fn put_word(&self, addr: u64, word: u16) {
        self.put(addr, &word.to_le_bytes());
    }

    /// Writes descriptor `i` of the table at `table`.
    pub(super) fn desc(&self, table: u64, i: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.put(table + u64::from(i) * 16, &raw);
    }

    /// Writes a chain to consecutive descriptors of `table`, beginning with `first`. The buffers are `(address, length,
    /// WRITE or 0)`.
    pub(super) fn chain(&self, table: u64, first: u16, pieces: &[(u64, u32, u16)]) {
        for (i, &(addr, len, flags)) in (first..).zip(pieces) {
            let more = usize::from(i - first) + 1 < pieces.len();
            self.desc(table, i, (addr, len, flags | if more { NEXT } else { 0 }, if more { i + 1 } else { 0 }));
        }
    }

    /// Writes a chain of the given buffers and walks the chain.
    pub(super) fn walked(&self, pieces: &[(u64, u32, u16)]) -> DescriptorChain {
        self.chain(TABLE, 0, pieces);
        let mut chain = DescriptorChain::default();
        self.walk(&mut chain, 0).unwrap();
        chain
    }

    pub(super) fn walk(&self, chain: &mut DescriptorChain, head: u16) -> Result<(), ChainDefect> {
        chain.walk(&self.view(), self.ring(false).table(), self.size, head)
    }

    /// Writes the header of a request to place `i` of [`HEADERS`], and returns its address.
    pub(super) fn header(&self, i: u16, kind: u32, sector: u64) -> u64 {
        let mut raw = kind.to_le_bytes().to_vec();
        raw.extend([0; 4]);
        raw.extend(sector.to_le_bytes());
        let at = HEADERS + u64::from(i) * 16;
        self.put(at, &raw);
        at
    }

    /// Writes segments `(sector, count, flags)` of a `DISCARD` or `WRITE_ZEROES` to `addr`.
    pub(super) fn segments(&self, addr: u64, segments: &[(u64, u32, u32)]) {
        for (i, &(sector, count, flags)) in (0u64..).zip(segments) {
            let mut raw = sector.to_le_bytes().to_vec();
            raw.extend(count.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            self.put(addr + i * 16, &raw);
        }
    }

    /// Makes the chain at `head` available.
    pub(super) fn add(&mut self, head: u16) {
        self.put_word(AVAIL + 4 + 2 * u64::from(self.added % self.size), head);
        self.added = self.added.wrapping_add(1);
        self.put_word(AVAIL + 2, self.added);
    }

    /// Returns the used elements since the last call, as heads and lengths.
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        while self.seen != self.word(USED + 2) {
            let raw = self.get(USED + 4 + 8 * u64::from(self.seen % self.size), 8);
            let part = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            all.push((part(0), part(4)));
            self.seen = self.seen.wrapping_add(1);
        }
        all
    }
}
