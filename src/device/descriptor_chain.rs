//! A descriptor chain as two lists of buffers: those that the device may read, and those that it may write.
//!
//! virtio-queue's iterator ends silently if a chain violates a rule, so an invalid chain looks like a short one.
//! [`DescriptorChain::walk`] returns the violated rule (V4). It reads each descriptor once (V5), so a guest that
//! changes its table meanwhile gains nothing. Addresses are checked when they are used (V6).

use super::guest_memory::{GuestSpan, GuestView};
use super::spec::{Descriptor, desc};

/// Maximum number of entries of an indirect table.
pub const MAX_INDIRECT: u16 = 1024;
/// Number of entries that an indirect table may always have, also on a smaller ring. A driver reads `seg_max` before it
/// chooses the size of its ring, and Linux uses tables of `seg_max + 2` entries on a ring of any size.
const MIN_INDIRECT: u16 = super::config::SEG_MAX + 2;

/// The buffer of one descriptor. Its address is not checked yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DescriptorBuffer {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes; may be zero.
    pub len: u32,
}

/// The rule of V4 that a chain violates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChainDefect {
    /// The chain has more descriptors than its table: it is a loop.
    TooLong,
    /// An index lies outside the table.
    BadNext,
    /// The length of an indirect table is zero, not a multiple of 16, or above the limit, or the table is not guest
    /// memory.
    BadTable,
    /// An indirect descriptor lies in an indirect table, or has the flag `NEXT`.
    Nested,
    /// A readable descriptor follows a writable one.
    ReadableAfterWritable,
}

/// The buffers of one descriptor chain. Reused for the next chain.
#[derive(Debug, Default)]
pub struct DescriptorChain {
    readable: Vec<DescriptorBuffer>,
    writable: Vec<DescriptorBuffer>,
    readable_len: u64,
    writable_len: u64,
}

impl DescriptorChain {
    /// Buffers that the device may read, in order.
    pub fn readable(&self) -> &[DescriptorBuffer] {
        &self.readable
    }

    /// Buffers that the device may write, in order.
    pub fn writable(&self) -> &[DescriptorBuffer] {
        &self.writable
    }

    /// Total length of [`DescriptorChain::readable`].
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Total length of [`DescriptorChain::writable`].
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Replaces the buffers by those of the chain that begins at index `head` of `table`. The table has `size`
    /// descriptors.
    ///
    /// # Errors
    /// The violated rule. The caller must not use the buffers after an error.
    pub fn walk(&mut self, view: &GuestView, table: &GuestSpan, size: u16, head: u16) -> Result<(), ChainDefect> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        let mut next = head;
        for _ in 0..size {
            if next >= size {
                return Err(ChainDefect::BadNext);
            }
            let at = usize::from(next) * desc::LEN;
            let d = Descriptor::decode(table.load_raw64(at), table.load_raw64(at + 8));
            if d.has(desc::INDIRECT) {
                return if d.has(desc::NEXT) { Err(ChainDefect::Nested) } else { self.walk_indirect(view, d, size) };
            }
            self.add(d)?;
            if !d.has(desc::NEXT) {
                return Ok(());
            }
            next = d.next;
        }
        Err(ChainDefect::TooLong)
    }

    /// Adds the buffers of an indirect table, which ends the chain.
    fn walk_indirect(&mut self, view: &GuestView, of: Descriptor, size: u16) -> Result<(), ChainDefect> {
        let len = of.len as usize;
        let entries = len / desc::LEN;
        let most = size.clamp(MIN_INDIRECT, MAX_INDIRECT);
        if !len.is_multiple_of(desc::LEN) || entries == 0 || entries > usize::from(most) {
            return Err(ChainDefect::BadTable);
        }
        let mut next = 0u16;
        for _ in 0..entries {
            if usize::from(next) >= entries {
                return Err(ChainDefect::BadNext);
            }
            let at = of.addr.checked_add(u64::from(next) * desc::LEN as u64).ok_or(ChainDefect::BadTable)?;
            let raw = view.read_array(at).ok_or(ChainDefect::BadTable)?;
            let d = Descriptor::decode_bytes(&raw);
            if d.has(desc::INDIRECT) {
                return Err(ChainDefect::Nested);
            }
            self.add(d)?;
            if !d.has(desc::NEXT) {
                return Ok(());
            }
            next = d.next;
        }
        Err(ChainDefect::TooLong)
    }

    #[inline]
    fn add(&mut self, d: Descriptor) -> Result<(), ChainDefect> {
        let buffer = DescriptorBuffer { addr: d.addr, len: d.len };
        if d.has(desc::WRITE) {
            self.writable.push(buffer);
            self.writable_len += u64::from(d.len);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
            self.readable_len += u64::from(d.len);
        } else {
            return Err(ChainDefect::ReadableAfterWritable);
        }
        Ok(())
    }
}

/// Returns the bytes `skip .. skip + len` of a list of buffers, as `(address, length)`. An address that overflows is
/// replaced by an address that is never guest memory.
pub fn clip_buffers(pieces: &[DescriptorBuffer], skip: u64, len: u64) -> impl Iterator<Item = (u64, u32)> + '_ {
    let (mut skip, mut left) = (skip, len);
    pieces.iter().filter_map(move |p| {
        let from = skip.min(u64::from(p.len));
        skip -= from;
        let n = left.min(u64::from(p.len) - from);
        left -= n;
        let n = u32::try_from(n).expect("a part of a buffer is not longer than the buffer");
        (n > 0).then(|| (p.addr.saturating_add(from), n))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DATA, END, INDIRECT, INDIRECT_FLAG, NEXT, SEAM, TABLE, TestDriver, WRITE};
    use super::*;

    fn piece(addr: u64, len: u32) -> DescriptorBuffer {
        DescriptorBuffer { addr, len }
    }

    #[test]
    fn direct_chains() {
        let d = TestDriver::new(8);
        let chain = d.walked(&[(DATA, 16, 0), (1, 0, 0), (END, 7, 0), (DATA + 64, 512, WRITE), (DATA, 1, WRITE)]);
        assert_eq!(chain.readable(), [piece(DATA, 16), piece(1, 0), piece(END, 7)]);
        assert_eq!(chain.writable(), [piece(DATA + 64, 512), piece(DATA, 1)]);
        assert_eq!((chain.readable_len(), chain.writable_len()), (23, 513));
        // A chain that is walked again contains no buffers of the chain before.
        let mut chain = chain;
        d.desc(TABLE, 3, (5, 6, 0, 99));
        d.walk(&mut chain, 3).unwrap();
        assert_eq!((chain.readable(), chain.writable_len()), (&[piece(5, 6)][..], 0));
        // A chain that consists of all descriptors of the table, in reverse order.
        for i in 0..8u16 {
            d.desc(TABLE, i, (DATA, u32::MAX, if i == 0 { 0 } else { NEXT }, i.wrapping_sub(1)));
        }
        d.walk(&mut chain, 7).unwrap();
        assert_eq!(chain.readable_len(), 8 * u64::from(u32::MAX));
    }

    #[test]
    fn violations_in_direct_chains() {
        let d = TestDriver::new(8);
        let mut chain = DescriptorChain::default();
        let mut walk = |head| d.walk(&mut chain, head);
        d.desc(TABLE, 0, (DATA, 0, NEXT, 0));
        assert_eq!(walk(0), Err(ChainDefect::TooLong), "a loop of nothing");
        d.chain(TABLE, 0, &[(DATA, 1, 0); 8]);
        assert_eq!(walk(0), Ok(()));
        d.desc(TABLE, 7, (DATA, 1, NEXT, 0));
        assert_eq!(walk(0), Err(ChainDefect::TooLong), "one descriptor too many");
        d.desc(TABLE, 7, (DATA, 1, NEXT, 8));
        assert_eq!(walk(7), Err(ChainDefect::BadNext));
        d.desc(TABLE, 7, (DATA, 1, NEXT, u16::MAX));
        assert_eq!(walk(7), Err(ChainDefect::BadNext));
        d.chain(TABLE, 0, &[(DATA, 1, 0), (DATA, 0, WRITE), (DATA, 1, 0)]);
        assert_eq!(walk(0), Err(ChainDefect::ReadableAfterWritable), "even if the writable one is empty");
    }

    #[test]
    fn indirect_tables() {
        let d = TestDriver::new(8);
        let mut chain = DescriptorChain::default();
        let mut walk = |addr: u64, len: u32, flags: u16| {
            d.desc(TABLE, 2, (addr, len, INDIRECT_FLAG | flags, 0));
            d.walk(&mut chain, 2).map(|()| (chain.readable_len(), chain.writable_len()))
        };
        d.chain(INDIRECT, 0, &[(DATA, 3, 0), (DATA, 5, WRITE), (DATA, 7, WRITE)]);
        assert_eq!(walk(INDIRECT, 48, 0), Ok((3, 12)));
        assert_eq!(walk(INDIRECT, 48, WRITE), Ok((3, 12)), "its own WRITE flag has no effect");
        assert_eq!(walk(INDIRECT, 128, 0), Ok((3, 12)), "as long as the ring; the end is unused");
        assert_eq!(walk(INDIRECT, 2048, 0), Ok((3, 12)), "as long as Linux makes tables on any ring");
        assert_eq!(walk(INDIRECT, 2064, 0), Err(ChainDefect::BadTable), "longer");
        assert_eq!(walk(INDIRECT, 32, 0), Err(ChainDefect::TooLong), "the third lies outside");
        for len in [0, 15, 17, 47, u32::MAX] {
            assert_eq!(walk(INDIRECT, len, 0), Err(ChainDefect::BadTable), "{len}");
        }
        assert_eq!(walk(INDIRECT, 48, NEXT), Err(ChainDefect::Nested), "with a successor");
        assert_eq!(walk(END, 16, 0), Err(ChainDefect::BadTable));
        assert_eq!(walk(u64::MAX - 7, 16, 0), Err(ChainDefect::BadTable));
        d.desc(INDIRECT, 0, (DATA, 3, NEXT, 3));
        assert_eq!(walk(INDIRECT, 48, 0), Err(ChainDefect::BadNext));
        d.desc(INDIRECT, 0, (DATA, 3, NEXT, 1));
        d.desc(INDIRECT, 2, (INDIRECT, 48, INDIRECT_FLAG, 0));
        assert_eq!(walk(INDIRECT, 48, 0), Err(ChainDefect::Nested), "one level only");
        d.desc(INDIRECT, 2, (DATA, 7, WRITE | NEXT, 1));
        assert_eq!(walk(INDIRECT, 48, 0), Err(ChainDefect::TooLong), "a loop");
        d.desc(INDIRECT, 2, (DATA, 7, 0, 0));
        assert_eq!(walk(INDIRECT, 48, 0), Err(ChainDefect::ReadableAfterWritable));
        d.chain(SEAM - 24, 0, &[(DATA, 3, 0), (DATA, 5, 0), (DATA, 7, WRITE)]);
        assert_eq!(walk(SEAM - 24, 48, 0), Ok((8, 7)), "across the border of two regions");
    }

    #[test]
    fn the_end_of_a_direct_chain_may_be_indirect() {
        let d = TestDriver::new(8);
        let mut chain = DescriptorChain::default();
        d.chain(INDIRECT, 0, &[(DATA, 3, 0), (DATA, 5, WRITE)]);
        d.desc(TABLE, 0, (DATA, 1, NEXT, 1));
        d.desc(TABLE, 1, (INDIRECT, 32, INDIRECT_FLAG, 0));
        assert_eq!(d.walk(&mut chain, 0), Ok(()));
        assert_eq!((chain.readable_len(), chain.writable_len()), (4, 5));
        d.desc(TABLE, 0, (DATA, 1, NEXT | WRITE, 1));
        assert_eq!(d.walk(&mut chain, 0), Err(ChainDefect::ReadableAfterWritable), "the rule spans both tables");
    }

    #[test]
    fn the_limit_of_indirect_tables_holds_for_large_rings() {
        let d = TestDriver::new(256);
        // Only the size of the ring, 2048, matters here.
        let (view, ring) = (d.view(), d.ring(false));
        let mut chain = DescriptorChain::default();
        d.chain(DATA, 0, &vec![(DATA, 1, 0); 1025]);
        d.desc(TABLE, 0, (DATA, 1024 * 16, INDIRECT_FLAG, 0));
        d.desc(DATA, 1023, (DATA, 1, 0, 0));
        assert_eq!(chain.walk(&view, ring.table(), 2048, 0), Ok(()));
        assert_eq!(chain.readable_len(), 1024);
        d.desc(TABLE, 0, (DATA, 1025 * 16, INDIRECT_FLAG, 0));
        assert_eq!(chain.walk(&view, ring.table(), 2048, 0), Err(ChainDefect::BadTable));
    }

    #[test]
    fn buffers_are_clipped() {
        let pieces = [piece(100, 10), piece(200, 0), piece(300, 5), piece(u64::MAX - 1, 9)];
        let cut = |skip, len| clip_buffers(&pieces, skip, len).collect::<Vec<_>>();
        assert_eq!(cut(0, 24), [(100, 10), (300, 5), (u64::MAX - 1, 9)]);
        assert_eq!(cut(3, 9), [(103, 7), (300, 2)]);
        assert_eq!(cut(10, 5), [(300, 5)]);
        assert_eq!(cut(20, 4), [(u64::MAX, 4)], "an address that overflows is not guest memory");
        assert_eq!(cut(4, 0), []);
        assert_eq!(cut(24, 1), []);
    }
}
