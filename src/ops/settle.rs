//! `settle`: replays the live journal of a killed daemon into its image. Also `--discard-journal`, which discards the
//! live journal instead.

use std::path::Path;

use crate::error::Result;
use crate::image;
use crate::storage::{Access, Env, Lock, RuntimeFolder};

/// Replays the live journal of the image at `path` and ends its session. Returns false if the image has no session.
///
/// # Errors
/// - `Busy` if another process has the image open
/// - `Refused`, with a message that contains the command to run, if the journal is in none of `folders` or does not
///   belong to the image in its present state
/// - `Poisoned` if a sync of the killed daemon failed
/// - `Invalid`, `NoSpace`, `Io`
pub fn settle(env: &dyn Env, path: &Path, folders: &[RuntimeFolder]) -> Result<bool> {
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    image::settle(env, folders, &file)
}

/// Discards the live journals of images. Writes that were acknowledged since the last flush are lost.
///
/// # Errors
/// - `Busy` if another process has an image open
/// - `Refused`, `Invalid`, `NotFound` if an image cannot be opened
/// - `Io`
pub fn discard(env: &dyn Env, paths: &[&Path], folders: &[RuntimeFolder]) -> Result<()> {
    paths.iter().try_for_each(|path| image::discard_session(env, folders, path))
}
