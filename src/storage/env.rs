//! The environment: opens files and folders, reads the clock, creates engines.
//!
//! Two implementations: [`Host`](super::host::Host), and (feature `sim`) a simulated host whose every crash, fault and
//! reordering is drawn from one seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::backend::{File, Folder};
use super::engine::Engine;
use super::runtime_folder::RuntimeFolder;
use super::types::{Access, EngineKind, FilePresence, LockHolder, Origin};
use crate::error::Result;

/// Everything outside the process. Every source of non-determinism is a method of this trait.
///
/// Paths are those of an operator: symbolic links are followed. An operation that takes more than one step, or uses a
/// path that an image contains, goes through an open [`Folder`].
pub trait Env: Send + Sync {
    /// Opens a regular file. [`File::folder`] returns the folder in the path. Opening never blocks and reads nothing.
    ///
    /// # Errors
    /// - `NotFound`, also for a symbolic link to nothing
    /// - `Refused` for a FIFO, device, socket or folder
    /// - `Io`
    fn open(&self, path: &Path, access: Access) -> Result<File>;

    /// Opens a folder.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`
    fn folder(&self, path: &Path) -> Result<Folder>;

    /// Checks whether a regular file exists at an absolute path without `.` and `..`. Opens no file, follows no
    /// symbolic link, and triggers no automount.
    fn file_presence(&self, path: &Path) -> FilePresence;

    /// Opens a regular file or a block device that contains a raw disk. A device that is opened for writing is opened
    /// exclusively.
    ///
    /// # Errors
    /// - `Busy` for a device that is mounted or otherwise in use
    /// - those of [`Env::open`]
    fn open_disk(&self, path: &Path, access: Access) -> Result<File> {
        self.open(path, access)
    }

    /// Returns the lock holder of each file. A file whose locks cannot be queried counts as unlocked.
    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        vec![None; files.len()]
    }

    /// Removes a name.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`
    fn remove(&self, path: &Path) -> Result<()>;

    /// Returns the absolute path without symbolic links, `.` and `..`.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`
    fn canonical(&self, path: &Path) -> Result<PathBuf>;

    /// Returns whether anything exists at `path`.
    fn exists(&self, path: &Path) -> bool;

    /// Opens the runtime folder, which contains the live journals.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` if it belongs to another user, or other users may write to it
    /// - `Unsupported` if it is not on a file system in memory
    /// - `Io`
    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder>;

    /// Returns the user, boot and machine of this process.
    ///
    /// # Errors
    /// `Io`.
    fn origin(&self) -> Result<Origin>;

    /// Returns the time in Unix seconds.
    fn now(&self) -> i64;

    /// Returns the time since some fixed moment. It never decreases.
    fn monotonic_time(&self) -> Duration;

    /// Returns a new random UUID.
    fn uuid(&self) -> Uuid;

    /// Creates an engine for one thread with at most `depth` outstanding operations.
    ///
    /// # Errors
    /// `Io`, or `Unsupported`, if the kernel refuses io_uring and `kind` requires it.
    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>>;
}
