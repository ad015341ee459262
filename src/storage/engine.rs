//! The engine interface: carries out operations, many at a time, for one thread.

use std::io;
use std::os::fd::BorrowedFd;

use super::backend::File;
use super::op::{Completion, FileSlot, Op};
use super::pagecache::range::CachedRange;
use super::payload::GuestIovecs;

/// Asynchronous I/O for one thread: io_uring, blocking calls, or a simulation.
///
/// An implementation guarantees:
///
/// - `push` makes no system call.
/// - Completions arrive in any order. Each operation completes exactly once, either in full or with an error.
/// - The memory of an operation is not freed while the kernel may access it. If the engine is dropped, it waits for the
///   operations in flight; if it cannot wait, it leaks their memory.
///
/// The caller guarantees:
///
/// - A slot is registered before an operation uses it, and is not registered again while operations on it are in
///   flight.
/// - Reads and writes have a payload of at least one byte.
pub trait Engine: Send {
    /// Registers a file in `slot`, replacing the file that was there.
    ///
    /// # Errors
    /// If the slot number is too large, the file belongs to another host, or the kernel refuses.
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()>;

    /// Removes the file from `slot`, so that the kernel can close it (and free its space if it has no name). No
    /// operation on the slot may be outstanding.
    ///
    /// # Errors
    /// If the slot number is too large, or the kernel refuses.
    fn unregister(&mut self, slot: FileSlot) -> io::Result<()>;

    /// Finds `len` bytes at `offset` of a file in the page cache. Returns `None` if some of these bytes are not known
    /// to be resident: the caller then needs a read operation. Makes no system call.
    fn find_cached(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        let _ = (slot, offset, len);
        None
    }

    /// Copies a range that [`Engine::find_cached`] returned to `into`, beginning at byte `at` of `into`. The file must
    /// still be registered in the same slot. Returns false if the copy may be incomplete: the caller then repeats the
    /// read as an operation, which reports any error.
    fn copy_cached(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let _ = (found, into, at);
        false
    }

    /// Ends a batch of [`Engine::copy_cached`] calls. The engine measures whether the batch waited for the disk.
    fn end_copy_batch(&mut self) {}

    /// Queries the kernel for the page cache residency of ranges that recent `find_cached` calls missed. Makes system
    /// calls, so callers first pass on all pending completions.
    fn query_residency(&mut self) {}

    /// Returns the number of copies made so far (for statistics and tests).
    fn copy_count(&self) -> u64 {
        0
    }

    /// Adds an operation to the next `submit`. Makes no system call.
    ///
    /// # Errors
    /// Returns the operation if `depth` operations are outstanding.
    fn push(&mut self, op: Op) -> Result<(), Op>;

    /// Submits all pushed operations, in one system call if the kernel allows it.
    ///
    /// # Errors
    /// If the kernel refuses the operations. The engine cannot be used after an error.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends available completions to `out`. Never waits.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Submits all pushed operations and waits until a completion is available. Returns at once if nothing is
    /// outstanding.
    ///
    /// # Errors
    /// Those of `submit`.
    fn wait(&mut self) -> io::Result<()>;

    /// Returns a descriptor that is readable (level-triggered) while completions may be available. `None` means that
    /// there is no such descriptor: the caller calls `reap` after `submit`, and `wait` while operations are
    /// outstanding.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Returns the number of operations that were pushed and not yet reaped.
    fn outstanding(&self) -> usize;

    /// Returns the maximum number of outstanding operations.
    fn depth(&self) -> usize;

    /// Returns the number of system calls made so far for operations (for statistics and tests).
    fn system_calls(&self) -> u64;

    /// Returns the engine's name for logs: `io_uring`, `blocking` or `simulated`.
    fn name(&self) -> &'static str;
}
