//! Search of folders for images. The result contains the UUIDs of each image and of its parent. Only footers and
//! headers are read.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::image::{ImageIdentity, file_name, is_temporary_name};
use crate::storage::{Access, Env, File, FileId, Folder};

/// An image found by a scan.
#[derive(Debug)]
pub(super) struct ScannedImage {
    /// Absolute path without symbolic links.
    pub(super) path: PathBuf,
    /// Folder that contains the image.
    folder: Folder,
    /// Device and inode.
    pub(super) id: FileId,
    /// UUIDs of the image and of its parent.
    pub(super) identity: ImageIdentity,
}

impl ScannedImage {
    /// Opens the image in the folder in which the scan found it.
    ///
    /// # Errors
    /// - `Busy` if another file has this name now
    /// - `Refused` if the name is a symbolic link, a folder or a device now
    /// - `NotFound`, `Io`
    pub(super) fn open(&self, access: Access) -> Result<File> {
        let file = self.folder.open(file_name(&self.path)?, access)?;
        if file.stat()?.id != self.id {
            return Err(
                Error::new(ErrorKind::Busy, "the file was replaced while it was being opened").at_path(&self.path)
            );
        }
        Ok(file)
    }
}

/// Returns the images in `folders`, each once. Skips other files, temporary files, and files that this user may not
/// read.
///
/// # Errors
/// - `NotFound`, `Io` if a folder cannot be listed
/// - `Io` if a file cannot be read for another reason than a missing permission: the file may be an image
pub(super) fn scan(env: &dyn Env, folders: &[Folder]) -> Result<Vec<ScannedImage>> {
    scan_with(env, folders, &mut Err)
}

/// Returns the images in `folders`, each once. Differs from [`scan`] in that a file that cannot be read for another
/// reason than a missing permission is skipped with a warning.
///
/// # Errors
/// `Io`, `NotFound` if a folder cannot be listed.
pub(super) fn scan_readable(env: &dyn Env, folders: &[Folder]) -> Result<Vec<ScannedImage>> {
    scan_with(env, folders, &mut |e| {
        log::warn!("{}", e.line());
        Ok(())
    })
}

/// Scans the folders. For each file that cannot be read calls `unreadable`; if `unreadable` returns an error, the scan
/// ends with this error.
fn scan_with(
    env: &dyn Env,
    folders: &[Folder],
    unreadable: &mut dyn FnMut(Error) -> Result<()>,
) -> Result<Vec<ScannedImage>> {
    let mut found: Vec<ScannedImage> = Vec::new();
    // A file may have more than one name, and a folder may be given twice.
    let mut seen = HashSet::new();
    for folder in folders {
        for name in folder.list()? {
            if is_temporary_name(&name) {
                continue;
            }
            match scan_entry(env, folder, &name, &mut seen) {
                Ok(image) => found.extend(image),
                Err(e) if may_be_skipped(&e) => {}
                Err(e) => unreadable(e)?,
            }
        }
    }
    Ok(found)
}

/// Returns the folders of `own` and the folders at the paths of `more`, each once.
///
/// # Errors
/// - the first error in `own`
/// - `NotFound`, `Io` for a path of `more`
pub(super) fn folders_to_scan(
    env: &dyn Env,
    own: impl Iterator<Item = Result<Folder>>,
    more: &[PathBuf],
) -> Result<Vec<Folder>> {
    let mut all = Vec::new();
    for folder in own.chain(more.iter().map(|path| env.folder(path)?.absolute())) {
        folder?.add_if_missing(&mut all);
    }
    Ok(all)
}

/// Reads the identity of one file and adds the file to `seen`. Returns `None` if the file is no image or was in `seen`.
fn scan_entry(
    env: &dyn Env,
    folder: &Folder,
    name: &OsStr,
    seen: &mut HashSet<FileId>,
) -> Result<Option<ScannedImage>> {
    let file = open_entry(env, folder, name)?;
    let id = file.stat()?.id;
    if !seen.insert(id) {
        return Ok(None);
    }
    let Some(identity) = ImageIdentity::peek(&file)? else { return Ok(None) };
    Ok(Some(ScannedImage { path: file.path().to_path_buf(), folder: file.folder(), id, identity }))
}

/// Opens a file of a folder. A symbolic link in the folder is followed, because the administrator of the folder created
/// the link.
fn open_entry(env: &dyn Env, folder: &Folder, name: &OsStr) -> Result<File> {
    match folder.open(name, Access::Read) {
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            env.open(&env.canonical(&folder.path().join(name))?, Access::Read)
        }
        opened => opened,
    }
}

/// Returns whether the error of opening a name shows that the name is no readable image: a folder, device or socket, a
/// dangling symbolic link, a removed file, or a file that this user may not read.
fn may_be_skipped(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound)
        || matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
