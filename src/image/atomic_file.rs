//! Creates and replaces files atomically: a file gets its name only when its contents are complete and durable.
//!
//! Until then the file has no name (`O_TMPFILE`), so nothing remains of it if the process is killed. On file systems
//! that do not support unnamed files it has a temporary name, which remains after a kill.
//!
//! ```text
//!   new file      write, sync | link to the name                                | sync file and folder
//!   replacement   write, sync | link to a temporary name, rename over the name  | sync file and folder
//! ```

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::storage::{Env, File, Folder};

/// A file under construction. If it is dropped before it has its name, no file remains.
pub struct AtomicFile {
    /// The folder in which the file is created and will be named.
    folder: Folder,
    name: OsString,
    file: File,
    /// The path that the caller requested, for errors.
    requested_path: PathBuf,
    /// A unique temporary name.
    temporary_name: OsString,
    /// Whether the file has its temporary name now.
    has_temporary_name: bool,
}

impl AtomicFile {
    /// Creates an empty file that will be called `name` in `folder`. Errors contain the path `asked`.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub fn begin(env: &dyn Env, asked: &Path, folder: Folder, name: &OsStr) -> Result<AtomicFile> {
        let fresh = make_temporary_name(name, env.uuid());
        let made = match folder.create_unnamed(name) {
            Ok(file) => Ok((file, false)),
            Err(e) if e.kind() == ErrorKind::Unsupported => folder.create(&fresh).map(|file| (file, true)),
            Err(e) => Err(e),
        };
        let known_as = [folder.path_to(name), folder.path_to(&fresh)];
        let blame = |e: Error| known_as.iter().fold(e, |e, path| e.replace_path(path, asked)).at_path(asked);
        let (file, is_named_freshly) = made.map_err(blame)?;
        let (name, asked) = (name.to_os_string(), asked.to_path_buf());
        Ok(AtomicFile {
            folder,
            name,
            file,
            requested_path: asked,
            temporary_name: fresh,
            has_temporary_name: is_named_freshly,
        })
    }

    /// Returns the file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the final path of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.path_to(&self.name)
    }

    /// Replaces the file's internal paths in an error by the requested path.
    pub fn with_requested_path(&self, e: Error) -> Error {
        let known_as = [self.file.path().to_path_buf(), self.path(), self.folder.path_to(&self.temporary_name)];
        known_as.iter().fold(e, |e, path| e.replace_path(path, &self.requested_path))
    }

    /// Gives the finished, durable file its name, and makes the name durable. Replaces no file that has the name
    /// already. (On a file system without hard links, a file that gets the name during the call may be replaced.)
    ///
    /// # Errors
    /// - `Refused` if the name exists.
    /// - `Io`, `NoSpace`.
    pub fn publish(&mut self) -> Result<()> {
        failpoint::reached("draft.whole");
        let named = match self.has_temporary_name {
            false => self.folder.link_unnamed(&self.file, &self.name),
            true => match self.folder.link(&self.temporary_name, &self.name) {
                Ok(()) => self.folder.remove(&self.temporary_name),
                // The file system does not support hard links.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
                    self.folder.rename(&self.temporary_name, &self.folder, &self.name)
                }
                Err(e) => Err(e),
            },
        };
        named.map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => name_exists_error(&self.requested_path),
            _ => e,
        })?;
        self.has_temporary_name = false;
        failpoint::reached("draft.named");
        self.sync_name()
    }

    /// Replaces any file of the same name by the finished, durable file, atomically, and makes the name durable.
    ///
    /// # Errors
    /// `Io`, `NoSpace`. If the rename failed, the name still refers to the old file.
    pub fn replace(&mut self) -> Result<()> {
        failpoint::reached("draft.whole-to-replace");
        // No system call links an unnamed file over an existing name.
        if !self.has_temporary_name {
            self.folder.link_unnamed(&self.file, &self.temporary_name)?;
            self.has_temporary_name = true;
        }
        failpoint::reached("draft.named-to-replace");
        self.folder.rename(&self.temporary_name, &self.folder, &self.name)?;
        self.has_temporary_name = false;
        failpoint::reached("draft.replaced");
        self.sync_name()
    }

    /// Makes the name durable. Also syncs the file, because its link count has changed.
    fn sync_name(&self) -> Result<()> {
        self.file.sync_all()?;
        self.folder.sync()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.has_temporary_name
            && let Err(e) = self.folder.remove(&self.temporary_name)
        {
            log::warn!("{}", e.line());
        }
    }
}

/// Makes the error for a file that exists although it must not.
pub(super) fn name_exists_error(path: &Path) -> Error {
    Error::new(ErrorKind::Refused, "the file exists already; remove it first").at_path(path)
}

/// Makes a temporary name, unique by `uuid`, for a file that will be called `name`.
fn make_temporary_name(name: &OsStr, uuid: Uuid) -> OsString {
    // Names have at most 255 bytes, and a prefix of `name` is enough to recognise it.
    let start: String = name.to_string_lossy().chars().take(32).collect();
    format!(".{start}.{}.new", uuid.simple()).into()
}

/// Returns whether a name is a temporary name of an [`AtomicFile`].
pub fn is_temporary_name(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let middle = name.strip_prefix('.').and_then(|name| name.strip_suffix(".new"));
    let uuid = middle.and_then(|middle| middle.rsplit_once('.')).map(|(_, uuid)| uuid);
    uuid.is_some_and(|uuid| uuid.len() == 32 && uuid.bytes().all(|digit| digit.is_ascii_hexdigit()))
}
