//! The environment: opens files and folders, reads the clock, creates engines.
//!
//! The two implementations are [`Host`](super::host::Host) and, with the feature `sim`, a simulated host for crash
//! tests, whose runs are reproducible from a seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::backend::{File, Folder};
use super::engine::Engine;
use super::runtime_folder::RuntimeFolder;
use super::types::{Access, EngineKind, FilePresence, LockHolder, Origin};
use crate::error::Result;

/// Interface to everything outside the process: files, clocks, random numbers, engines. A simulated host makes all of
/// them deterministic.
///
/// Paths come from an operator, so symbolic links are followed, unless the method says otherwise. Code that makes more
/// than one call on a folder, or uses a path that an image contains, uses an open [`Folder`].
pub trait Env: Send + Sync {
    /// Opens a regular file. [`File::folder`] returns the folder part of the path. Opening never blocks, and reads no
    /// data.
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
    /// - `Busy` for a device that is opened for writing while it is mounted or otherwise in use
    /// - those of [`Env::open`], except that a block device is accepted
    fn open_disk(&self, path: &Path, access: Access) -> Result<File> {
        self.open(path, access)
    }

    /// Returns the lock holder of each file; `None` if the file is not locked, or its locks cannot be queried.
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

    /// Returns whether the name exists, even if it is a symbolic link to nothing.
    fn exists(&self, path: &Path) -> bool;

    /// Opens the runtime folder, which contains the live journals.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` if it is a symbolic link or not a folder, belongs to another user, or may be written by other users
    /// - `Unsupported` if it is not on tmpfs or ramfs
    /// - `Io`
    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder>;

    /// Returns the user, boot and machine of this process.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `Io` if the boot id cannot be read from `/proc`.
    fn origin(&self) -> Result<Origin>;

    /// Returns the time in Unix seconds.
    fn now(&self) -> i64;

    /// Returns the time since an arbitrary fixed moment. The time never decreases.
    fn monotonic_time(&self) -> Duration;

    /// Returns a new random UUID.
    fn uuid(&self) -> Uuid;

    /// Creates an engine for one thread with at most `depth` outstanding operations.
    ///
    /// # Errors
    /// `Io` or `Unsupported` if `kind` is [`EngineKind::Uring`] and the kernel refuses io_uring.
    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>>;
}
