//! `diff`: lists the ranges of a disk that were written since an ancestor, for an incremental backup.

use std::path::Path;

use crate::chain::{Chain, OpenMode, Policy};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Env};
use crate::units::SECTOR;

/// A range of a disk that was written since an ancestor got a child.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct ChangedRun {
    /// Offset of the range on the disk, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Calls `found` for each range of the disk at `path` that was written since the ancestor at `since` (by default the
/// parent) got a child. The ranges ascend and consist of whole sectors, and adjacent ranges are joined. Only bitmaps
/// are read.
///
/// # Errors
/// - `Refused` if there is no such ancestor
/// - `Busy` if another process holds a conflicting lock on a file
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
/// - errors of `found`
pub fn diff(
    env: &dyn Env,
    path: &Path,
    since: Option<&Path>,
    policy: &Policy,
    mut found: impl FnMut(ChangedRun) -> Result<()>,
) -> Result<()> {
    let chain = Chain::open(env, path, policy, OpenMode::Read)?;
    let ancestor = match since {
        None if chain.images().len() > 1 => 1,
        None => return Err(Error::new(ErrorKind::Refused, "the image has no parent to compare with").at_path(path)),
        Some(since) => depth_of(env, &chain, since)?,
    };
    chain.changed_ranges(ancestor, |range| found(ChangedRun { start: range.start() * SECTOR, length: range.bytes() }))
}

/// Returns the depth in the chain of the file at `since`.
fn depth_of(env: &dyn Env, chain: &Chain, since: &Path) -> Result<usize> {
    let id = env.open(since, Access::Read)?.stat()?.id;
    for (depth, image) in chain.images().iter().enumerate() {
        if image.file().stat()?.id == id {
            return Ok(depth);
        }
    }
    let child = chain.youngest().file().path().display();
    Err(Error::new(ErrorKind::Refused, format!("it is no ancestor of {child}")).at_path(since))
}
