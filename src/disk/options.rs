//! Options with which a disk is opened.

use std::path::PathBuf;

use crate::event::EventReporter;
use crate::image::{Allocation, Durability};

/// Options of [`Disk::open`](super::Disk::open).
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Path of the youngest image of the chain.
    pub path: PathBuf,
    /// Whether the disk refuses writes. Then no file is changed, except by `discard_journal`.
    pub read_only: bool,
    /// Serial that the guest can read, at most 20 bytes. Without one, the first 20 digits of the image's UUID.
    pub serial: Option<String>,
    /// Whether to bypass the page cache (O_DIRECT) for files whose file system supports it.
    pub direct: bool,
    /// Folders in which parents may lie, in addition to the image's own folder.
    pub allow_parents: Vec<PathBuf>,
    /// Whether a write is answered only when it is durable.
    pub write_through: bool,
    /// Way in which acknowledged writes survive a kill of this process.
    pub keep: Durability,
    /// Whether to discard acknowledged writes that exist only in the live journal of a killed daemon.
    pub discard_journal: bool,
    /// Policy for writes and commits for which the file system has no space.
    pub when_full: WhenFull,
    /// Way in which new blocks allocate space on the file system.
    pub allocation: Allocation,
    /// Whether to open an image for writing although other images have it as their parent.
    pub allow_writable_parent: bool,
    /// Whether reads of data in the page cache are copies from mapped files. If not, no file is mapped, and every read
    /// is an operation.
    pub page_cache_reads: bool,
    /// Reporter of the disk's events.
    pub events: EventReporter,
}

impl DiskOptions {
    /// Returns the options of a writable disk with default settings: files are buffered, parents lie in the image's
    /// folder, reads of data in the page cache are copies, a write is durable after the next flush and is lost if the
    /// process is killed before the flush, and writes wait while the file system is full.
    pub fn new(path: impl Into<PathBuf>) -> DiskOptions {
        DiskOptions {
            path: path.into(),
            read_only: false,
            serial: None,
            direct: false,
            allow_parents: Vec::new(),
            write_through: false,
            keep: Durability::FlushOnly,
            discard_journal: false,
            when_full: WhenFull::default(),
            allocation: Allocation::default(),
            allow_writable_parent: false,
            page_cache_reads: true,
            events: EventReporter::default(),
        }
    }
}

/// Policy for a write or commit for which the file system has no space.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WhenFull {
    /// The write or commit waits until there is space. Reads continue, and so do flushes that need no space.
    #[default]
    Park,
    /// The write or commit fails.
    Fail,
}
