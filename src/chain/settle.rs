//! Settling parents: a daemon that opens a chain for writing takes in what was acknowledged to a parent's guest before it was
//! killed. A reader refuses instead.

use std::path::Path;

use super::open::Chain;
use super::open_mode::OpenMode;
use super::parents::Policy;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, SessionState};
use crate::storage::{Access, Env, Lock};

/// Settles each parent of the image at `path` whose session has its journal in the policy's runtime folder; how many.
///
/// # Errors
/// `Busy` if a process has such a parent open; as [`image::settle`].
pub fn settle_parents(env: &dyn Env, path: &Path, policy: &Policy) -> Result<usize> {
    if policy.runtime.is_empty() {
        return Ok(0);
    }
    let chain = Chain::open(env, path, policy, OpenMode::Inspect)?;
    let mut settled = 0;
    for parent in &chain.images()[1..] {
        let SessionState::Open(_) = SessionState::of(env, parent)? else { continue };
        let path = parent.file().path();
        let file = env.open(path, Access::Write)?;
        if file.stat()?.id != parent.file().stat()?.id {
            return Err(Error::new(ErrorKind::Busy, "it was replaced while it was opened").at_path(path));
        }
        file.lock(Lock::Exclusive)?;
        if image::settle(env, &policy.runtime, &file)? {
            log::info!(
                "{}: what was acknowledged to its guest before its daemon was killed is settled",
                path.display()
            );
            settled += 1;
        }
    }
    Ok(settled)
}
