//! `settle`: replays the live journal of a killed daemon into its image. Also `--discard-journal`, which discards the
//! live journal instead.

use std::path::Path;

use crate::error::Result;
use crate::image;
use crate::storage::{Access, Env, Lock, RuntimeFolder};

/// Replays the live journal of the image at `path` and ends its session. Returns false if the image has no session.
///
/// # Errors
/// - `Busy` if another process holds a lock on the image, or has its journal open
/// - `Refused`, with a message that contains the command or option to use, if the journal is in none of `folders` or
///   does not belong to the image in its present state, or if the session is of another machine
/// - `Refused` if the image must not be written
/// - `Poisoned` if a sync of the killed daemon failed
/// - `Invalid`, `Unsupported`, `NotFound`, `NoSpace`, `Io`
pub fn settle(env: &dyn Env, path: &Path, folders: &[RuntimeFolder]) -> Result<bool> {
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    image::settle(env, folders, &file)
}

/// Discards the live journals of images. Writes that were acknowledged since the last flush are lost.
///
/// # Errors
/// - `Busy` if another process holds a lock on an image
/// - `Refused`, `Invalid`, `Unsupported`, `NotFound` if an image cannot be opened
/// - `Io`
pub fn discard(env: &dyn Env, paths: &[&Path], folders: &[RuntimeFolder]) -> Result<()> {
    paths.iter().try_for_each(|path| image::discard_session(env, folders, path))
}
