//! The guest's memory, seen from one queue: guest addresses become slices of our own mappings, checked.
//!
//! A [`GuestView`] belongs to one thread. It remembers the region of the last look-up, since a guest's buffers mostly lie in
//! one, and hands its own count of the memory to every [`GuestIovecs`], so that queues do not fight over one counter.
//! The guest may change any byte at any moment: what is used was copied or loaded once, and no reference to plain bytes is made.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::{MemoryRegions, spec};
use crate::storage::sigbus::Guard;
use crate::storage::{GuestIovecs, prefetch_line};

/// The guest's memory as one front-end shared it, with the guards of its mappings.
///
/// The front-end can take pages away at any moment (it cuts the memory file, or the host has none left). Accesses of ours then
/// find zeros, and [`SharedMemory::is_lost`] becomes true; accesses of the kernel fail with EFAULT.
#[derive(Debug, Default)]
pub struct SharedMemory {
    // Before the mappings: a guard goes before what it guards is unmapped.
    guards: Vec<Arc<Guard>>,
    regions: Arc<MemoryRegions>,
}

impl SharedMemory {
    /// The memory of `regions`, whose mappings `guards` protect.
    pub fn new(regions: MemoryRegions, guards: Vec<Arc<Guard>>) -> SharedMemory {
        SharedMemory { guards, regions: Arc::new(regions) }
    }

    /// The regions.
    pub fn regions(&self) -> &Arc<MemoryRegions> {
        &self.regions
    }

    /// Whether a page of it could not be had.
    pub fn is_lost(&self) -> bool {
        self.guards.iter().any(|guard| guard.is_lost())
    }
}

/// Memory of a process of its own, which nobody can take away.
impl From<MemoryRegions> for SharedMemory {
    fn from(regions: MemoryRegions) -> SharedMemory {
        SharedMemory::new(regions, Vec::new())
    }
}

/// A memory table as one queue uses it.
pub struct GuestView {
    /// Sorted, disjoint.
    regions: Vec<ViewRegion>,
    last_region: Cell<usize>,
    /// Keeps all regions mapped.
    owner: Arc<dyn Any + Send + Sync>,
    memory: Arc<SharedMemory>,
}

struct ViewRegion {
    start: u64,
    len: usize,
    map: Arc<MmapRegion<()>>,
}

impl ViewRegion {
    /// How far `addr` lies in the region.
    #[inline]
    fn offset(&self, addr: u64) -> Option<usize> {
        let offset = usize::try_from(addr.checked_sub(self.start)?).ok()?;
        (offset < self.len).then_some(offset)
    }
}

impl GuestView {
    /// The view of `memory` for one queue.
    pub fn new(memory: Arc<SharedMemory>) -> GuestView {
        let region = |r: &vm_memory::GuestRegionMmap<()>| ViewRegion {
            start: r.start_addr().raw_value(),
            len: r.get_mmap().size(),
            map: r.get_mmap(),
        };
        let regions = memory.regions.iter().map(region).collect();
        // A count of its own for this queue, around the shared one.
        let owner = Arc::new(memory.clone());
        GuestView { regions, last_region: Cell::new(0), owner, memory }
    }

    /// Whether a page of the memory could not be had.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// The region of an address, and how far in it lies.
    #[inline]
    fn locate(&self, addr: u64) -> Option<(&ViewRegion, usize)> {
        if let Some(found) = self.regions.get(self.last_region.get()).and_then(|r| Some((r, r.offset(addr)?))) {
            return Some(found);
        }
        let at = self.regions.partition_point(|r| r.start <= addr).checked_sub(1)?;
        let region = &self.regions[at];
        let offset = region.offset(addr)?;
        self.last_region.set(at);
        Some((region, offset))
    }

    /// Calls `f(start, length, bytes before it)` for the pieces of a range, which may span adjacent regions; false, perhaps
    /// after some pieces, where part of it is not the guest's memory (V6). A piece is not empty, and lies in a region, which
    /// `owner` keeps mapped.
    #[inline]
    fn for_each_piece(&self, addr: u64, len: usize, mut f: impl FnMut(*mut u8, usize, usize)) -> bool {
        let mut done = 0;
        while done < len {
            let Some((region, offset)) = addr.checked_add(done as u64).and_then(|a| self.locate(a)) else {
                return false;
            };
            let n = (len - done).min(region.len - offset);
            f(region.map.as_ptr().wrapping_add(offset), n, done);
            done += n;
        }
        true
    }

    /// Has the processor fetch what is at an address, if it is the guest's memory.
    #[inline]
    pub fn prefetch(&self, addr: u64) {
        if let Some((region, offset)) = self.locate(addr) {
            prefetch_line(region.map.as_ptr().wrapping_add(offset));
        }
    }

    /// Whether all of a range is the guest's memory.
    #[inline]
    pub fn contains(&self, addr: u64, len: usize) -> bool {
        self.for_each_piece(addr, len, |_, _, _| ())
    }

    /// Copies a range of a known length, once (V5).
    #[inline]
    pub fn read_array<const N: usize>(&self, addr: u64) -> Option<[u8; N]> {
        let mut into = [0; N];
        self.read(addr, &mut into).then_some(into)
    }

    /// Copies a range, once (V5).
    #[inline]
    pub fn read(&self, addr: u64, into: &mut [u8]) -> bool {
        let whole = self.for_each_piece(addr, into.len(), |from, n, at| {
            // SAFETY: the piece is mapped (`each`), and cannot overlap memory of ours.
            unsafe { ptr::copy_nonoverlapping(from, into[at..at + n].as_mut_ptr(), n) };
        });
        // The compiler may not look at the guest's bytes again instead of at the copy.
        compiler_fence(Ordering::SeqCst);
        whole
    }

    /// Writes a range; nothing where part of it is not the guest's memory.
    pub fn write(&self, addr: u64, from: &[u8]) -> bool {
        self.contains(addr, from.len())
            && self.for_each_piece(addr, from.len(), |to, n, at| {
                // SAFETY: as in `read`, the other way round. Front-ends share memory for reading and writing.
                unsafe { ptr::copy_nonoverlapping(from[at..at + n].as_ptr(), to, n) };
            })
    }

    /// Writes one byte; false where that is not the guest's memory.
    #[inline]
    pub fn write_byte(&self, addr: u64, byte: u8) -> bool {
        let there = self.for_each_piece(addr, 1, |to, _, _| {
            // SAFETY: as in `write`; any address is aligned for a byte.
            unsafe { AtomicU8::from_ptr(to) }.store(byte, Ordering::Relaxed);
        });
        #[cfg(test)]
        super::testing::count_store();
        there
    }

    /// Fills `out` with ranges `(address, length)`; false, and `out` empty, where part of them is not the guest's
    /// memory.
    pub fn gather(&self, ranges: impl Iterator<Item = (u64, u32)>, out: &mut GuestIovecs) -> bool {
        out.reset(&self.owner);
        for (addr, len) in ranges {
            let whole = self.for_each_piece(addr, len as usize, |start, n, _| {
                // SAFETY: the piece lies in a region of `owner`, which unmaps it only when dropped, and `out` has a
                // count of that owner since above, before its first run. Front-ends share memory for reading and writing.
                unsafe { out.push(start, n) }
            });
            if !whole {
                out.clear();
                return false;
            }
        }
        true
    }

    /// A range that lies wholly in one region, at an address that is a multiple of `align` for the guest and for us.
    pub fn span(&self, addr: u64, len: usize, align: usize) -> Option<GuestSpan> {
        let (region, at) = self.locate(addr)?;
        let inside = at.checked_add(len).is_some_and(|end| end <= region.len);
        let start = region.map.as_ptr().wrapping_add(at);
        let aligned = addr.is_multiple_of(align as u64) && (start as usize).is_multiple_of(align);
        (inside && aligned).then(|| GuestSpan { start, len, _memory: self.memory.clone() })
    }
}

/// A part of the guest's memory that was checked once: a ring.
pub struct GuestSpan {
    start: *mut u8,
    len: usize,
    /// Keeps it mapped.
    _memory: Arc<SharedMemory>,
}

// SAFETY: the pointer is to memory that `_memory` keeps mapped, and that others change anyway; no reference to plain bytes is made of it.
unsafe impl Send for GuestSpan {}

impl GuestSpan {
    /// The word at byte `at`: mapped as long as self, and aligned.
    #[inline]
    fn word_ptr<T>(&self, at: usize) -> *mut T {
        let place = self.start.wrapping_add(at).cast::<T>();
        assert!(at + size_of::<T>() <= self.len && place.is_aligned(), "a word of a ring lies in the ring, aligned");
        place
    }

    /// Has the processor fetch what is at byte `at`.
    #[inline]
    pub fn prefetch(&self, at: usize) {
        prefetch_line(self.start.wrapping_add(at));
    }

    /// The 16-bit word at byte `at`, an even number.
    #[inline]
    pub fn load(&self, at: usize, order: Ordering) -> u16 {
        // SAFETY: by `place`. (Who points a buffer into a ring has plain copies race with this, and gets what it gets.)
        spec::le16(unsafe { AtomicU16::from_ptr(self.word_ptr(at)) }.load(order))
    }

    /// Puts a 16-bit word at byte `at`, an even number.
    #[inline]
    pub fn store(&self, at: usize, word: u16, order: Ordering) {
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(self.word_ptr(at)) }.store(spec::le16(word), order);
        #[cfg(test)]
        super::testing::count_store();
    }

    /// The 64-bit word at byte `at`, a multiple of 8 as is the span's alignment; in the guest's order.
    #[inline]
    pub fn load_raw64(&self, at: usize) -> u64 {
        // SAFETY: as in `load`.
        unsafe { AtomicU64::from_ptr(self.word_ptr(at)) }.load(Ordering::Relaxed)
    }

    /// Puts a 32-bit word, in the guest's order, at byte `at`, a multiple of 4 as is the span's alignment.
    #[inline]
    pub fn store_raw32(&self, at: usize, word: u32) {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.word_ptr(at)) }.store(word, Ordering::Relaxed);
        #[cfg(test)]
        super::testing::count_store();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Two adjacent regions, a hole, and a third at the end of the address space.
    fn memory() -> Arc<SharedMemory> {
        let top = GuestAddress(u64::MAX - 0x1fff);
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x2000), (top, 0x1000)];
        Arc::new(MemoryRegions::from_ranges(&ranges).unwrap().into())
    }

    #[test]
    fn ranges_span_neighbours_but_no_holes() {
        let memory = memory();
        let view = GuestView::new(memory.clone());
        assert!(view.contains(0x1000, 0x3000) && !view.contains(0x1000, 0x3001));
        assert!(!view.contains(0xfff, 1) && !view.contains(0x4000, 1) && view.contains(0x4000, 0));
        assert!(view.contains(u64::MAX - 0x1fff, 0x1000) && !view.contains(u64::MAX - 0x1fff, 0x1001));
        assert!(!view.contains(u64::MAX, 2), "the address overflows");
        assert!(view.write(0x1ffe, b"abcd"));
        let mut back = [0; 4];
        memory.regions.read_slice(&mut back, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(&back, b"abcd");
        assert_eq!((view.read_array(0x1ffe), view.read_array(0x1fff)), (Some(*b"abcd"), Some(*b"bcd")));
        assert_eq!((view.read_array::<2>(0x3fff), view.read_array::<1>(0x4000)), (None, None));
        assert!(!view.write(0x3ffe, b"abcd"), "half of it is a hole");
        assert!(view.read(0x3ffe, &mut back[..2]) && back[..2] == [0, 0], "so nothing was written");
    }

    #[test]
    fn gathered_slices_are_the_memory_and_keep_it() {
        let memory = memory();
        let view = GuestView::new(memory.clone());
        let mut slices = GuestIovecs::with_capacity(4);
        assert!(view.gather([(0x1ff0, 32), (0x3000, 0), (0x3000, 8)].into_iter(), &mut slices));
        assert_eq!(slices.len(), 40);
        slices.copy_from(14, b"0123");
        slices.copy_from(32, b"end");
        let mut back = [0; 4];
        memory.regions.read_slice(&mut back, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(&back, b"0123");
        let weak = Arc::downgrade(&memory);
        drop((view, memory));
        slices.copy_to(32, &mut back[..3]);
        assert_eq!(&back[..3], b"end");
        assert!(weak.upgrade().is_some(), "the slices keep the memory mapped");
        slices.clear();
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn slices_that_are_used_again_keep_what_they_were_used_for_last() {
        let (old, new) = (memory(), memory());
        let weak = Arc::downgrade(&old);
        let (view, mut slices) = (GuestView::new(old), GuestIovecs::with_capacity(4));
        for len in [16, 8] {
            assert!(view.gather([(0x1000, len)].into_iter(), &mut slices) && slices.len() == len as usize);
        }
        drop(view);
        assert!(weak.upgrade().is_some());
        assert!(GuestView::new(new).gather([(0x3000, 4)].into_iter(), &mut slices) && slices.len() == 4);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_failed_gather_leaves_nothing() {
        let view = GuestView::new(memory());
        let mut slices = GuestIovecs::with_capacity(4);
        assert!(!view.gather([(0x1000, 16), (0x3fff, 2)].into_iter(), &mut slices));
        assert!(slices.is_empty() && slices.iovecs().is_empty());
        assert!(!view.gather([(u64::MAX - 1, u32::MAX)].into_iter(), &mut slices));
    }

    #[test]
    fn spans_lie_in_one_region_and_are_aligned() {
        let view = GuestView::new(memory());
        assert!(view.span(0x1f00, 0x100, 16).is_some());
        assert!(view.span(0x1f00, 0x101, 16).is_none(), "adjacent is not enough for a ring");
        assert!(view.span(0x1f08, 0x10, 16).is_none());
        assert!(view.span(0x8000, 0x10, 16).is_none());
        assert!(view.span(0x1000, usize::MAX, 16).is_none());
        let odd = Arc::new(MemoryRegions::from_ranges(&[(GuestAddress(0x1001), 0x1000)]).unwrap().into());
        assert!(GuestView::new(odd).span(0x1010, 16, 16).is_none(), "aligned for the guest, not for us");
        let span = view.span(0x1100, 16, 2).unwrap();
        span.store(2, 0xabcd, Ordering::Release);
        assert_eq!(span.load(2, Ordering::Acquire), 0xabcd);
        span.store_raw32(4, spec::used_element(0x1234, 0)[0]);
        let mut raw = [0; 6];
        assert!(view.read(0x1102, &mut raw));
        assert_eq!(raw, [0xcd, 0xab, 0x34, 0x12, 0, 0], "rings are little-endian");
        assert_eq!(spec::Descriptor::decode(span.load_raw64(0), 0).addr, 0x1234_abcd_0000);
    }
}
