//! Memory of a test's own in the guest's place.
#![allow(unsafe_code)]

use std::sync::Arc;

use diffdisk::storage::Slices;

/// Guest memory: on the heap, kept by whoever holds the slices' owner.
pub struct Memory(Arc<Box<[u8]>>);

impl Memory {
    pub fn new(bytes: &[u8]) -> Memory {
        Memory(Arc::new(bytes.into()))
    }

    /// Slices over it, cut at `cuts` to look like a guest's scattered buffers.
    pub fn slices(&self, cuts: &[usize]) -> Slices {
        let mut slices = Slices::with_capacity(4);
        slices.set_owner(self.0.clone());
        let start = self.0.as_ptr().cast_mut();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([self.0.len()]) {
            let cut = cut.clamp(at, self.0.len());
            // SAFETY: inside the boxed slice, which the owner keeps; the test looks at it only when no request is under
            // way, through a copy.
            unsafe { slices.push(start.wrapping_add(at), cut - at) };
            at = cut;
        }
        slices
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: a valid slice; no operation is under way on it.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len()) }.to_vec()
    }
}
