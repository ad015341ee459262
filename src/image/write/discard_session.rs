//! Gives up the session of an image, with the writes that only its journal holds.

use std::path::Path;

use super::journal::Journal;
use crate::error::{ErrorKind, Result};
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::storage::{Access, Env, Lock, RuntimeFolder};
use crate::units::SECTOR_BYTES;

/// Gives up what the session of the image at `path` acknowledged and did not write: cuts the stamp, and removes the journal if
/// it lies in one of `folders`, no process has it open, and it was last held for this very file. An image without a stamp stays as
/// it is.
///
/// # Errors
/// `Busy` if a process has the image open; whatever makes it impossible to open it; `Io`.
pub fn discard_session(env: &dyn Env, folders: &[RuntimeFolder], path: &Path) -> Result<()> {
    // A look first: an image that is in order may be one that this user can only read.
    if Image::open(env.open(path, Access::Read)?)?.stamp()?.is_none() {
        return Ok(());
    }
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    let Some((stamp, at)) = Image::open(file.clone())?.stamp()? else { return Ok(()) };
    file.write_at(&[0; SECTOR_BYTES], at)?;
    file.sync()?;
    log::warn!("{}: its live journal is discarded, with what was acknowledged since the last flush", path.display());
    for folder in folders {
        match Journal::open(folder, &journal_name(stamp.session)) {
            Ok(journal) if journal.recorded_file().0 == file.stat()?.id => journal.remove()?,
            Ok(journal) => log::warn!("{} stays: it was last held for another file", journal.path().display()),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => log::warn!("the journal stays: {}", e.line()),
        }
    }
    Ok(())
}
