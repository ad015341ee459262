//! Opening an image that a verb changes, under an exclusive lock. Refused if a live journal holds writes that the file
//! lacks.

use std::path::Path;

use crate::chain::{Chain, ImageChange, OpenMode, Policy, refuse_change};
use crate::error::Result;
use crate::image::{Image, SavedMtime, open_reconciled, refuse_if_file_is_live};
use crate::storage::{Access, Env, Lock};

/// Opens the image at `path` to change it, and its parents to read them.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file of the chain
/// - `Refused` if a live journal holds writes that the image lacks, or if an unfinished merge forbids the change
/// - `Invalid`, `NotFound`, `Io` for a file of the chain
pub(super) fn chain(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Chain> {
    Chain::from_image(env, image(env, path, change, policy)?, policy, OpenMode::Write)
}

/// Opens the image at `path` to change it, without its parents.
///
/// # Errors
/// As [`chain`], for this file.
pub(super) fn image(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Image> {
    // Symbolic links are resolved first: recorded paths to the parent are relative to the folder of the file itself.
    let file = env.open(&env.canonical(path)?, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    // This check precedes `open_reconciled`, which may write a footer.
    refuse_if_file_is_live(env, &policy.runtime, &file)?;
    let image = SavedMtime::preserve(&file, || open_reconciled(&file))?;
    image.check_writable()?;
    refuse_change(env, &image, change, &policy.allowed, None)?;
    Ok(image)
}
