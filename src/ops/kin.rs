//! Whose child is what: the images in some folders, by their footers and headers alone.

use std::path::PathBuf;

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
    let mut found: Vec<Kin> = Vec::new();
    for folder in folders {
        for path in env.list(folder)? {
            if is_fresh_name(&path) {
                continue;
            }
            let file = match env.open(&path, Access::Read) {
                Ok(file) => file,
                Err(e) if is_none_of_ours(&e) => continue,
                Err(e) => return Err(e),
            };
            let id = file.stat()?.id;
            if found.iter().all(|kin| kin.id != id)
                && let Some(glance) = Glance::at(&file)?
            {
                found.push(Kin { path: env.canonical(&path)?, id, glance });
            }
        }
    }
    Ok(found)
}

/// Folders, devices and sockets; names that lead nowhere (any more); what is closed to us.
fn is_none_of_ours(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound)
        || matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
