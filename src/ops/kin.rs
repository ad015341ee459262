//! Whose child is what: the images in some folders, by their footers and headers alone.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Glance, is_fresh_name};
use crate::storage::{Access, Env, FileId};

/// An image that was found.
#[derive(Debug)]
pub(super) struct Kin {
    /// Its absolute path, without symbolic links.
    pub(super) path: PathBuf,
    /// Which file it is.
    pub(super) id: FileId,
    /// Who it is.
    pub(super) glance: Glance,
}

/// The images that lie in these folders, each once. What is no image is passed over, and what nobody but its maker knows
/// yet.
///
/// # Errors
/// `Io`: an image that cannot be read might be the one that is looked for. What we may not read at all we cannot know.
pub(super) fn in_folders(env: &dyn Env, folders: &[PathBuf]) -> Result<Vec<Kin>> {
    gather(env, folders, &mut Err)
}

/// As [`in_folders`], without the images that cannot be read: the log names them.
///
/// # Errors
/// `Io`, `NotFound`: a folder cannot be listed.
pub(super) fn readable_in_folders(env: &dyn Env, folders: &[PathBuf]) -> Result<Vec<Kin>> {
    gather(env, folders, &mut |e| {
        log::warn!("{}", e.line());
        Ok(())
    })
}

/// The images in these folders; `unreadable` decides whether one that cannot be read ends the search.
fn gather(env: &dyn Env, folders: &[PathBuf], unreadable: &mut dyn FnMut(Error) -> Result<()>) -> Result<Vec<Kin>> {
    let mut found: Vec<Kin> = Vec::new();
    // A file may have more than one name, and a folder may be given twice.
    let mut seen = HashSet::new();
    for folder in folders {
        for path in env.list(folder)? {
            if is_fresh_name(&path) {
                continue;
            }
            match look(env, &path, &mut seen) {
                Ok(kin) => found.extend(kin),
                Err(e) if is_none_of_ours(&e) => {}
                Err(e) => unreadable(e)?,
            }
        }
    }
    Ok(found)
}

/// The image at `path`; `None` if it is no image, or was seen before.
fn look(env: &dyn Env, path: &Path, seen: &mut HashSet<FileId>) -> Result<Option<Kin>> {
    let file = env.open(path, Access::Read)?;
    let id = file.stat()?.id;
    if !seen.insert(id) {
        return Ok(None);
    }
    let Some(glance) = Glance::at(&file)? else { return Ok(None) };
    Ok(Some(Kin { path: env.canonical(path)?, id, glance }))
}

/// Folders, devices and sockets; names that lead nowhere (any more); what is closed to us.
fn is_none_of_ours(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound)
        || matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
