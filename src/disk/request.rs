//! What a guest asks, and what it is told.

use crate::storage::GuestIovecs;
use crate::units::SectorRange;

/// A range to zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZeroRange {
    /// The sectors.
    pub range: SectorRange,
    /// Whether their room may be given back to the host.
    pub unmap: bool,
}

/// What is to be done. Ranges lie on the disk; the one who makes a request has checked that.
#[derive(Debug)]
pub enum Work {
    /// Fill guest memory from the disk.
    Read {
        /// What; not empty.
        range: SectorRange,
        /// Where to; exactly as long.
        into: GuestIovecs,
    },
    /// Write guest memory to the disk.
    Write {
        /// Where to; not empty.
        range: SectorRange,
        /// What; exactly as long.
        from: GuestIovecs,
    },
    /// Have the host read the range into its memory, as far as that is easy. Has no answer.
    Prefetch {
        /// What.
        range: SectorRange,
    },
    /// Make all writes that were answered before this was asked durable.
    Flush,
    /// Forget ranges: their room goes back to the host where that shows nothing else to the guest.
    Discard {
        /// The ranges.
        ranges: Vec<SectorRange>,
    },
    /// Make ranges read as zeros.
    WriteZeroes {
        /// The ranges.
        ranges: Vec<ZeroRange>,
    },
}

/// A guest's request.
#[derive(Debug)]
pub struct Request {
    /// Comes back in the answer.
    pub tag: u64,
    /// What is to be done.
    pub work: Work,
}

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It failed, or a part of it.
    Failed,
    /// The disk does not do that.
    Unsupported,
}

/// The end of a request.
#[derive(Debug)]
pub struct Answer {
    /// The request's.
    pub tag: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// The request's memory, to be used again.
    pub memory: Option<GuestIovecs>,
}
