//! Discards the session of an image, with the writes that are only in its journal.

use std::path::Path;

use super::journal::Journal;
use crate::error::{ErrorKind, Result};
use crate::format::SessionStamp;
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::storage::{Access, Env, File, Lock, RuntimeFolder};
use crate::units::SECTOR_BYTES;

/// Discards the session of the image at `path`: acknowledged writes that are only in the journal are lost.
///
/// Overwrites the stamp with zeros, and removes the journal if it is in one of `folders`, no process has the journal
/// open, and the journal records this file. An image without a stamp is not changed.
///
/// # Errors
/// - `Busy` if another process holds a lock on the image;
/// - `NotFound`, `Refused` if there is no regular file at `path`;
/// - the errors of [`Image::open`], and `Io`.
pub fn discard_session(env: &dyn Env, folders: &[RuntimeFolder], path: &Path) -> Result<()> {
    // Opened for reading first: this user may not be allowed to write an image without a stamp.
    if Image::open(env.open(path, Access::Read)?)?.stamp()?.is_none() {
        return Ok(());
    }
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    let Some((stamp, at)) = Image::open(file.clone())?.stamp()? else { return Ok(()) };
    file.write_at(&[0; SECTOR_BYTES], at)?;
    file.sync()?;
    log::warn!("{}: its live journal is discarded, with the writes acknowledged since the last flush", path.display());
    remove_journal(folders, &stamp, &file)
}

/// Removes the journal of the image's session, before the file of the image is removed. Neither the stamp nor the file
/// changes. A journal that a process has open, or that was last held for another file, stays, with a warning.
///
/// # Errors
/// `Io`.
pub fn remove_journal_of(folders: &[RuntimeFolder], image: &Image) -> Result<()> {
    image.stamp()?.map_or(Ok(()), |(stamp, _)| remove_journal(folders, &stamp, image.file()))
}

fn remove_journal(folders: &[RuntimeFolder], stamp: &SessionStamp, file: &File) -> Result<()> {
    for folder in folders {
        match Journal::open(folder, &journal_name(stamp.session)) {
            Ok(journal) if journal.recorded_file().0 == file.stat()?.id => journal.remove()?,
            Ok(journal) => log::warn!("{} is not removed: it was last held for another file", journal.path().display()),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => log::warn!("the journal is not removed: {}", e.line()),
        }
    }
    Ok(())
}
