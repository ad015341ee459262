//! Whose child is what: the images in some folders, by their footers and headers alone.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};
use crate::image::{ImageIdentity, file_name, is_temporary_name};
use crate::storage::{Access, Env, File, FileId, Folder};

/// An image that was found.
#[derive(Debug)]
pub(super) struct ScannedImage {
    /// Its absolute path, without symbolic links.
    pub(super) path: PathBuf,
    /// The folder in which it was found.
    folder: Folder,
    /// Which file it is.
    pub(super) id: FileId,
    /// Who it is.
    pub(super) identity: ImageIdentity,
}

impl ScannedImage {
    /// Opens it again in the folder in which it was found.
    ///
    /// # Errors
    /// `Busy` if another file has the name now; `NotFound`, `Io`.
    pub(super) fn open(&self, access: Access) -> Result<File> {
        let file = self.folder.open(file_name(&self.path)?, access)?;
        if file.stat()?.id != self.id {
            return Err(Error::new(ErrorKind::Busy, "it was replaced while it was looked at").at_path(&self.path));
        }
        Ok(file)
    }
}

/// The images that lie in these folders, each once. What is no image is passed over, and what nobody but its maker knows
/// yet.
///
/// # Errors
/// `Io`: an image that cannot be read might be the one that is looked for. What we may not read at all we cannot know.
pub(super) fn scan(env: &dyn Env, folders: &[Folder]) -> Result<Vec<ScannedImage>> {
    scan_with(env, folders, &mut Err)
}

/// As [`in_folders`], without the images that cannot be read: the log names them.
///
/// # Errors
/// `Io`, `NotFound`: a folder cannot be listed.
pub(super) fn scan_readable(env: &dyn Env, folders: &[Folder]) -> Result<Vec<ScannedImage>> {
    scan_with(env, folders, &mut |e| {
        log::warn!("{}", e.line());
        Ok(())
    })
}

/// The images in these folders; `unreadable` decides whether one that cannot be read ends the search.
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
                Ok(kin) => found.extend(kin),
                Err(e) if may_be_skipped(&e) => {}
                Err(e) => unreadable(e)?,
            }
        }
    }
    Ok(found)
}

/// The folders in `own`, and those at the paths of `more` under their absolute paths; each once.
///
/// # Errors
/// Those in `own`; `NotFound`, `Io`: of a path.
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

/// The image of a name in a folder; `None` if it is no image, or was seen before.
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
    let Some(glance) = ImageIdentity::peek(&file)? else { return Ok(None) };
    Ok(Some(ScannedImage { path: file.path().to_path_buf(), folder: file.folder(), id, identity: glance }))
}

/// Opens a name of a folder; a symbolic link that an operator has put there leads to a file of another folder.
fn open_entry(env: &dyn Env, folder: &Folder, name: &OsStr) -> Result<File> {
    match folder.open(name, Access::Read) {
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            env.open(&env.canonical(&folder.path().join(name))?, Access::Read)
        }
        opened => opened,
    }
}

/// Folders, devices and sockets; names that lead nowhere (any more); what is closed to us.
fn may_be_skipped(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound)
        || matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
