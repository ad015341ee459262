//! The seam to everything outside the process: files, names, locks, clock, UUIDs, engines.
//!
//! Two implementations: [`Host`](super::host::Host), and (feature `sim`) a simulated host whose every crash, fault and
//! reordering comes from one seed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::engine::Engine;
use super::folder::Folder;
use super::host::HostFile;
use super::runtime_folder::RuntimeFolder;
#[cfg(feature = "sim")]
use super::sim::SimFile;
use super::space::{AllocationMode, FileSystemSpace};
use crate::error::Result;

/// What a file is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// What an engine should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineKind {
    /// io_uring where the host allows it, else blocking calls; the log says which.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Plain positional calls.
    Blocking,
}

/// Who may use a file besides us (crash-safety 3.10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lock {
    /// Others may read with us; nobody may write.
    Shared,
    /// Nobody else of our kind; QEMU may not open it either.
    Exclusive,
}

/// Which file it is, whatever its names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
}

/// What is known of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Which file.
    pub id: FileId,
    /// Length in bytes.
    pub len: u64,
    /// Bytes of room it takes on the host.
    pub allocated: u64,
    /// Last change of its bytes, Unix seconds.
    pub modified: i64,
    /// And nanoseconds, as far as the file system tells.
    pub modified_nanos: u32,
    /// Permission bits.
    pub mode: u32,
}

/// Whose process this is, on which start of which machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// The start of the kernel.
    pub boot: Uuid,
    /// The installed system, whatever its starts: derived from its machine id, which it does not give away.
    pub machine: Uuid,
    /// Number of the user.
    pub user_id: u32,
    /// Name of the user; the number if it has none.
    pub user: String,
    /// Name of the host.
    pub host: String,
}

/// When the bytes of a file were last changed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ModifiedTime {
    /// Unix seconds.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

impl Stat {
    /// Returns the time of the last change as one value.
    pub fn last_change(&self) -> ModifiedTime {
        ModifiedTime { seconds: self.modified, nanos: self.modified_nanos }
    }
}

/// What became of the name by which a file was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NameStatus {
    /// It still names the file.
    Kept,
    /// It is gone. The file has another name.
    Renamed,
    /// It is gone. The file has no name, and vanishes when it is closed.
    Removed,
    /// It names another file.
    Replaced,
}

/// What holds a lock on a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LockHolder {
    /// A process.
    Process {
        /// Its number.
        pid: u32,
        /// Its program's name, as the kernel records it.
        program: String,
        /// When it was started, Unix seconds; `None` if that cannot be read.
        since: Option<i64>,
    },
    /// A process that the kernel does not show to this one.
    Hidden,
}

/// What O_DIRECT asks for on a file, in bytes (powers of two).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectRules {
    /// Alignment of memory addresses and lengths.
    pub memory: usize,
    /// Alignment of file offsets and lengths.
    pub offset: u64,
}

/// An open file. Cloning it is cheap and shares the open description.
///
/// Only positional reads and writes: there is no file position. All errors name the path.
#[derive(Clone, Debug)]
pub enum File {
    /// A file of the host.
    Host(HostFile),
    /// A file of the simulated host.
    #[cfg(feature = "sim")]
    Sim(SimFile),
}

macro_rules! each_kind {
    ($self:ident, $f:ident => $call:expr) => {
        match $self {
            File::Host($f) => $call,
            #[cfg(feature = "sim")]
            File::Sim($f) => $call,
        }
    };
}

impl File {
    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        each_kind!(self, f => f.path())
    }

    /// The folder in which it was found or made, which is held as long as the file is open.
    pub fn folder(&self) -> Folder {
        match self {
            File::Host(f) => Folder::Host(f.folder().clone()),
            #[cfg(feature = "sim")]
            File::Sim(f) => Folder::Sim(f.folder()),
        }
    }

    /// Its name in that folder.
    pub fn name(&self) -> &OsStr {
        self.path().file_name().expect("a file is opened by a name")
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        match self {
            File::Host(f) => f.is_block_device(),
            #[cfg(feature = "sim")]
            File::Sim(_) => false,
        }
    }

    /// What is known of it now. The length of a block device is its capacity.
    pub fn stat(&self) -> Result<Stat> {
        each_kind!(self, f => f.stat())
    }

    /// What became of the name by which it was opened.
    pub fn name_status(&self) -> Result<NameStatus> {
        each_kind!(self, f => f.name_status())
    }

    /// Fills `into` from byte `offset`; the file ending before that is an error.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        each_kind!(self, f => f.read_at(into, offset))
    }

    /// Writes all of `from` at byte `offset`.
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        each_kind!(self, f => f.write_at(from, offset))
    }

    /// Makes its bytes durable, with what is needed to read them back (fdatasync).
    pub fn sync(&self) -> Result<()> {
        each_kind!(self, f => f.sync())
    }

    /// Makes its bytes durable and all that is known of it, the time of its last change included (fsync).
    pub fn sync_all(&self) -> Result<()> {
        match self {
            File::Host(f) => f.sync_all(),
            #[cfg(feature = "sim")]
            File::Sim(f) => f.sync_all(),
        }
    }

    /// Sets the time of the last change (futimens). A later write sets it again. Durable after [`File::sync_all`].
    ///
    /// # Errors
    /// `Io`.
    pub fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        each_kind!(self, f => f.set_modified(time))
    }

    /// Reads an extended attribute; `None` if the file does not have it, or the file system has none.
    ///
    /// # Errors
    /// `Io`.
    pub fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        each_kind!(self, f => f.attribute(name))
    }

    /// Sets an extended attribute, or removes it. The bytes of the file and the time of their last change stay. Durable
    /// after [`File::sync_all`].
    ///
    /// # Errors
    /// - `Unsupported` if the file system has no such attributes
    /// - `Io`, also for a file that may not be changed
    pub fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        each_kind!(self, f => f.set_attribute(name, value))
    }

    /// Cuts or extends (with zeros) to `len` bytes.
    pub fn set_len(&self, len: u64) -> Result<()> {
        each_kind!(self, f => f.set_len(len))
    }

    /// Reserves room without changing length or bytes. `Unsupported` where the file system cannot.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        each_kind!(self, f => f.allocate(offset, len))
    }

    /// Makes a range read as zeros, giving room back where the file system can (else by writing zeros).
    pub fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        each_kind!(self, f => f.punch_hole(offset, len))
    }

    /// What its file system promises about room.
    pub fn allocation_mode(&self) -> AllocationMode {
        each_kind!(self, f => f.allocation_mode())
    }

    /// Asks the file system to write over old bytes in place from now on. Takes effect on an empty file alone, and only on
    /// a file system that copies on write.
    pub fn disable_copy_on_write(&self) -> Result<()> {
        each_kind!(self, f => f.disable_copy_on_write())
    }

    /// The room that its file system has.
    pub fn file_system_space(&self) -> Result<FileSystemSpace> {
        each_kind!(self, f => f.file_system_space())
    }

    /// The next run of bytes at or after `offset` that is not a hole, clipped to the length of the file.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        each_kind!(self, f => f.next_data(offset))
    }

    /// Says that small pieces of it are going to be read here and there, so that the host reads no more than is asked for.
    pub fn advise_random_reads(&self) {
        each_kind!(self, f => f.advise_random_reads())
    }

    /// Says that a range is going to be read soon: reads of many such ranges then do not wait for one another.
    pub fn prefetch(&self, offset: u64, len: u64) {
        each_kind!(self, f => f.prefetch(offset, len))
    }

    /// Bytes that the host itself reads ahead of a stream in it; 0 where that cannot be known.
    pub fn kernel_readahead(&self) -> u64 {
        each_kind!(self, f => f.kernel_readahead())
    }

    /// A hint: what was written there is going to be synced, and the host may begin to write it now. It may also let go
    /// of it in memory.
    pub fn start_writeback(&self, offset: u64, len: u64) {
        each_kind!(self, f => f.start_writeback(offset, len))
    }

    /// Takes a lock that dies with the open description; `Busy` (naming the holder where it can be known) where
    /// somebody else has one against it. Waits, up to 30 s, only for the I/O of processes that have ended.
    pub fn lock(&self, lock: Lock) -> Result<()> {
        each_kind!(self, f => f.lock(lock))
    }

    /// Switches to O_DIRECT; `None`, and nothing switched, where the file system does not say what it asks for or asks
    /// for offsets of more than a sector.
    pub fn set_direct(&self) -> Result<Option<DirectRules>> {
        each_kind!(self, f => f.set_direct())
    }
}

/// What is known of a file that may not be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FilePresence {
    /// There is no regular file, or it lies where nothing is looked up (`/proc`, `/sys`, `/dev`).
    Absent,
    /// There is one.
    Present,
    /// There may be one; why that cannot be found out.
    Unknown(&'static str),
}

/// The outside world. Every source of non-determinism enters here.
///
/// Paths are an operator's: symbolic links are followed. What takes more than one step, or begins with a string of an
/// image, goes through a held [`Folder`].
pub trait Env: Send + Sync {
    /// Opens a regular file; FIFOs, devices, sockets and (as the last component) symbolic links to nowhere are refused
    /// without blocking and without reading. Its [`File::folder`] is the one that the path named.
    fn open(&self, path: &Path, access: Access) -> Result<File>;

    /// Opens a folder, to be held.
    fn folder(&self, path: &Path) -> Result<Folder>;

    /// Asks whether a regular file is at an absolute path without `.` and `..`, without opening it, following a link or
    /// triggering an automount.
    fn file_presence(&self, path: &Path) -> FilePresence;

    /// Opens a regular file or a block device that holds a raw disk. All else is refused as by [`Env::open`]. A device
    /// opened for writing is held exclusively: `Busy` if it is mounted or otherwise in use.
    fn open_disk(&self, path: &Path, access: Access) -> Result<File> {
        self.open(path, access)
    }

    /// For each file, what holds a lock on it. A file whose locks cannot be asked for counts as one without.
    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        vec![None; files.len()]
    }

    /// Removes a name.
    fn remove(&self, path: &Path) -> Result<()>;

    /// An absolute path without symbolic links, `.` and `..`.
    fn canonical(&self, path: &Path) -> Result<PathBuf>;

    /// Whether there is something at `path`.
    fn exists(&self, path: &Path) -> bool;

    /// Opens the folder in which live journals lie, which holds memory that outlives the process but not the host.
    ///
    /// # Errors
    /// `NotFound`; `Refused` if it is another user's, or open to other users; `Unsupported` if it is not in memory; `Io`.
    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder>;

    /// Tells this process from those of other users, of other starts of the host, and of other hosts.
    ///
    /// # Errors
    /// `Io`.
    fn origin(&self) -> Result<Origin>;

    /// Unix seconds.
    fn now(&self) -> i64;

    /// Returns the time since some fixed moment; never goes back. Bounds how long something is looked for.
    fn monotonic_time(&self) -> Duration;

    /// A new random UUID.
    fn uuid(&self) -> Uuid;

    /// An engine for one thread with at most `depth` operations under way.
    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>>;
}
