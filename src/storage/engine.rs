//! The seam to whatever carries out operations: a ring, plain calls, or a simulator.

use std::io;
use std::os::fd::BorrowedFd;

use super::env::File;
use super::host::HostFile;
use super::op::{Completion, FileSlot, Op};
use super::payload::GuestIovecs;
use super::reader::CachedRange;

/// Files that can be registered at once: a chain at its longest (256), and room for the file a snapshot or merge brings.
pub const FILE_SLOTS: u16 = 256 + 16;

/// Carries out operations, many at a time, for one thread.
///
/// An implementer promises: `push` makes no system call; completions come in any order, each operation once, whole or
/// failed; an operation's memory is not freed before its completion is reaped, not even when the engine is dropped
/// (drop waits for what is in flight; if it cannot, it leaks). It may rely on this: a slot is registered before an
/// operation names it, and not registered anew while operations on it are in flight; reads and writes have a payload
/// of at least one byte.
pub trait Engine: Send {
    /// Puts a file into the table of files, over what was there.
    ///
    /// # Errors
    /// Where the host refuses.
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()>;

    /// Takes a file out of the table, so that the host can let go of it (and give back its room, if it has no name any
    /// more). No operation on the slot is under way.
    ///
    /// # Errors
    /// Where the host refuses.
    fn unregister(&mut self, slot: FileSlot) -> io::Result<()>;

    /// Where in memory `len` bytes at `offset` of a file are, if the host is known to have them there: then they are copied
    /// ([`Engine::copy_cached`]) without a system call. None: an operation has to find them.
    fn find_cached(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        let _ = (slot, offset, len);
        None
    }

    /// Copies what was found over the bytes of `into` from `at` on; the slot is still the file's. False where that failed
    /// half-way: an operation has to find out why.
    fn copy_cached(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let _ = (found, into, at);
        false
    }

    /// To be called after a batch of `fill`.
    fn end_copy_batch(&mut self) {}

    /// Finds out more about what the host has in memory, where what was asked for makes it worth that. May make system
    /// calls: to be called when all answers are given.
    fn query_residency(&mut self) {}

    /// Copies made so far (for statistics and tests).
    fn copy_count(&self) -> u64 {
        0
    }

    /// Takes an operation for the next `submit`. Gives it back where `depth` operations are under way already.
    fn push(&mut self, op: Op) -> Result<(), Op>;

    /// Hands everything pushed to the host, in one call where the host allows.
    ///
    /// # Errors
    /// Where the host takes nothing any more; the engine is of no further use.
    fn submit(&mut self) -> io::Result<()>;

    /// Moves what is complete to the end of `out`. Never waits.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Submits what is pushed and waits until something can be reaped; returns at once if nothing is under way.
    ///
    /// # Errors
    /// As `submit`.
    fn wait(&mut self) -> io::Result<()>;

    /// Readable (level-triggered) while completions may be there to reap. None: completions are there when `submit`
    /// returns.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Operations pushed and not yet reaped.
    fn outstanding(&self) -> usize;

    /// Operations that may be under way at once.
    fn depth(&self) -> usize;

    /// System calls made so far for operations (for statistics and tests).
    fn system_calls(&self) -> u64;

    /// A word for the log: `io_uring`, `blocking`, `simulated`.
    fn name(&self) -> &'static str;
}

/// The host's file, for the engines that work on nothing else.
pub(super) fn host_file(file: &File) -> io::Result<&HostFile> {
    match file {
        File::Host(f) => Ok(f),
        #[cfg(feature = "sim")]
        File::Sim(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "a simulated file in an engine of the host")),
    }
}
