//! `settle`: what a killed daemon acknowledged becomes part of its image, without serving; and what `--discard-journal` does.

use std::path::Path;

use crate::error::Result;
use crate::image;
use crate::storage::{Access, Env, Lock, RuntimeFolder};

/// Takes the live journal of the image at `path` in, and ends its session. False if it has none.
///
/// # Errors
/// `Busy` if a process has the image open; `Refused` if the journal is in none of `folders` or does not fit the image, with what to
/// do; `Poisoned` if a sync of the killed daemon failed; whatever is wrong with the image; `NoSpace`, `Io`.
pub fn settle(env: &dyn Env, path: &Path, folders: &[RuntimeFolder]) -> Result<bool> {
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    image::settle(env, folders, &file)
}

/// Gives up the live journals of images: what was acknowledged since their last flush is lost.
///
/// # Errors
/// As [`image::discard_session`].
pub fn discard(env: &dyn Env, paths: &[&Path], folders: &[RuntimeFolder]) -> Result<()> {
    paths.iter().try_for_each(|path| image::discard_session(env, folders, path))
}
