//! The runtime folder: contains the live journals, in memory that outlives the process but not the boot.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::shm::Shm;
use crate::error::Result;

/// Open runtime folder. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct RuntimeFolder(Arc<dyn RuntimeFolderBackend>);

/// Implementation of [`RuntimeFolder`], whose methods of the same names document the contract.
pub(super) trait RuntimeFolderBackend: Debug + Send + Sync {
    fn path(&self) -> &Path;
    fn create(&self, name: &str, words: usize) -> Result<Shm>;
    fn check_space(&self, bytes: u64) -> Result<()>;
    fn open(&self, name: &str, words: usize) -> Result<Shm>;
    fn remove(&self, name: &str) -> Result<()>;
    fn list(&self) -> Result<Vec<String>>;
    fn coarse_seconds(&self) -> u64;
    fn random_id(&self) -> Uuid;
}

impl RuntimeFolder {
    pub(super) fn new(backend: impl RuntimeFolderBackend + 'static) -> RuntimeFolder {
        RuntimeFolder(Arc::new(backend))
    }

    /// Returns the path by which the folder was opened.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Creates `words` words of shared memory, all zero. This process holds their lock before they appear under `name`.
    /// The lock ends with the process, or when the last clone of the returned value is dropped.
    ///
    /// # Errors
    /// - `NoSpace`
    /// - `Unsupported` if the SIGBUS handler cannot be installed
    /// - `Io`, also if the name exists
    pub fn create(&self, name: &str, words: usize) -> Result<Shm> {
        self.0.create(name, words)
    }

    /// Checks that `bytes` of shared memory are available, by allocating and freeing them.
    ///
    /// # Errors
    /// - `NoSpace`
    /// - `Io`
    pub fn check_space(&self, bytes: u64) -> Result<()> {
        self.0.check_space(bytes)
    }

    /// Opens and locks shared memory that an earlier process created.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Busy` if another process has it open
    /// - `Refused` if the file cannot be one that [`RuntimeFolder::create`] created for this user with `words` words
    /// - `Unsupported` if the SIGBUS handler cannot be installed
    /// - `Io`
    pub fn open(&self, name: &str, words: usize) -> Result<Shm> {
        self.0.open(name, words)
    }

    /// Removes a name. Succeeds if the name does not exist.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.0.remove(name)
    }

    /// Returns the names in the folder that are UTF-8, in any order. The result may include `.` and `..`.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<String>> {
        self.0.list()
    }

    /// Reads a monotonic clock of whole seconds, without a system call.
    #[inline]
    pub fn coarse_seconds(&self) -> u64 {
        self.0.coarse_seconds()
    }

    /// Returns 128 random bits.
    pub fn random_id(&self) -> Uuid {
        self.0.random_id()
    }
}
