//! File stamps: they show whether a file may have changed, without reading its contents.

use std::path::Path;

use uuid::Uuid;

use crate::error::{Result, none_if_not_found};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env, File, ModifiedTime};

/// Inode, length and modification time. Two equal stamps show that a file is the same, and was not written to in
/// between. A write is missed only if it follows another write within one tick of the kernel's clock (a few
/// milliseconds), or if a program sets the time back afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileStamp {
    /// The inode number.
    pub(super) ino: u64,
    /// The length in bytes.
    pub(super) len: u64,
    /// The modification time.
    pub(super) modified: ModifiedTime,
}

impl FileStamp {
    /// Returns the current stamp of `file`.
    ///
    /// # Errors
    /// `Io`.
    pub fn of(file: &File) -> Result<FileStamp> {
        let stat = file.stat()?;
        Ok(FileStamp { ino: stat.id.ino, len: stat.len, modified: stat.last_change() })
    }

    /// Returns the current stamp of the image `uuid` at `path`; `None` if no file or another image is there.
    ///
    /// # Errors
    /// - `Refused` if `path` leads to a folder, or to another file that is not regular
    /// - `Io`
    pub fn of_image_at(env: &dyn Env, path: &Path, uuid: Uuid) -> Result<Option<FileStamp>> {
        let Some(file) = none_if_not_found(env.open(path, Access::Read))? else { return Ok(None) };
        let is_it = ImageIdentity::peek(&file)?.is_some_and(|identity| identity.uuid == uuid);
        is_it.then(|| FileStamp::of(&file)).transpose()
    }

    /// Syncs the file and returns its stamp, so that a power cut cannot restore an older state.
    ///
    /// # Errors
    /// `Io`.
    pub fn after_sync(file: &File) -> Result<FileStamp> {
        file.sync_all()?;
        FileStamp::of(file)
    }
}
