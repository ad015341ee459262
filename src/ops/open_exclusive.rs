//! Opening what a verb is going to change: nobody else has it, and no killed daemon has left more than the file says.

use std::path::Path;

use crate::chain::{Chain, ImageChange, OpenMode, Policy, refuse_change};
use crate::error::Result;
use crate::image::{Image, SavedMtime, open_reconciled, refuse_if_file_is_live};
use crate::storage::{Access, Env, Lock};

/// Opens the image at `path` to change it, and its parents to read them.
///
/// # Errors
/// Whatever is wrong with a file of the chain; `Busy` where somebody has one open in a way that does not go with ours;
/// `Refused` where a live journal says more than the image, or if an unfinished merge forbids the change.
pub(super) fn chain(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Chain> {
    Chain::from_image(env, image(env, path, change, policy)?, policy, OpenMode::Write)
}

/// Opens the image at `path` to change it, whatever its parents are.
///
/// # Errors
/// As for [`chain`].
pub(super) fn image(env: &dyn Env, path: &Path, change: ImageChange, policy: &Policy) -> Result<Image> {
    // Not the link to it: what it records of its parent counts from the folder it lies in.
    let file = env.open(&env.canonical(path)?, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    // Before its footers are made to agree, which writes.
    refuse_if_file_is_live(env, &policy.runtime, &file)?;
    let image = SavedMtime::preserve(&file, || open_reconciled(&file))?;
    image.check_writable()?;
    refuse_change(env, &image, change, &policy.allowed, None)?;
    Ok(image)
}
