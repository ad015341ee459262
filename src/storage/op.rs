//! Operations on files, and their completions.

use std::io;

use super::payload::Payload;

/// Number of files that an engine can have registered at once: more than the 64 files of the longest chain.
pub const FILE_SLOTS: u16 = 256 + 16;

/// Index of a file in an engine's table of registered files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct FileSlot(pub u16);

impl FileSlot {
    /// Returns the index into an array with one element per slot.
    #[inline]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

/// Kind of operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Read from the file into the payload.
    Read,
    /// Write the payload to the file.
    Write,
    /// Write the payload and make only these bytes durable, with the metadata that is needed to read them back
    /// (RWF_DSYNC). The kernel may report the error of an earlier write here, so callers treat any error as a failed
    /// sync.
    WriteThrough,
    /// Make durable all writes that completed before this operation was submitted, with the metadata that is needed to
    /// read them back (fdatasync).
    Sync,
    /// Advise the kernel to begin reading the range into the page cache (posix_fadvise, WILLNEED).
    Prefetch,
    /// Advise the kernel to begin writing dirty pages of the file to the medium (sync_file_range, WRITE). Guarantees
    /// nothing. Does not consume a writeback error: the next sync still reports the error.
    StartWriteback,
    /// Allocate space for the range without changing the file's length or bytes (fallocate, KEEP_SIZE).
    Allocate,
    /// Make the range read as zeros and free its space. The length does not change.
    Punch,
    /// Make the range read as zeros and keep its space. The length does not change.
    Zero,
}

/// Operation on a file. Owns its memory until its completion returns it.
#[derive(Debug)]
pub struct Op {
    /// Value that the completion returns to the submitter. Engines ignore it.
    pub token: u64,
    /// Slot of the file.
    pub slot: FileSlot,
    /// Kind of operation.
    pub action: Action,
    /// File offset in bytes; 0 for `Sync` and `StartWriteback`.
    pub offset: u64,
    /// Length of the range in bytes. For reads and writes the length of the payload; 0 for `Sync` and `StartWriteback`.
    pub len: u64,
    /// Memory of reads and writes.
    pub payload: Payload,
}

impl Op {
    /// Creates a read that fills `into`.
    pub fn read(token: u64, slot: FileSlot, offset: u64, into: Payload) -> Op {
        Op { token, slot, action: Action::Read, offset, len: into.len() as u64, payload: into }
    }

    /// Creates a write of all of `from`.
    pub fn write(token: u64, slot: FileSlot, offset: u64, from: Payload) -> Op {
        Op { token, slot, action: Action::Write, offset, len: from.len() as u64, payload: from }
    }

    /// Creates a write of all of `from` that is durable when it completes.
    pub fn write_through(token: u64, slot: FileSlot, offset: u64, from: Payload) -> Op {
        Op { action: Action::WriteThrough, ..Op::write(token, slot, offset, from) }
    }

    /// Creates a sync of the file's data.
    pub fn sync(token: u64, slot: FileSlot) -> Op {
        Op { token, slot, action: Action::Sync, offset: 0, len: 0, payload: Payload::None }
    }

    /// Creates a hint to write the file's dirty pages.
    pub fn start_writeback(token: u64, slot: FileSlot) -> Op {
        Op { action: Action::StartWriteback, ..Op::sync(token, slot) }
    }

    /// Creates a `Prefetch`, `Allocate`, `Punch` or `Zero` operation on a range.
    pub fn range(token: u64, slot: FileSlot, action: Action, offset: u64, len: u64) -> Op {
        debug_assert!(matches!(action, Action::Prefetch | Action::Allocate | Action::Punch | Action::Zero));
        Op { token, slot, action, offset, len, payload: Payload::None }
    }
}

/// Completed operation.
///
/// The operation was carried out in full, or failed: engines continue short transfers. A read of bytes after the end of
/// the file fails with [`io::ErrorKind::UnexpectedEof`]. After an error the payload of a read has unspecified contents.
#[derive(Debug)]
pub struct Completion {
    /// The operation, with its memory.
    pub op: Op,
    /// Result of the operation.
    pub result: io::Result<()>,
}
