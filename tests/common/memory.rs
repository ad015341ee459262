//! Heap memory that tests use as guest memory.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::Arc;

use diffdisk::storage::GuestIovecs;

/// Guest memory on the heap. Iovecs over the memory share its ownership.
pub struct TestMemory(Arc<HeapBytes>);

struct HeapBytes(Box<[UnsafeCell<u8>]>);

// SAFETY: the bytes are accessed through raw pointers only. A test accesses them while no request over these bytes is
// in flight, and gives each range to one request at a time, so no two threads access a byte at once.
unsafe impl Sync for HeapBytes {}

impl TestMemory {
    pub fn new(bytes: &[u8]) -> TestMemory {
        TestMemory(Arc::new(HeapBytes(bytes.iter().copied().map(UnsafeCell::new).collect())))
    }

    /// Returns iovecs over the memory, split at `cuts` like a guest's scattered buffers.
    pub fn iovecs(&self, cuts: &[usize]) -> GuestIovecs {
        let bytes = &self.0.0;
        let mut slices = GuestIovecs::new(self.0.clone(), 4);
        let start = UnsafeCell::raw_get(bytes.as_ptr());
        let mut at = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let cut = cut.clamp(at, bytes.len());
            // SAFETY: `cut` is clamped to `at ..= bytes.len()`, so the range lies in the boxed slice. The list owns a
            // clone of the `Arc`, which keeps the slice allocated. The bytes are `UnsafeCell`s, so they may be written
            // through shared references.
            unsafe { slices.push(start.wrapping_add(at), cut - at) };
            at = cut;
        }
        slices
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: the pointer is that of an `UnsafeCell` that `self` keeps alive. Tests call this function only while
        // no request over the memory is in flight, so no other thread writes the byte.
        self.0.0.iter().map(|byte| unsafe { *byte.get() }).collect()
    }
}
