//! An operation on a file of the host, and its completion.

use std::io;

use super::payload::Payload;

/// The place of a file in an engine's table of registered files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct FileSlot(pub u16);

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Fill the payload from the file.
    Read,
    /// Write the payload to the file.
    Write,
    /// Write the payload and make these bytes durable, with what is needed to read them back, and no others (RWF_DSYNC).
    /// A failure may be one of an earlier write that the host tells of only now: it is to be taken as a failed sync.
    WriteThrough,
    /// Make all writes that completed before this was submitted durable, with what is needed to read them back
    /// (fdatasync).
    Sync,
    /// Have the host begin to read the range into its memory (posix_fadvise, WILLNEED): a hint, which promises nothing.
    Prefetch,
    /// Have the host begin to write what is dirty in its memory (sync_file_range, WRITE): a hint, which promises nothing and
    /// takes no error of the medium from the sync that would tell of it.
    StartWriteback,
    /// Reserve room for the range without changing the file's length or bytes (fallocate, KEEP_SIZE).
    Allocate,
    /// Make the range read as zeros and give its room back; the length stays.
    Punch,
    /// Make the range read as zeros and keep its room; the length stays.
    Zero,
}

/// One operation. It owns its memory until its completion hands it back.
#[derive(Debug)]
pub struct Op {
    /// For the one who pushed it; engines do not look at it.
    pub token: u64,
    /// Which file.
    pub slot: FileSlot,
    /// What to do.
    pub action: Action,
    /// File offset in bytes; 0 for a sync or a `WriteBehind`.
    pub offset: u64,
    /// Bytes of the range. For reads and writes the length of the payload; 0 for a sync or a `WriteBehind`.
    pub len: u64,
    /// The memory, for reads and writes.
    pub payload: Payload,
}

impl Op {
    /// A read that fills `into`.
    pub fn read(token: u64, slot: FileSlot, offset: u64, into: Payload) -> Op {
        Op { token, slot, action: Action::Read, offset, len: into.len() as u64, payload: into }
    }

    /// A write of all of `from`.
    pub fn write(token: u64, slot: FileSlot, offset: u64, from: Payload) -> Op {
        Op { token, slot, action: Action::Write, offset, len: from.len() as u64, payload: from }
    }

    /// A write of all of `from` that is durable when it is complete.
    pub fn write_through(token: u64, slot: FileSlot, offset: u64, from: Payload) -> Op {
        Op { action: Action::WriteThrough, ..Op::write(token, slot, offset, from) }
    }

    /// A sync of the file's data.
    pub fn sync(token: u64, slot: FileSlot) -> Op {
        Op { token, slot, action: Action::Sync, offset: 0, len: 0, payload: Payload::None }
    }

    /// A hint to write the file's dirty bytes.
    pub fn start_writeback(token: u64, slot: FileSlot) -> Op {
        Op { action: Action::StartWriteback, ..Op::sync(token, slot) }
    }

    /// `Prefetch`, `Allocate`, `Punch` or `Zero` over a range.
    pub fn range(token: u64, slot: FileSlot, action: Action, offset: u64, len: u64) -> Op {
        debug_assert!(matches!(action, Action::Prefetch | Action::Allocate | Action::Punch | Action::Zero));
        Op { token, slot, action, offset, len, payload: Payload::None }
    }
}

/// An operation that is over.
///
/// It is whole or an error: short transfers are continued inside the engine, and a read that meets the end of the file
/// is [`io::ErrorKind::UnexpectedEof`]. After an error the payload of a read holds anything.
#[derive(Debug)]
pub struct Completion {
    /// The operation, with its memory.
    pub op: Op,
    /// What became of it.
    pub result: io::Result<()>,
}
