//! Plain data that files, folders, engines and hosts exchange. No system calls.

use uuid::Uuid;

/// Access mode of an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    Write,
}

/// Kind of I/O engine to create.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineKind {
    /// io_uring if the kernel allows it, otherwise blocking calls. The fallback is logged.
    #[default]
    Auto,
    /// io_uring. Creating the engine fails if the kernel refuses io_uring.
    Uring,
    /// Blocking positional calls.
    Blocking,
}

/// Lock on a file (crash-safety 8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lock {
    /// Excludes processes of diffdisk with an exclusive lock, and QEMU processes that may write or resize, or that do
    /// not share the file with a reader.
    Shared,
    /// Excludes all other processes of diffdisk with a lock, and QEMU processes that may write or resize, or that do
    /// not share the file with a writer.
    Exclusive,
}

/// Identity of a file, independent of its names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// Metadata of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Identity.
    pub id: FileId,
    /// Length in bytes.
    pub len: u64,
    /// Allocated space in bytes.
    pub allocated: u64,
    /// Modification time, Unix seconds.
    pub modified: i64,
    /// Nanoseconds of the modification time, as precise as the file system records it.
    pub modified_nanos: u32,
    /// Permission bits.
    pub mode: u32,
}

impl Stat {
    /// Returns the modification time as one value.
    pub fn last_change(&self) -> ModifiedTime {
        ModifiedTime { seconds: self.modified, nanos: self.modified_nanos }
    }
}

/// Modification time of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ModifiedTime {
    /// Unix seconds.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

/// User, boot and machine of this process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Boot id of the kernel.
    pub boot: Uuid,
    /// Id derived from the machine id or, if there is none, from the host name. The same for every boot.
    pub machine: Uuid,
    /// User id.
    pub user_id: u32,
    /// User name; the number if the user has no name.
    pub user: String,
    /// Host name.
    pub host: String,
}

/// State of the name by which a file was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NameStatus {
    /// The name still refers to the file.
    Kept,
    /// The name is gone, and the file has another name.
    Renamed,
    /// The name is gone, and the file has no other name. It is deleted when it is closed.
    Removed,
    /// The name refers to another file.
    Replaced,
}

/// Holder of a lock on a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LockHolder {
    /// A process that is visible in `/proc`.
    Process {
        /// Process id.
        pid: u32,
        /// Name of the program, as the kernel records it.
        program: String,
        /// Start time, Unix seconds; `None` if it cannot be read.
        since: Option<i64>,
    },
    /// A process that is not visible in `/proc`.
    Hidden,
}

/// Alignment that O_DIRECT requires for a file, in bytes (powers of two).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectRules {
    /// Alignment of memory addresses.
    pub memory: usize,
    /// Alignment of file offsets and lengths.
    pub offset: u64,
}

/// Result of looking for a file without opening it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FilePresence {
    /// There is no regular file, or the path lies in a kernel file system, which is never searched (`/proc`, `/sys`,
    /// `/dev` and others).
    Absent,
    /// There is a regular file.
    Present,
    /// There may be a file. The text is the reason why this cannot be determined.
    Unknown(&'static str),
}

/// Way in which a file system allocates space for writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocationMode {
    /// A write fails at once if there is no space for it, and allocated pages can always be overwritten: ext4, XFS,
    /// tmpfs, and btrfs for files without copy on write.
    InPlace,
    /// A write fails at once if there is no space for it, and overwriting a page needs new space, too: btrfs.
    CopyOnWrite,
    /// Unknown: any other file system, and btrfs with data and metadata in the same block groups.
    Unknown,
}

/// Space of a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystemSpace {
    /// Bytes that an unprivileged user may still allocate.
    pub available: u64,
    /// Total bytes.
    pub total: u64,
}
