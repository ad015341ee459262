//! Requests of a guest, and their answers.

use crate::storage::GuestIovecs;
use crate::units::SectorRange;

/// A range to be zeroed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZeroRange {
    /// Sectors of the disk.
    pub range: SectorRange,
    /// Whether the space of the range on the file system may be deallocated.
    pub unmap: bool,
}

/// The action of a request. All ranges must lie inside the disk: the creator of the request checks that.
#[derive(Debug)]
pub enum Work {
    /// Read from the disk into guest memory.
    Read {
        /// Sectors to read; not empty.
        range: SectorRange,
        /// Memory to fill; as long as the range.
        into: GuestIovecs,
    },
    /// Write guest memory to the disk.
    Write {
        /// Sectors to write; not empty.
        range: SectorRange,
        /// Memory to write; as long as the range.
        from: GuestIovecs,
    },
    /// Read a range into the page cache. The request is a hint and gets no answer.
    Prefetch {
        /// Sectors to prefetch.
        range: SectorRange,
    },
    /// Make all writes durable that were answered before this request was submitted.
    Flush,
    /// Discard ranges: deallocate their space in the top image, without exposing data of a parent.
    Discard {
        /// Ranges to discard.
        ranges: Vec<SectorRange>,
    },
    /// Make ranges read as zeros.
    WriteZeroes {
        /// Ranges to zero.
        ranges: Vec<ZeroRange>,
    },
}

/// A request of a guest.
#[derive(Debug)]
pub struct Request {
    /// Identifies the request in its answer.
    pub tag: u64,
    /// The action.
    pub work: Work,
}

/// The outcome of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The request succeeded.
    Done,
    /// The request failed, or a part of it did.
    Failed,
    /// The disk does not support the request.
    Unsupported,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// Tag of the request.
    pub tag: u64,
    /// Outcome of the request.
    pub outcome: Outcome,
    /// Memory of a read or write, returned for reuse.
    pub memory: Option<GuestIovecs>,
}
