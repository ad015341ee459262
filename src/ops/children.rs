//! `children`: the images that stand on an image.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::folder_scan;
use crate::error::{Error, ErrorKind, Result};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env};

/// An image that records another one as its parent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ChildImage {
    /// Its absolute path.
    pub path: String,
    /// Its identity.
    pub uuid: String,
}

/// Finds the images that record the UUID of the image at `path` as their parent's, in its own folder and in `folders`, by
/// their footers and headers alone. Sorted by path. Takes no lock.
///
/// # Errors
/// `Invalid` if the file at `path` is no image; `Io`, `NotFound` for that file and for the folders. Other files that cannot
/// be read are skipped, with a warning.
pub fn children(env: &dyn Env, path: &Path, folders: &[PathBuf]) -> Result<Vec<ChildImage>> {
    // Not the link to it: children that were made on it lie where the file itself lies.
    let path = env.canonical(path)?;
    let file = env.open(&path, Access::Read)?;
    let Some(parent) = ImageIdentity::peek(&file)? else {
        return Err(Error::new(ErrorKind::Invalid, "not a VHD").at_path(&path));
    };
    let id = file.stat()?.id;
    let all = folder_scan::folders_to_scan(env, std::iter::once(Ok(file.folder())), folders)?;
    let found = folder_scan::scan_readable(env, &all)?;
    let stands = found.iter().filter(|kin| kin.identity.parent == Some(parent.uuid) && kin.id != id);
    let mut children: Vec<_> = stands
        .map(|kin| ChildImage { path: kin.path.display().to_string(), uuid: kin.identity.uuid.to_string() })
        .collect();
    children.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(children)
}
