//! A table that is as large as a disk but takes memory only where it was touched.
//!
//! A 1 TiB image has half a million blocks and is mostly empty; with 64 layers a flat table of each would dominate
//! the daemon's memory. Pages of [`PAGE`] elements are made on first touch and live as long as the table, so a
//! reference to an element stays good and a look-up takes no lock.

use std::sync::OnceLock;

/// Elements in a page.
const PAGE: usize = 512;

/// A sparse array of `len` elements, all `fresh()` until touched.
#[derive(Debug)]
pub struct SparseArray<T> {
    pages: Box<[OnceLock<Box<[T]>>]>,
    len: usize,
    init: fn() -> T,
}

impl<T> SparseArray<T> {
    /// A table of `len` elements.
    pub fn new(len: usize, fresh: fn() -> T) -> SparseArray<T> {
        let pages = std::iter::repeat_with(OnceLock::new).take(len.div_ceil(PAGE)).collect();
        SparseArray { pages, len, init: fresh }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the table has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element, or `None` where nothing on its page was ever touched (it is as `fresh()`). `at` < `len`.
    #[inline]
    pub fn get(&self, at: usize) -> Option<&T> {
        debug_assert!(at < self.len, "an index inside the table");
        Some(&self.pages[at / PAGE].get()?[at % PAGE])
    }

    /// The element, its page being made if need be. `at` < `len`.
    pub fn get_or_init(&self, at: usize) -> &T {
        assert!(at < self.len, "an index inside the table");
        let page = self.pages[at / PAGE].get_or_init(|| std::iter::repeat_with(self.init).take(PAGE).collect());
        &page[at % PAGE]
    }

    /// Every element of every touched page with its index, ascending; some lie beyond `len` on the last page.
    pub fn initialized(&self) -> impl Iterator<Item = (usize, &T)> {
        self.initialized_from(0)
    }

    /// As `touched`, from element `at` on.
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
    fn memory_only_where_touched() {
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
