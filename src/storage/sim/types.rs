//! Plain data of the simulated host: faults, counters, units of durability.

use std::path::PathBuf;

/// Order in which operations complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CompletionOrder {
    /// Any order, drawn from the seed. `reap` returns some of the operations.
    Any,
    /// The order in which the operations were pushed. `reap` returns all of them.
    Pushed,
}

/// The way in which a step fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The step fails with EIO. A sync that fails drops the changes that it should have made durable: later syncs
    /// succeed without them.
    Io,
    /// The step fails with ENOSPC.
    NoSpace,
    /// A write stores half of its sectors and fails with EIO. A read, and any other step, fails as a read at the end of
    /// the file does.
    Short,
}

/// Faults to inject.
#[derive(Clone, Default, Debug)]
pub struct FaultPlan {
    /// Steps that fail, counted from 1 (see [`StepCounts::steps`]).
    pub fail: Vec<(u64, Fault)>,
    /// Syncs of files, counted from 1, that report success but do nothing.
    pub lying_syncs: Vec<u64>,
    /// Syncs of files, counted from 1, that fail with EIO.
    pub failing_syncs: Vec<u64>,
    /// Operations, counted from 1 in the order of submission, that complete after all others of their engine.
    pub late: Vec<u64>,
    /// Space of the file system in bytes.
    pub capacity: Option<u64>,
    /// The file system cannot preallocate space.
    pub no_allocate: bool,
    /// Overwriting a page allocates a new page, and frees the old one afterwards.
    pub copy_on_write: bool,
    /// Other machines use the file system, too.
    pub shared_file_system: bool,
    /// The file system has no files without names.
    pub no_unnamed: bool,
}

/// Number of steps so far. A step is a call on files or names that a host could fail, or an operation of an engine.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StepCounts {
    /// All steps.
    pub steps: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Syncs of files.
    pub syncs: u64,
    /// Syncs of files that failed.
    pub failed_syncs: u64,
    /// Changes of lengths, allocations, holes, zeroed ranges.
    pub ranges: u64,
    /// Opened, created, renamed, linked and removed names.
    pub names: u64,
    /// Syncs of folders.
    pub dir_syncs: u64,
    /// Operations that engines submitted. Each is also counted above, when it completes.
    pub submitted: u64,
}

/// Smallest change that survives a crash or not, independently of all others. Units of the same place are ordered: the
/// last one that survives takes effect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DurableUnit {
    /// Sector of a file (inode, sector).
    Sector(u64, u64),
    /// Length of a file (inode, bytes).
    Len(u64, u64),
    /// Name.
    Name(PathBuf),
}
