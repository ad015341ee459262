//! A chain of descriptors: what it makes readable and writable for the device, as two lists of pieces.
//!
//! virtio-queue's iterator ends silently where a chain breaks a rule, so a device cannot tell a bad chain from a short
//! one; this walker says which rule (V4). Every descriptor is copied once, then forgotten (V5), so a guest that
//! rewrites its table meanwhile gains nothing. Addresses are checked where they are used (V6).

use super::guest::{Span, View};
use super::spec::{Descriptor, desc};

/// Most entries of an indirect table.
pub const MAX_INDIRECT: u16 = 1024;

/// A buffer of one descriptor, not yet checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Guest address.
    pub addr: u64,
    /// Bytes, perhaps none.
    pub len: u32,
}

/// The rule of V4 that a chain breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Defect {
    /// More descriptors than the table has: a loop.
    Long,
    /// An index outside the table.
    Next,
    /// An indirect table whose length is not a multiple of 16, or is zero, or above the limit, or an address outside
    /// the guest's memory.
    Table,
    /// An indirect descriptor inside an indirect table, or one that has a successor.
    Nested,
    /// A readable descriptor after a writable one.
    Order,
}

/// The pieces of one chain; used again for the next.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// What the device may read, in order.
    pub fn readable(&self) -> &[Piece] {
        &self.readable
    }

    /// What the device may write, in order.
    pub fn writable(&self) -> &[Piece] {
        &self.writable
    }

    /// Bytes of [`Chain::readable`].
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes of [`Chain::writable`].
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Replaces what is here by the chain that begins at `head` (an index into `table` of `size` descriptors).
    ///
    /// # Errors
    /// What is wrong with it; the pieces are then of no use.
    pub fn walk(&mut self, view: &View, table: &Span, size: u16, head: u16) -> Result<(), Defect> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        let mut next = head;
        for _ in 0..size {
            if next >= size {
                return Err(Defect::Next);
            }
            let d = Descriptor::decode(&table.read(usize::from(next) * desc::LEN));
            if d.has(desc::INDIRECT) {
                return if d.has(desc::NEXT) { Err(Defect::Nested) } else { self.walk_indirect(view, d, size) };
            }
            self.add(d)?;
            if !d.has(desc::NEXT) {
                return Ok(());
            }
            next = d.next;
        }
        Err(Defect::Long)
    }

    /// The rest of a chain, from a table of its own.
    fn walk_indirect(&mut self, view: &View, of: Descriptor, size: u16) -> Result<(), Defect> {
        let len = of.len as usize;
        let entries = len / desc::LEN;
        if !len.is_multiple_of(desc::LEN) || entries == 0 || entries > usize::from(size.min(MAX_INDIRECT)) {
            return Err(Defect::Table);
        }
        let mut next = 0u16;
        for _ in 0..entries {
            if usize::from(next) >= entries {
                return Err(Defect::Next);
            }
            let mut raw = [0; desc::LEN];
            let at = of.addr.checked_add(u64::from(next) * desc::LEN as u64).ok_or(Defect::Table)?;
            if !view.read(at, &mut raw) {
                return Err(Defect::Table);
            }
            let d = Descriptor::decode(&raw);
            if d.has(desc::INDIRECT) {
                return Err(Defect::Nested);
            }
            self.add(d)?;
            if !d.has(desc::NEXT) {
                return Ok(());
            }
            next = d.next;
        }
        Err(Defect::Long)
    }

    fn add(&mut self, d: Descriptor) -> Result<(), Defect> {
        let piece = Piece { addr: d.addr, len: d.len };
        if d.has(desc::WRITE) {
            self.writable.push(piece);
            self.writable_len += u64::from(d.len);
        } else if self.writable.is_empty() {
            self.readable.push(piece);
            self.readable_len += u64::from(d.len);
        } else {
            return Err(Defect::Order);
        }
        Ok(())
    }
}

/// The part `skip .. skip + len` of some pieces, as `(address, length)`. An address that overflows comes out as one
/// that is nowhere mapped.
pub fn part(pieces: &[Piece], skip: u64, len: u64) -> impl Iterator<Item = (u64, u32)> + '_ {
    let (mut skip, mut left) = (skip, len);
    pieces.iter().filter_map(move |p| {
        let from = skip.min(u64::from(p.len));
        skip -= from;
        let n = left.min(u64::from(p.len) - from);
        left -= n;
        // Both are at most p.len.
        let n = u32::try_from(n).expect("a part of a piece is no longer than the piece");
        (n > 0).then(|| (p.addr.saturating_add(from), n))
    })
}
