//! Opening what a verb is going to change: nobody else has it, and no killed daemon has left more than the file says.

use std::path::Path;

use crate::chain::{Chain, Policy, Use, refuse_if_receiving};
use crate::error::Result;
use crate::image::{Image, agreed, refuse_live_file};
use crate::storage::{Access, Env, Lock};

/// Opens the image at `path` to change it, and its parents to read them.
///
/// # Errors
/// Whatever is wrong with a file of the chain; `Busy` where somebody has one open in a way that does not go with ours;
/// `Refused` where a live journal says more than the image, or where a merge into it was begun.
pub(super) fn chain(env: &dyn Env, path: &Path, policy: &Policy) -> Result<Chain> {
    Chain::of(env, image(env, path, policy)?, policy, Use::Write)
}

/// Opens the image at `path` to change it, whatever its parents are.
///
/// # Errors
/// As for [`chain`].
pub(super) fn image(env: &dyn Env, path: &Path, policy: &Policy) -> Result<Image> {
    // Not the link to it: what it records of its parent counts from the folder it lies in.
    let file = env.open(&env.canonical(path)?, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    // Before its footers are made to agree, which writes.
    refuse_live_file(env, policy.runtime.as_ref(), &file)?;
    let image = agreed(&file)?;
    refuse_if_receiving(env, &image, None)?;
    Ok(image)
}
