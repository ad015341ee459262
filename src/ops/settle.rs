//! `settle`: what a killed daemon acknowledged becomes part of its image, without serving; and what `--discard-journal` does.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::image;
use crate::storage::{Access, Env, Lock, Runtime};

/// Takes the live journal of the image at `path` in, and ends its session. False if it has none.
///
/// # Errors
/// `Busy` if a process has the image open; `Refused` if the journal is not in `runtime` or does not fit the image, with what to
/// do; `Poisoned` if a sync of the killed daemon failed; whatever is wrong with the image; `NoSpace`, `Io`.
pub fn settle(env: &dyn Env, path: &Path, runtime: Option<&Runtime>) -> Result<bool> {
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    let image = image::Image::open(file.clone())?;
    if image.stamp()?.is_none() {
        return Ok(false);
    }
    match runtime {
        Some(runtime) => image::settle(env, runtime, &file),
        None => {
            image::refuse_if_live(env, None, &image)?;
            Err(Error::new(ErrorKind::Refused, "there is no runtime folder; see --runtime-dir").at_path(path))
        }
    }
}

/// Gives up the live journals of images: what was acknowledged since their last flush is lost.
///
/// # Errors
/// As [`image::discard`].
pub fn discard(env: &dyn Env, paths: &[&Path], runtime: Option<&Runtime>) -> Result<()> {
    paths.iter().try_for_each(|path| image::discard(env, runtime, path))
}
