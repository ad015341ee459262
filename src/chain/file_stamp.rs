//! The state of a file: whether its content may have changed, found out without reading it.

use std::path::Path;

use uuid::Uuid;

use crate::error::{Result, none_if_not_found};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env, File, ModifiedTime};

/// The state of a file, by which it is known again: the same file, and nobody has written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileStamp {
    /// Its inode.
    pub(super) ino: u64,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Its last change.
    pub(super) modified: ModifiedTime,
}

impl FileStamp {
    /// The state of `file` now.
    ///
    /// # Errors
    /// `Io`.
    pub fn of(file: &File) -> Result<FileStamp> {
        let stat = file.stat()?;
        Ok(FileStamp { ino: stat.id.ino, len: stat.len, modified: stat.last_change() })
    }

    /// The state of an image; `None` where another file or none is at `path`.
    ///
    /// # Errors
    /// `Io`.
    pub fn of_image_at(env: &dyn Env, path: &Path, uuid: Uuid) -> Result<Option<FileStamp>> {
        let Some(file) = none_if_not_found(env.open(path, Access::Read))? else { return Ok(None) };
        let is_it = ImageIdentity::peek(&file)?.is_some_and(|glance| glance.uuid == uuid);
        is_it.then(|| FileStamp::of(&file)).transpose()
    }

    /// The same, made durable: a power cut does not bring back an older one.
    ///
    /// # Errors
    /// `Io`, `Poisoned`.
    pub fn after_sync(file: &File) -> Result<FileStamp> {
        file.sync_all()?;
        FileStamp::of(file)
    }
}
