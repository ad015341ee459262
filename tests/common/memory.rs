//! Memory of a test's own in the guest's place.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::Arc;

use diffdisk::storage::GuestIovecs;

/// Guest memory on the heap. The slices over it share its ownership.
pub struct TestMemory(Arc<HeapBytes>);

struct HeapBytes(Box<[UnsafeCell<u8>]>);

// SAFETY: the bytes are reached through raw pointers only, by one request or by the test at a time.
unsafe impl Sync for HeapBytes {}

impl TestMemory {
    pub fn new(bytes: &[u8]) -> TestMemory {
        TestMemory(Arc::new(HeapBytes(bytes.iter().copied().map(UnsafeCell::new).collect())))
    }

    /// Slices over it, cut at `cuts` to look like a guest's scattered buffers.
    pub fn iovecs(&self, cuts: &[usize]) -> GuestIovecs {
        let bytes = &self.0.0;
        let mut slices = GuestIovecs::new(self.0.clone(), 4);
        let start = UnsafeCell::raw_get(bytes.as_ptr());
        let mut at = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let cut = cut.clamp(at, bytes.len());
            // SAFETY: inside the boxed slice, which the owner keeps; its bytes may be written through shared references.
            unsafe { slices.push(start.wrapping_add(at), cut - at) };
            at = cut;
        }
        slices
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: a byte of the slice; no operation is under way on it.
        self.0.0.iter().map(|byte| unsafe { *byte.get() }).collect()
    }
}
