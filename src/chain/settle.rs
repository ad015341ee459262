//! Settles parents: before a daemon opens a chain for writing, it replays the live journals of parents whose daemons
//! were killed. A reader refuses such a chain instead.

use std::path::Path;

use super::open::Chain;
use super::open_mode::OpenMode;
use super::parents::Policy;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, SessionState};
use crate::storage::{Access, Env, Lock};

/// Replays the live journal of each parent of the image at `path` whose session has not ended on this machine. Returns
/// the number of such parents. If the policy has no runtime folders, does nothing and returns 0.
///
/// # Errors
/// - the errors of [`Chain::open`] in mode `Inspect`
/// - `Busy` if another process holds a lock on a parent with a session, or if the file of such a parent is replaced
///   meanwhile
/// - `Refused`, `Poisoned`, `NoSpace`, `Io`, for the reasons listed at [`image::settle`]
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
            return Err(
                Error::new(ErrorKind::Busy, "the file was replaced while it was opened; try again").at_path(path)
            );
        }
        file.lock(Lock::Exclusive)?;
        if image::settle(env, &policy.runtime, &file)? {
            log::info!(
                "{}: settled: the writes in its live journal, left by a killed daemon, are now in the image",
                path.display()
            );
            settled += 1;
        }
    }
    Ok(settled)
}
