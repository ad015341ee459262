//! The interface of an engine, which carries out operations, many at a time, for one thread; and of its page cache.

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

    /// Creates an object that copies from the page cache what this engine would read by operations. It has no files
    /// yet. Returns `None` if every read has to be an operation.
    // These are not methods of the engine, because callers need them apart from it: a read that is not found becomes an
    // operation while the reads after it are still looked up, and a caller that wants no copies creates no object, so
    // that no file is ever mapped. A look-up and a copy cost one virtual call per range, as they would in the engine.
    fn page_cache(&self) -> Option<Box<dyn PageCache>> {
        None
    }

    /// Adds an operation to the next `submit`. Makes no system call.
    ///
    /// # Errors
    /// Returns the operation if `depth` operations are outstanding.
    fn push(&mut self, op: Op) -> Result<(), Op>;

    /// Submits all pushed operations. An engine over io_uring usually makes one system call for them, and one for each
    /// write that it tries without the ring.
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

    /// Returns a descriptor that is readable (level-triggered) while completions of operations in flight may be
    /// available. Operations that `submit` itself completes do not make the descriptor readable, so the caller calls
    /// `reap` after `submit`. `None` means that there is no such descriptor: the caller also calls `wait` while
    /// operations are outstanding.
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

/// Reads by copies from the page cache, for one thread. A caller first finds the ranges of a batch of reads, and then
/// copies them.
pub trait PageCache: Send {
    /// Registers a file in `slot`, replacing the file that was there.
    ///
    /// # Errors
    /// If the slot number is too large, or the file belongs to another host.
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()>;

    /// Removes the file from `slot`.
    fn unregister(&mut self, slot: FileSlot);

    /// Finds `len` bytes at `offset` of a file. Returns `None` if some of these bytes are not known to be resident: the
    /// caller then needs a read operation. Makes no system call.
    fn find(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange>;

    /// Copies a range that [`PageCache::find`] returned to `into`, beginning at byte `at` of `into`. The file must
    /// still be registered in the same slot. Returns false if the copy may be incomplete: the caller then repeats the
    /// read as an operation, which reports any error.
    fn copy(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool;

    /// Ends a batch of copies, and evaluates whether the batch waited for the disk. To be called directly after the
    /// last copy, since the time until this call counts as time of the batch.
    fn end_batch(&mut self);

    /// Queries the kernel for the residency of ranges that recent [`PageCache::find`] calls missed. Makes system calls,
    /// so callers first pass on all pending completions.
    fn query_residency(&mut self);
}
