//! Opening an image for a verb that changes the image, under an exclusive lock. Opening is refused if a live journal
//! has writes that the file lacks. An unfinished snapshot of the disk is finished or undone first.

use std::path::Path;

use crate::chain::{Chain, ImageChange, OpenMode, Policy, refuse_change, resolve_snapshot};
use crate::error::Result;
use crate::image::{Image, SavedMtime, open_reconciled, refuse_if_file_is_live};
use crate::storage::{Access, Env, Lock};

/// Opens the image at `path` for a change of the kind `change`, and its parents for reading.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file of the chain
/// - `Refused` if a live journal has writes that the image lacks, if the image must not be written, or if an unfinished
///   merge or snapshot forbids the change
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
pub(super) fn chain(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Chain> {
    Chain::from_image(env, image(env, path, change, policy)?, policy, OpenMode::Write)
}

/// Opens the image at `path` for a change of the kind `change`, without its parents.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on the file
/// - `Refused` if a live journal has writes that the image lacks, if the image must not be written, or if an unfinished
///   merge or snapshot forbids the change
/// - `Invalid`, `Unsupported`, `NotFound`, `Io`
pub(super) fn image(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Image> {
    resolve_snapshot(env, path, &policy.runtime, false)?;
    // Symbolic links are resolved, because a relative path to the parent starts at the folder that contains the link's
    // target.
    let file = env.open(&env.canonical(path)?, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    // This check precedes `open_reconciled`, which may write a footer.
    refuse_if_file_is_live(env, &policy.runtime, &file)?;
    let image = SavedMtime::preserve(&file, || open_reconciled(&file))?;
    image.check_writable()?;
    refuse_change(env, &image, change, &policy.allowed, None)?;
    Ok(image)
}
