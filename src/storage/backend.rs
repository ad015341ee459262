//! Interfaces that a host implements: open files and open folders.
//!
//! [`File`] and [`Folder`] are handles on these interfaces. Their methods, with the contract of each, are in `file.rs`
//! and `folder.rs`. The two handles refer to each other (a file has a folder, a folder opens files), so they share this
//! file.

use std::any::Any;
use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::types::{Access, AllocationMode, DirectRules, FileSystemSpace, Lock, ModifiedTime, NameStatus, Stat};
use crate::error::Result;

/// Open file. Clones are cheap and share the open file description.
///
/// All reads and writes are positional: there is no file position. All errors contain the path.
#[derive(Clone, Debug)]
pub struct File(pub(super) Arc<dyn FileBackend>);

/// Open folder. Clones are cheap and share the descriptor.
///
/// Names are looked up, created, changed and removed in the folder that was opened, even if its path has changed since.
/// A call that takes a path resolves the path again: another process can replace a folder on the path between two such
/// calls, so that the calls act on different folders. An open folder rules this out.
///
/// A name is a single path component; calls refuse any other name (`Refused`). No call follows a symbolic link. All
/// errors contain the path, which begins with [`Folder::path`]. A created, renamed, linked or removed name is certain
/// to survive a crash only after [`Folder::sync`].
#[derive(Clone, Debug)]
pub struct Folder(pub(super) Arc<dyn FolderBackend>);

/// Implementation of [`File`], whose methods of the same names document the contract.
pub(super) trait FileBackend: Any + Debug + Send + Sync {
    fn path(&self) -> &Path;
    fn folder(&self) -> &Folder;
    fn renamed(&self, path: &Path) -> Result<File>;
    fn is_block_device(&self) -> bool;
    fn stat(&self) -> Result<Stat>;
    fn name_status(&self) -> Result<NameStatus>;
    fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()>;
    fn write_at(&self, from: &[u8], offset: u64) -> Result<()>;
    fn sync(&self) -> Result<()>;
    fn sync_all(&self) -> Result<()>;
    fn set_modified(&self, time: ModifiedTime) -> Result<()>;
    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>>;
    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()>;
    fn set_len(&self, len: u64) -> Result<()>;
    fn allocate(&self, offset: u64, len: u64) -> Result<()>;
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()>;
    fn allocation_mode(&self) -> AllocationMode;
    fn is_on_shared_file_system(&self) -> bool;
    fn disable_copy_on_write(&self) -> Result<()>;
    fn file_system_space(&self) -> Result<FileSystemSpace>;
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>>;
    fn advise_random_reads(&self);
    fn prefetch(&self, offset: u64, len: u64);
    fn kernel_readahead(&self) -> u64;
    fn start_writeback(&self, offset: u64, len: u64);
    fn lock(&self, lock: Lock) -> Result<()>;
    fn mapped_bytes(&self) -> u64 {
        0
    }
    fn set_direct(&self) -> Result<Option<DirectRules>>;
}

/// Implementation of [`Folder`], whose methods of the same names document the contract and check that the names are
/// valid.
pub(super) trait FolderBackend: Any + Debug + Send + Sync {
    fn path(&self) -> &Path;
    fn path_to(&self, name: &Path) -> PathBuf;
    fn absolute(&self) -> Result<Folder>;
    fn is_same(&self, other: &Folder) -> bool;
    fn open(&self, name: &OsStr, access: Access) -> Result<File>;
    fn open_beneath(&self, relative: &Path) -> Result<File>;
    fn subfolder(&self, name: &OsStr) -> Result<Folder>;
    fn create(&self, name: &OsStr) -> Result<File>;
    fn create_unnamed(&self, known_as: &OsStr) -> Result<File>;
    fn link_unnamed(&self, file: &File, name: &OsStr) -> Result<()>;
    fn exists(&self, name: &OsStr) -> Result<bool>;
    fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>>;
    fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()>;
    fn rename(&self, from: &OsStr, to: &Folder, new: &OsStr) -> Result<()>;
    fn remove(&self, name: &OsStr) -> Result<()>;
    fn sync(&self) -> Result<()>;
}

impl File {
    pub(super) fn new(backend: impl FileBackend) -> File {
        File(Arc::new(backend))
    }

    /// Returns the implementation if it is a `T`.
    pub(super) fn as_backend<T: FileBackend>(&self) -> Option<&T> {
        (&*self.0 as &dyn Any).downcast_ref()
    }

    /// Returns a shared reference to the implementation if it is a `T`.
    pub(super) fn share_backend<T: FileBackend>(&self) -> Option<Arc<T>> {
        let any: Arc<dyn Any + Send + Sync> = self.0.clone();
        any.downcast().ok()
    }
}

impl Folder {
    pub(super) fn new(backend: impl FolderBackend) -> Folder {
        Folder(Arc::new(backend))
    }

    /// Returns the implementation if it is a `T`.
    pub(super) fn as_backend<T: FolderBackend>(&self) -> Option<&T> {
        (&*self.0 as &dyn Any).downcast_ref()
    }
}
