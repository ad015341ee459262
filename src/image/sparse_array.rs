//! A sparse array, with memory only for the pages that `get_or_init` has accessed.
//!
//! A 1 TiB image has half a million blocks and is mostly empty. Flat arrays of an element per block, for 64 layers,
//! would dominate the daemon's memory. Pages of [`PAGE`] elements are initialized on first use and live as long as the
//! array, so references to elements stay valid and a look-up takes no lock.

use std::sync::OnceLock;

/// Elements per page.
const PAGE: usize = 512;

/// A sparse array of `len` elements. Its pages are initialized by `init` on first use.
#[derive(Debug)]
pub struct SparseArray<T> {
    pages: Box<[OnceLock<Box<[T]>>]>,
    len: usize,
    init: fn() -> T,
}

impl<T> SparseArray<T> {
    /// Creates an array of `len` elements. `init` makes each element when its page is initialized.
    pub fn new(len: usize, init: fn() -> T) -> SparseArray<T> {
        let pages = std::iter::repeat_with(OnceLock::new).take(len.div_ceil(PAGE)).collect();
        SparseArray { pages, len, init }
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the array has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns element `at`, which is less than `len`; `None` if its page is not initialized.
    #[inline]
    pub fn get(&self, at: usize) -> Option<&T> {
        debug_assert!(at < self.len, "an index inside the array");
        Some(&self.pages[at / PAGE].get()?[at % PAGE])
    }

    /// Returns element `at`, which is less than `len`, after initializing its page if needed.
    pub fn get_or_init(&self, at: usize) -> &T {
        assert!(at < self.len, "an index inside the array");
        let page = self.pages[at / PAGE].get_or_init(|| std::iter::repeat_with(self.init).take(PAGE).collect());
        &page[at % PAGE]
    }

    /// Returns the elements of initialized pages with their indices, ascending. The last page may have elements at or
    /// after index `len`.
    pub fn initialized(&self) -> impl Iterator<Item = (usize, &T)> {
        self.initialized_from(0)
    }

    /// Returns the elements of initialized pages at or after index `at`, with their indices, ascending.
    pub fn initialized_from(&self, at: usize) -> impl Iterator<Item = (usize, &T)> {
        let pages = self.pages.iter().enumerate().skip(at / PAGE).filter_map(|(n, p)| Some((n, p.get()?)));
        pages.flat_map(move |(n, page)| {
            let skip = at.saturating_sub(n * PAGE);
            (n * PAGE + skip..).zip(page.iter().skip(skip))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn only_used_pages_take_memory() {
        let t = SparseArray::new(10 * PAGE + 3, || AtomicU32::new(7));
        assert!(t.get(5 * PAGE).is_none());
        t.get_or_init(5 * PAGE + 1).store(9, Ordering::Relaxed);
        assert_eq!(t.get(5 * PAGE).unwrap().load(Ordering::Relaxed), 7);
        assert_eq!(t.get(5 * PAGE + 1).unwrap().load(Ordering::Relaxed), 9);
        assert_eq!(t.initialized().count(), PAGE);
        assert_eq!(t.initialized().next().unwrap().0, 5 * PAGE);
        assert_eq!(t.initialized_from(5 * PAGE + 7).next().unwrap().0, 5 * PAGE + 7);
        assert_eq!((t.initialized_from(3).count(), t.initialized_from(6 * PAGE).count()), (PAGE, 0));
        t.get_or_init(10 * PAGE + 2);
    }
}
