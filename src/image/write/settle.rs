//! Settling: replays and commits the live journal of a killed daemon, without a guest.

use std::sync::Arc;

use super::commit::Commit;
use super::durability::Durability;
use super::run_to_completion::run_to_completion;
use super::writable::Writable;
use crate::error::Result;
use crate::image::open::Image;
use crate::storage::{Env, File, FileSlot, RuntimeFolder};

/// Replays the live journal of the image in `file`, commits it, and ends the session as a daemon does when it stops.
/// The caller has locked `file` exclusively.
///
/// Returns false, without a change, if the image has no stamp.
///
/// # Errors
/// - the errors of [`Image::open`];
/// - `Refused` if none of `folders` has the journal, if the journal does not fit the image, if the session is of
///   another machine, or if the image must not be written;
/// - `Poisoned` if a sync of the killed daemon failed;
/// - `Busy` if a process has the journal open;
/// - `NoSpace`, `Io`: the session continues, and settling it again is safe.
pub fn settle(env: &dyn Env, folders: &[RuntimeFolder], file: &File) -> Result<bool> {
    let image = Image::open(file.clone())?;
    if image.stamp()?.is_none() {
        return Ok(false);
    }
    let image =
        Arc::new(Writable::new(env, image, &Durability::Journal { folders: folders.to_vec(), required: false })?);
    let mut commit = Commit::new(image.clone(), FileSlot(0));
    run_to_completion(env, image.file(), FileSlot(0), |failed, ops| commit.next(failed, ops))?;
    image.end_session();
    image.trim()?;
    image.remove_journal()?;
    Ok(true)
}
