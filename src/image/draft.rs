//! Files that are being made. A name appears only when what it names is whole and durable.
//!
//! A draft has no name, so nothing is left of it if the process is killed. File systems without such files give it a
//! temporary name, which a killed process leaves behind.
//!
//! ```text
//!   new name      write, sync | link to the name                       | sync file and folder
//!   replacement   write, sync | link to a temporary name, rename over  | sync file and folder
//! ```

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::create::folder_of;
use crate::error::{Error, ErrorKind, Result};
use crate::point;
use crate::storage::{Env, File};

/// A file that is being made. Dropped before it has its name, it vanishes.
pub struct Draft<'a> {
    env: &'a dyn Env,
    file: File,
    /// The name that was asked for, and where it leads.
    asked: PathBuf,
    path: PathBuf,
    /// The name that it has until it gets its own.
    temporary: Option<PathBuf>,
}

impl<'a> Draft<'a> {
    /// Begins an empty file that will be called `path`. Errors call it `asked`.
    ///
    /// # Errors
    /// `Refused` if `path` does not end in a file name; `Io`, `NoSpace`.
    pub fn begin(env: &'a dyn Env, asked: &Path, path: &Path) -> Result<Draft<'a>> {
        let fresh = fresh_name(path, env.uuid())?;
        let (file, temporary) = match env.create_unnamed(folder_of(path), asked) {
            Ok(file) => (file, None),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                (env.create(&fresh).map_err(|e| e.renamed(&fresh, asked))?, Some(fresh))
            }
            Err(e) => return Err(e),
        };
        Ok(Draft { env, file, asked: asked.to_path_buf(), path: path.to_path_buf(), temporary })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The error, under the name that was asked for.
    pub fn blame(&self, e: Error) -> Error {
        let e = self.temporary.iter().fold(e, |e, temporary| e.renamed(temporary, &self.asked));
        e.renamed(&self.path, &self.asked)
    }

    /// Gives the finished, durable file its name without ever replacing another, and makes the name durable.
    ///
    /// # Errors
    /// `Refused` if the name exists; `Io`.
    pub fn publish(&mut self) -> Result<()> {
        point::reached("draft.whole");
        let named = match &self.temporary {
            None => self.env.give_name(&self.file, &self.path),
            Some(temporary) => match self.env.link(temporary, &self.path) {
                Ok(()) => self.env.remove(temporary),
                // A file system without second names.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
                    self.env.rename(temporary, &self.path)
                }
                Err(e) => Err(e),
            },
        };
        named.map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => already_there(&self.path),
            _ => e,
        })?;
        self.temporary = None;
        point::reached("draft.named");
        self.settle()
    }

    /// Puts the finished, durable file in the place of what has its name, in one step, and makes the name durable.
    ///
    /// # Errors
    /// `Io`: the name still leads to the old file.
    pub fn replace(&mut self) -> Result<()> {
        point::reached("draft.whole-to-replace");
        let temporary = match &self.temporary {
            Some(temporary) => temporary,
            // No call gives a file its first name over an old file.
            None => {
                let fresh = fresh_name(&self.path, self.env.uuid())?;
                self.env.give_name(&self.file, &fresh).map_err(|e| e.renamed(&fresh, &self.asked))?;
                self.temporary.insert(fresh)
            }
        };
        point::reached("draft.named-to-replace");
        self.env.rename(temporary, &self.path)?;
        self.temporary = None;
        point::reached("draft.replaced");
        self.settle()
    }

    /// Makes the name durable. The file is synced, too, since its link count has changed.
    fn settle(&self) -> Result<()> {
        self.file.sync_all()?;
        self.env.sync_dir(folder_of(&self.path))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(e) = self.env.remove(temporary)
        {
            log::warn!("{}", e.line());
        }
    }
}

/// The error for a name that must not exist.
pub(super) fn already_there(path: &Path) -> Error {
    Error::new(ErrorKind::Refused, "it exists already; remove it first").at_path(path)
}

/// A temporary name for a file that is to be called `path`, in the same folder. `uuid` makes it unique.
///
/// # Errors
/// `Refused` where `path` does not end in a file name.
fn fresh_name(path: &Path, uuid: Uuid) -> Result<PathBuf> {
    let file_name = path.file_name().ok_or_else(|| Error::new(ErrorKind::Refused, "not a file name").at_path(path))?;
    // Names have at most 255 bytes; a part of it is enough for people to recognise it.
    let start: String = file_name.to_string_lossy().chars().take(32).collect();
    Ok(folder_of(path).join(format!(".{start}.{}.new", uuid.simple())))
}

/// Whether a path has the temporary name of a draft.
pub fn is_fresh_name(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let middle = name.strip_prefix('.').and_then(|name| name.strip_suffix(".new"));
    let uuid = middle.and_then(|middle| middle.rsplit_once('.')).map(|(_, uuid)| uuid);
    uuid.is_some_and(|uuid| uuid.len() == 32 && uuid.bytes().all(|digit| digit.is_ascii_hexdigit()))
}
