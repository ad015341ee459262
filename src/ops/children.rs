//! `children`: lists the children of an image.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::folder_scan;
use crate::error::{Error, ErrorKind, Result};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env};

/// An image that names another image as its parent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ChildImage {
    /// Absolute path of the child.
    pub path: String,
    /// UUID of the child.
    pub uuid: String,
}

/// Returns the children of the image at `path` in the folder of the image and in `folders`, sorted by path. Compares
/// only UUIDs in footers and headers. Takes no lock. Skips files that this user may not read, and other files that
/// cannot be read; logs a warning for each of the latter.
///
/// # Errors
/// - `Invalid` if the file at `path` is no image, `Refused` if it is no regular file
/// - `Io`, `NotFound` for the file at `path` and for the folders
pub fn children(env: &dyn Env, path: &Path, folders: &[PathBuf]) -> Result<Vec<ChildImage>> {
    // Symbolic links are resolved, because children usually lie in the folder of the link's target.
    let path = env.canonical(path)?;
    let file = env.open(&path, Access::Read)?;
    let Some(parent) = ImageIdentity::peek(&file)? else {
        return Err(Error::new(ErrorKind::Invalid, "not a VHD").at_path(&path));
    };
    let id = file.stat()?.id;
    let all = folder_scan::folders_to_scan(env, std::iter::once(Ok(file.folder())), folders)?;
    let found = folder_scan::scan_readable(env, &all)?;
    let of_parent = found.iter().filter(|image| image.identity.parent == Some(parent.uuid) && image.id != id);
    let mut children: Vec<_> = of_parent
        .map(|image| ChildImage { path: image.path.display().to_string(), uuid: image.identity.uuid.to_string() })
        .collect();
    children.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(children)
}
