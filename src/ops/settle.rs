//! `settle`: writes the acknowledged writes of a killed daemon to its image. Also `--discard-journal`, which gives them
//! up.

use std::path::Path;

use crate::error::Result;
use crate::image;
use crate::storage::{Access, Env, Lock, RuntimeFolder};

/// Replays the live journal of the image at `path` and ends its session. Returns false if the image has no session.
///
/// # Errors
/// - `Busy` if another process has the image open
/// - `Refused`, with the command to run, if the journal is in none of `folders` or does not fit the image
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
/// As [`image::discard_session`].
pub fn discard(env: &dyn Env, paths: &[&Path], folders: &[RuntimeFolder]) -> Result<()> {
    paths.iter().try_for_each(|path| image::discard_session(env, folders, path))
}
