//! Memory that operations read into and write from: buffers of this process, or guest memory.
//!
//! An operation owns its payload until its completion returns it. The memory is not freed or reused earlier, because
//! the kernel may still access it.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use super::prefetch::{self, PAGE};

/// Alignment of [`Buffer`] in bytes: a page. O_DIRECT is not used for files that require more.
pub const BUFFER_ALIGN: usize = 4096;

/// Heap memory that is aligned for O_DIRECT.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Buffer is the only owner of its memory, like a Box<[u8]>, and the memory is not tied to a thread.
unsafe impl Send for Buffer {}
// SAFETY: a `&Buffer` gives access only to a `&[u8]`, which any number of threads may read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Allocates `len` > 0 zero bytes. The caller must check a `len` that comes from untrusted input.
    pub fn zeroed(len: usize) -> Buffer {
        assert!(len > 0, "a buffer has at least a byte");
        let layout = Self::layout(len);
        // SAFETY: the layout has a size > 0, as asserted.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Buffer { start, len }
    }

    /// Copies `bytes`, of which there must be at least one.
    pub fn copy_of(bytes: &[u8]) -> Buffer {
        let mut b = Buffer::zeroed(bytes.len());
        b.copy_from_slice(bytes);
        b
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BUFFER_ALIGN).expect("lengths are far below isize::MAX")
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to an allocation of `len` bytes, initialised by `alloc_zeroed`, which lives as long as
        // self. Shared access to self excludes `deref_mut`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` points to an allocation of `len` bytes, initialised by `alloc_zeroed`, which lives as long as
        // self. `&mut self` excludes all other access.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `zeroed` allocated the memory with the same layout, and only this drop frees it.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

/// Runs of guest memory, with an owner that keeps them mapped.
///
/// The running guest may change the bytes at any time. So no `&[u8]` of them ever exists: they are passed to the
/// kernel, or copied by raw pointers.
///
/// The list is boxed because it is moved often: without the box, the moves took a tenth of this process's CPU time for
/// a read.
pub struct GuestIovecs(Box<IovecList>);

struct IovecList {
    runs: Vec<libc::iovec>,
    len: usize,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: by the contract of `push`, the runs stay mapped while `owner` exists, and this value holds `owner`, which is
// Send + Sync. Mapped memory is not tied to a thread. The bytes are accessed only by raw pointers, never by references.
unsafe impl Send for GuestIovecs {}

impl GuestIovecs {
    /// Creates an empty list with capacity for `runs` runs, which `owner` keeps mapped.
    pub fn new(owner: Arc<dyn Any + Send + Sync>, runs: usize) -> GuestIovecs {
        let mut iovecs = GuestIovecs::with_capacity(runs);
        iovecs.0.owner = Some(owner);
        iovecs
    }

    /// Creates an empty list without an owner, with capacity for `runs` runs. [`GuestIovecs::reset`] sets the owner.
    pub fn with_capacity(runs: usize) -> GuestIovecs {
        GuestIovecs(Box::new(IovecList { runs: Vec::with_capacity(runs), len: 0, owner: None }))
    }

    /// Removes all runs and the owner. Keeps the allocation.
    pub fn clear(&mut self) {
        self.0.runs.clear();
        self.0.len = 0;
        self.0.owner = None;
    }

    /// Removes all runs, and sets the owner of the runs that are pushed next. Does not change the reference count if
    /// the owner is the same as before.
    #[inline]
    pub fn reset(&mut self, owner: &Arc<dyn Any + Send + Sync>) {
        self.0.runs.clear();
        self.0.len = 0;
        if !self.0.owner.as_ref().is_some_and(|before| Arc::ptr_eq(before, owner)) {
            self.0.owner = Some(owner.clone());
        }
    }

    /// Appends a run. A run that directly follows the last one in memory is merged with it.
    ///
    /// # Safety
    /// The list has an owner, and `start .. start + len` stays mapped, readable and writable as long as that owner
    /// exists.
    pub unsafe fn push(&mut self, start: *mut u8, len: usize) {
        debug_assert!(self.0.owner.is_some(), "runs have an owner");
        if len == 0 {
            return;
        }
        self.0.len = self.0.len.checked_add(len).expect("mapped memory is below 2^63 bytes");
        match self.0.runs.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start => last.iov_len += len,
            _ => self.0.runs.push(libc::iovec { iov_base: start.cast(), iov_len: len }),
        }
    }

    /// Returns the total length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Returns whether the total length is 0.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Returns the runs as iovecs.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.0.runs
    }

    /// Appends the runs of `len` bytes from byte `at` of this list to `out`, and gives `out` the same owner.
    ///
    /// # Panics
    /// If the range exceeds the list, or `out` has runs of another owner, which would no longer be kept mapped.
    pub fn slice_into(&self, at: usize, len: usize, out: &mut GuestIovecs) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.0.len), "a slice lies in its whole");
        if out.is_empty() {
            out.0.owner.clone_from(&self.0.owner);
        } else {
            let owners = self.0.owner.as_ref().zip(out.0.owner.as_ref());
            assert!(owners.is_some_and(|(a, b)| Arc::ptr_eq(a, b)), "all runs have one owner");
        }
        let (mut skip, mut left) = (at, len);
        for run in &self.0.runs {
            if left == 0 {
                break;
            }
            if skip >= run.iov_len {
                skip -= run.iov_len;
                continue;
            }
            let n = left.min(run.iov_len - skip);
            // SAFETY: by the contract of `push`, every run of self stays mapped, readable and writable while its owner
            // exists. `out` has the same owner: it was set or checked above.
            unsafe { out.push(run.iov_base.cast::<u8>().wrapping_add(skip), n) };
            skip = 0;
            left -= n;
        }
    }

    /// Makes the processor walk the page tables for all runs, without waiting.
    #[inline]
    pub fn prefetch_pages(&self) {
        self.0.runs.iter().for_each(|run| prefetch::prefetch_pages(run.iov_base.cast(), run.iov_len));
    }

    /// Writes zeros over `len` bytes from byte `at`.
    pub fn zero(&self, at: usize, len: usize) {
        self.for_each_run(at, len, |_, start, n| {
            // SAFETY: `for_each_run` passes parts of runs. By the contract of `push` they stay mapped and writable
            // while the owner exists, and self holds the owner. Guest memory is accessed only by raw pointers, so no
            // reference to it exists.
            unsafe { start.write_bytes(0, n) }
        });
    }

    /// Copies `from` over the bytes from `at` on.
    pub fn copy_from(&self, at: usize, from: &[u8]) {
        self.for_each_run(at, from.len(), |done, start, n| {
            // SAFETY: `for_each_run` passes parts of runs. By the contract of `push` they stay mapped and writable
            // while the owner exists, and self holds the owner. Guest memory is accessed only by raw pointers, so the
            // part does not overlap `from`, which is borrowed. The slice of `from` has `n` bytes.
            unsafe { std::ptr::copy_nonoverlapping(from[done..done + n].as_ptr(), start, n) }
        });
    }

    /// Copies the bytes from `at` on into `to`.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        let len = to.len();
        self.for_each_run(at, len, |done, start, n| {
            // SAFETY: `for_each_run` passes parts of runs. By the contract of `push` they stay mapped and readable
            // while the owner exists, and self holds the owner. Guest memory is accessed only by raw pointers, so the
            // part does not overlap `to`, which is borrowed exclusively. The slice of `to` has `n` bytes.
            unsafe { std::ptr::copy_nonoverlapping(start, to[done..done + n].as_mut_ptr(), n) }
        });
    }

    /// Reads a byte of each page, so that the SIGBUS handler (`sigbus.rs`) marks the mapping of an unavailable page as
    /// lost.
    pub fn touch_pages(&self) {
        for run in &self.0.runs {
            let start = run.iov_base.cast::<u8>();
            for at in (0..run.iov_len).step_by(PAGE).chain([run.iov_len - 1]) {
                // SAFETY: a byte of a run. By the contract of `push` the run stays mapped and readable while the owner
                // exists, and self holds the owner. Guest memory is accessed only by raw pointers, so no reference to
                // the byte exists.
                let _ = unsafe { start.wrapping_add(at).read_volatile() };
            }
        }
    }

    /// Calls `f(position, address, length)` for each run, or part of a run, in the range of `len` bytes from `at`. The
    /// position is counted from `at`.
    pub(super) fn for_each_run(&self, at: usize, len: usize, mut f: impl FnMut(usize, *mut u8, usize)) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.0.len), "a slice lies in its whole");
        let (mut skip, mut done) = (at, 0);
        for run in &self.0.runs {
            if done == len {
                break;
            }
            if skip >= run.iov_len {
                skip -= run.iov_len;
                continue;
            }
            let n = (len - done).min(run.iov_len - skip);
            f(done, run.iov_base.cast::<u8>().wrapping_add(skip), n);
            skip = 0;
            done += n;
        }
    }

    /// Returns whether all runs begin and end at multiples of `align` (a power of two), as O_DIRECT requires.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.0.runs.iter().all(|r| (r.iov_base as usize | r.iov_len) & (align - 1) == 0)
    }
}

impl std::fmt::Debug for GuestIovecs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestIovecs({} runs, {} bytes)", self.0.runs.len(), self.0.len)
    }
}

/// Memory of an operation.
#[derive(Debug, Default)]
pub enum Payload {
    /// No memory: for syncs and operations on ranges.
    #[default]
    None,
    /// Memory of this process.
    Own(Buffer),
    /// Guest memory.
    Guest(GuestIovecs),
}

impl Payload {
    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Own(b) => b.len(),
            Payload::Guest(s) => s.len(),
        }
    }

    /// Returns whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovecs(memory: &mut [u8], runs: &[(usize, usize)]) -> GuestIovecs {
        let mut s = GuestIovecs::new(Arc::new(()), runs.len());
        for &(at, len) in runs {
            assert!(at + len <= memory.len());
            // SAFETY: the tests keep `memory` alive and unborrowed while they use the runs.
            unsafe { s.push(memory.as_mut_ptr().wrapping_add(at), len) };
        }
        s
    }

    #[test]
    #[should_panic(expected = "all runs have one owner")]
    fn runs_of_two_owners_do_not_mix() {
        let (mut memory, mut other) = ([0; 8], [0; 8]);
        let mut out = iovecs(&mut memory, &[(0, 4)]);
        iovecs(&mut other, &[(0, 4)]).slice_into(0, 4, &mut out);
    }

    #[test]
    fn buffers_are_aligned_and_zero() {
        let b = Buffer::zeroed(700);
        assert_eq!(b.as_ptr() as usize % BUFFER_ALIGN, 0);
        assert!(b.iter().all(|&x| x == 0) && b.len() == 700);
        assert_eq!(&*Buffer::copy_of(b"abc"), b"abc");
    }

    #[test]
    fn adjacent_runs_merge_and_slices_are_parts() {
        let mut memory = vec![0u8; 100];
        let s = iovecs(&mut memory, &[(0, 10), (10, 10), (50, 20), (30, 0)]);
        assert_eq!((s.len(), s.iovecs().len()), (40, 2));
        let mut part = GuestIovecs::with_capacity(4);
        s.slice_into(15, 10, &mut part);
        part.copy_from(0, b"0123456789");
        let mut back = [0; 12];
        s.copy_to(14, &mut back);
        assert_eq!(&back, b"\x000123456789\0");
        s.zero(16, 2);
        part.copy_to(0, &mut back[..10]);
        assert_eq!(&back[..10], b"0\0\x003456789");
        drop((s, part));
        assert_eq!(&memory[15..20], b"0\0\x0034");
        assert_eq!(&memory[50..55], b"56789");
    }
}
