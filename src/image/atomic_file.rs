//! Files that are being made. A name appears only when what it names is whole and durable.
//!
//! A draft has no name, so nothing is left of it if the process is killed. File systems without such files give it a
//! temporary name, which a killed process leaves behind.
//!
//! ```text
//!   new name      write, sync | link to the name                       | sync file and folder
//!   replacement   write, sync | link to a temporary name, rename over  | sync file and folder
//! ```

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::storage::{Env, File, Folder};

/// A file that is being made. Dropped before it has its name, it vanishes.
pub struct AtomicFile {
    /// Where it is made, and will be named.
    folder: Folder,
    name: OsString,
    file: File,
    /// The path that was asked for.
    requested_path: PathBuf,
    /// A temporary name that no other file has, and whether the file has it.
    temporary_name: OsString,
    has_temporary_name: bool,
}

impl AtomicFile {
    /// Begins an empty file that will be called `name` in `folder`. Errors call it `asked`.
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

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path under which it is known while it is made, or under its name later.
    pub fn path(&self) -> PathBuf {
        self.folder.path_to(&self.name)
    }

    /// The error, under the name that was asked for.
    pub fn with_requested_path(&self, e: Error) -> Error {
        let known_as = [self.file.path().to_path_buf(), self.path(), self.folder.path_to(&self.temporary_name)];
        known_as.iter().fold(e, |e, path| e.replace_path(path, &self.requested_path))
    }

    /// Gives the finished, durable file its name without ever replacing another, and makes the name durable.
    ///
    /// # Errors
    /// `Refused` if the name exists; `Io`.
    pub fn publish(&mut self) -> Result<()> {
        failpoint::reached("draft.whole");
        let named = match self.has_temporary_name {
            false => self.folder.link_unnamed(&self.file, &self.name),
            true => match self.folder.link(&self.temporary_name, &self.name) {
                Ok(()) => self.folder.remove(&self.temporary_name),
                // A file system without second names.
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

    /// Puts the finished, durable file in the place of what has its name, in one step, and makes the name durable.
    ///
    /// # Errors
    /// `Io`: the name still leads to the old file.
    pub fn replace(&mut self) -> Result<()> {
        failpoint::reached("draft.whole-to-replace");
        // No call gives a file its first name over an old file.
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

    /// Makes the name durable. The file is synced, too, since its link count has changed.
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

/// The error for a name that must not exist.
pub(super) fn name_exists_error(path: &Path) -> Error {
    Error::new(ErrorKind::Refused, "it exists already; remove it first").at_path(path)
}

/// A temporary name for a file that is to be called `name`. `uuid` makes it unique.
fn make_temporary_name(name: &OsStr, uuid: Uuid) -> OsString {
    // Names have at most 255 bytes; a part of it is enough for people to recognise it.
    let start: String = name.to_string_lossy().chars().take(32).collect();
    format!(".{start}.{}.new", uuid.simple()).into()
}

/// Whether a name is the temporary one of a draft.
pub fn is_temporary_name(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let middle = name.strip_prefix('.').and_then(|name| name.strip_suffix(".new"));
    let uuid = middle.and_then(|middle| middle.rsplit_once('.')).map(|(_, uuid)| uuid);
    uuid.is_some_and(|uuid| uuid.len() == 32 && uuid.bytes().all(|digit| digit.is_ascii_hexdigit()))
}
