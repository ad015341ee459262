//! Guest memory as one queue uses it: guest addresses are checked and translated to iovecs of this process.
//!
//! A [`GuestView`] belongs to one thread. It caches the region of the last look-up, since most buffers of a guest lie
//! in one region. The [`GuestIovecs`] of a view share a reference count that belongs to the view, so that queues do not
//! contend for one counter.
//!
//! The guest may change any byte at any time. So this module copies or loads bytes once before they are used, and never
//! creates a reference to guest memory.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::spec;
use crate::storage::sigbus::Guard;
use crate::storage::{GuestIovecs, prefetch_line};

/// The mapped regions of a guest's memory.
pub type MemoryRegions = vm_memory::GuestMemoryMmap<()>;
/// The regions of a guest's memory. They are replaced as a whole when the front-end changes them.
pub type AtomicMemory = vm_memory::GuestMemoryAtomic<MemoryRegions>;

/// Guest memory that a front-end shared, with the guards of its mappings.
///
/// Pages can be lost at any time: the front-end may truncate the memory file, or the kernel may have no memory for a
/// page. Then accesses of this process read zeros, [`SharedMemory::is_lost`] returns true, and accesses of the kernel
/// fail with EFAULT.
#[derive(Debug, Default)]
pub struct SharedMemory {
    // Declared before the mappings that the guards protect, so that the guards are dropped first.
    guards: Vec<Arc<Guard>>,
    regions: Arc<MemoryRegions>,
}

impl SharedMemory {
    /// Creates guest memory from its regions and the guards of their mappings.
    pub fn new(regions: MemoryRegions, guards: Vec<Arc<Guard>>) -> SharedMemory {
        SharedMemory { guards, regions: Arc::new(regions) }
    }

    /// The regions of the memory.
    pub fn regions(&self) -> &Arc<MemoryRegions> {
        &self.regions
    }

    /// Whether a page of the memory is lost.
    pub fn is_lost(&self) -> bool {
        self.guards.iter().any(|guard| guard.is_lost())
    }
}

/// Creates guest memory without guards, for regions that only this process maps. No page of such memory can be lost.
impl From<MemoryRegions> for SharedMemory {
    fn from(regions: MemoryRegions) -> SharedMemory {
        SharedMemory::new(regions, Vec::new())
    }
}

/// Guest memory as one queue uses it.
pub struct GuestView {
    /// Sorted by address, disjoint.
    regions: Vec<ViewRegion>,
    last_region: Cell<usize>,
    /// Keeps all regions mapped: an `Arc` of this view around the `Arc` that all views share.
    owner: Arc<dyn Any + Send + Sync>,
    memory: Arc<SharedMemory>,
}

struct ViewRegion {
    start: u64,
    len: usize,
    map: Arc<MmapRegion<()>>,
}

impl ViewRegion {
    /// Returns the offset of an address in the region, or `None` if the region does not contain the address.
    #[inline]
    fn offset(&self, addr: u64) -> Option<usize> {
        let offset = usize::try_from(addr.checked_sub(self.start)?).ok()?;
        (offset < self.len).then_some(offset)
    }
}

impl GuestView {
    /// Creates the view of one queue.
    pub fn new(memory: Arc<SharedMemory>) -> GuestView {
        let region = |r: &vm_memory::GuestRegionMmap<()>| ViewRegion {
            start: r.start_addr().raw_value(),
            len: r.get_mmap().size(),
            map: r.get_mmap(),
        };
        let regions = memory.regions.iter().map(region).collect();
        let owner = Arc::new(memory.clone());
        GuestView { regions, last_region: Cell::new(0), owner, memory }
    }

    /// Whether a page of the memory is lost.
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// Returns the region that contains an address, and the offset of the address in the region.
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

    /// Splits a range, which may span adjacent regions, into pieces, and calls `f(start, length, offset of the piece in
    /// the range)` for each. Returns false, possibly after some calls, if part of the range is not guest memory (V6). A
    /// piece is not empty and lies inside one region, which `owner` keeps mapped.
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

    /// Prefetches the cache line of a guest address, if the address is guest memory.
    #[inline]
    pub fn prefetch(&self, addr: u64) {
        if let Some((region, offset)) = self.locate(addr) {
            prefetch_line(region.map.as_ptr().wrapping_add(offset));
        }
    }

    /// Whether all of a range is guest memory.
    #[inline]
    pub fn contains(&self, addr: u64, len: usize) -> bool {
        self.for_each_piece(addr, len, |_, _, _| ())
    }

    /// Reads an array, each byte once (V5). Returns `None` if part of it is not guest memory.
    #[inline]
    pub fn read_array<const N: usize>(&self, addr: u64) -> Option<[u8; N]> {
        let mut into = [0; N];
        self.read(addr, &mut into).then_some(into)
    }

    /// Reads a range into `into`, each byte once (V5). Returns false if part of the range is not guest memory.
    #[inline]
    pub fn read(&self, addr: u64, into: &mut [u8]) -> bool {
        let whole = self.for_each_piece(addr, into.len(), |from, n, at| {
            // SAFETY: `for_each_piece` passes `n` bytes inside a region that `self.owner` keeps mapped, so `from` is
            // readable. The slice of `into` has `n` bytes and is exclusively borrowed. Source and target do not
            // overlap, since guest memory is mapped apart from all Rust objects. Both are aligned, since bytes have no
            // alignment. The guest may write while the bytes are copied; they are untrusted, and any value is valid for
            // `u8`.
            unsafe { ptr::copy_nonoverlapping(from, into[at..at + n].as_mut_ptr(), n) };
        });
        // The compiler must not read guest memory again in place of reading the copy.
        compiler_fence(Ordering::SeqCst);
        whole
    }

    /// Writes `from` to a range. Returns false, and writes nothing, if part of the range is not guest memory.
    pub fn write(&self, addr: u64, from: &[u8]) -> bool {
        self.contains(addr, from.len())
            && self.for_each_piece(addr, from.len(), |to, n, at| {
                // SAFETY: `for_each_piece` passes `n` bytes inside a region that `self.owner` keeps mapped, and all
                // regions are mapped writable, so `to` is writable. The slice of `from` has `n` initialised bytes.
                // Source and target do not overlap, since guest memory is mapped apart from all Rust objects. Both are
                // aligned, since bytes have no alignment. No Rust reference to guest memory exists that the store could
                // invalidate.
                unsafe { ptr::copy_nonoverlapping(from[at..at + n].as_ptr(), to, n) };
            })
    }

    /// Writes one byte. Returns false if the address is not guest memory.
    #[inline]
    pub fn write_byte(&self, addr: u64, byte: u8) -> bool {
        let there = self.for_each_piece(addr, 1, |to, _, _| {
            // SAFETY: `for_each_piece` passes a byte inside a region that `self.owner` keeps mapped, and all regions
            // are mapped writable, so `to` is valid for reads and writes during the store. Any address is aligned for a
            // byte. No Rust reference to guest memory exists. The guest may access the byte meanwhile; this process
            // accesses it by atomics and raw pointers only, and any value is valid.
            unsafe { AtomicU8::from_ptr(to) }.store(byte, Ordering::Relaxed);
        });
        #[cfg(test)]
        super::store_counter::count_store();
        there
    }

    /// Fills `out` with the given ranges of `(address, length)`. Returns false, and leaves `out` empty, if part of them
    /// is not guest memory.
    pub fn gather(&self, ranges: impl Iterator<Item = (u64, u32)>, out: &mut GuestIovecs) -> bool {
        out.reset(&self.owner);
        for (addr, len) in ranges {
            let whole = self.for_each_piece(addr, len as usize, |start, n, _| {
                // SAFETY: `for_each_piece` passes `n` bytes inside a region of `self.owner`, which unmaps its regions
                // only when it is dropped. `out.reset` above gave `out` a reference to `self.owner`, so the bytes stay
                // mapped as long as `out` contains them. Regions are mapped readable and writable.
                unsafe { out.push(start, n) }
            });
            if !whole {
                out.clear();
                return false;
            }
        }
        true
    }

    /// Returns the checked range of `len` bytes at `addr`. Returns `None` if the range does not lie in one region, or
    /// if its guest address or its address in this process is not a multiple of `align`.
    pub fn span(&self, addr: u64, len: usize, align: usize) -> Option<GuestSpan> {
        let (region, at) = self.locate(addr)?;
        let inside = at.checked_add(len).is_some_and(|end| end <= region.len);
        let start = region.map.as_ptr().wrapping_add(at);
        let aligned = addr.is_multiple_of(align as u64) && (start as usize).is_multiple_of(align);
        (inside && aligned).then(|| GuestSpan { start, len, _memory: self.memory.clone() })
    }
}

/// A checked range of guest memory that stays mapped: a descriptor table or a ring.
pub struct GuestSpan {
    start: *mut u8,
    len: usize,
    /// Keeps the range mapped.
    _memory: Arc<SharedMemory>,
}

// SAFETY: `start` points to memory that `_memory` keeps mapped for all threads of the process until the span is
// dropped. All accesses through a span are atomic, and no Rust reference to the memory is created. So any thread may
// use and drop a span.
unsafe impl Send for GuestSpan {}

impl GuestSpan {
    /// Returns a pointer to the word at byte `at`, which is mapped as long as the span exists. Panics if the word is
    /// not aligned or not inside the span.
    #[inline]
    fn word_ptr<T>(&self, at: usize) -> *mut T {
        let place = self.start.wrapping_add(at).cast::<T>();
        assert!(
            at + size_of::<T>() <= self.len && place.is_aligned(),
            "a word of a ring is aligned and inside the ring"
        );
        place
    }

    /// Prefetches the cache line of byte `at`.
    #[inline]
    pub fn prefetch(&self, at: usize) {
        prefetch_line(self.start.wrapping_add(at));
    }

    /// Loads the 16-bit word at byte `at`. `at` must be even.
    #[inline]
    pub fn load(&self, at: usize, order: Ordering) -> u16 {
        // SAFETY: `word_ptr` asserts that the word is aligned and inside the span. `_memory` keeps the span mapped,
        // readable and writable. This process accesses rings by atomics only, unless a hostile driver puts a buffer
        // into a ring: then a copy of untrusted bytes may race with this access, and any value of the word is valid.
        spec::le16(unsafe { AtomicU16::from_ptr(self.word_ptr(at)) }.load(order))
    }

    /// Stores a 16-bit word at byte `at`. `at` must be even.
    #[inline]
    pub fn store(&self, at: usize, word: u16, order: Ordering) {
        // SAFETY: `word_ptr` asserts that the word is aligned and inside the span. `_memory` keeps the span mapped,
        // readable and writable. This process accesses rings by atomics only, unless a hostile driver puts a buffer
        // into a ring: then a copy of untrusted bytes may race with this access, and any value of the word is valid.
        unsafe { AtomicU16::from_ptr(self.word_ptr(at)) }.store(spec::le16(word), order);
        #[cfg(test)]
        super::store_counter::count_store();
    }

    /// Loads the 64-bit word at byte `at`, in the guest's byte order. Its address must be a multiple of 8.
    #[inline]
    pub fn load_raw64(&self, at: usize) -> u64 {
        // SAFETY: `word_ptr` asserts that the word is aligned and inside the span. `_memory` keeps the span mapped,
        // readable and writable. This process accesses rings by atomics only, unless a hostile driver puts a buffer
        // into a ring: then a copy of untrusted bytes may race with this access, and any value of the word is valid.
        unsafe { AtomicU64::from_ptr(self.word_ptr(at)) }.load(Ordering::Relaxed)
    }

    /// Stores a 32-bit word at byte `at`, in the guest's byte order. Its address must be a multiple of 4.
    #[inline]
    pub fn store_raw32(&self, at: usize, word: u32) {
        // SAFETY: `word_ptr` asserts that the word is aligned and inside the span. `_memory` keeps the span mapped,
        // readable and writable. This process accesses rings by atomics only, unless a hostile driver puts a buffer
        // into a ring: then a copy of untrusted bytes may race with this access, and any value of the word is valid.
        unsafe { AtomicU32::from_ptr(self.word_ptr(at)) }.store(word, Ordering::Relaxed);
        #[cfg(test)]
        super::store_counter::count_store();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Two adjacent regions, a hole, and a third region near the end of the address space.
    fn memory() -> Arc<SharedMemory> {
        let top = GuestAddress(u64::MAX - 0x1fff);
        let ranges = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x2000), (top, 0x1000)];
        Arc::new(MemoryRegions::from_ranges(&ranges).unwrap().into())
    }

    #[test]
    fn ranges_span_adjacent_regions_but_no_holes() {
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
        assert!(!view.write(0x3ffe, b"abcd"), "half of the range is a hole");
        assert!(view.read(0x3ffe, &mut back[..2]) && back[..2] == [0, 0], "so nothing was written");
    }

    #[test]
    fn gathered_iovecs_are_guest_memory_and_keep_it_mapped() {
        let memory = memory();
        let view = GuestView::new(memory.clone());
        let mut iovecs = GuestIovecs::with_capacity(4);
        assert!(view.gather([(0x1ff0, 32), (0x3000, 0), (0x3000, 8)].into_iter(), &mut iovecs));
        assert_eq!(iovecs.len(), 40);
        iovecs.copy_from(14, b"0123");
        iovecs.copy_from(32, b"end");
        let mut back = [0; 4];
        memory.regions.read_slice(&mut back, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(&back, b"0123");
        let weak = Arc::downgrade(&memory);
        drop((view, memory));
        iovecs.copy_to(32, &mut back[..3]);
        assert_eq!(&back[..3], b"end");
        assert!(weak.upgrade().is_some(), "the iovecs keep the memory mapped");
        iovecs.clear();
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn reused_iovecs_keep_only_the_last_memory_mapped() {
        let (old, new) = (memory(), memory());
        let weak = Arc::downgrade(&old);
        let (view, mut iovecs) = (GuestView::new(old), GuestIovecs::with_capacity(4));
        for len in [16, 8] {
            assert!(view.gather([(0x1000, len)].into_iter(), &mut iovecs) && iovecs.len() == len as usize);
        }
        drop(view);
        assert!(weak.upgrade().is_some());
        assert!(GuestView::new(new).gather([(0x3000, 4)].into_iter(), &mut iovecs) && iovecs.len() == 4);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_failed_gather_leaves_no_iovecs() {
        let view = GuestView::new(memory());
        let mut iovecs = GuestIovecs::with_capacity(4);
        assert!(!view.gather([(0x1000, 16), (0x3fff, 2)].into_iter(), &mut iovecs));
        assert!(iovecs.is_empty() && iovecs.iovecs().is_empty());
        assert!(!view.gather([(u64::MAX - 1, u32::MAX)].into_iter(), &mut iovecs));
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
        assert!(GuestView::new(odd).span(0x1010, 16, 16).is_none(), "aligned as a guest address only");
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
