//! `diff`: what has changed since an ancestor; the input of an incremental backup.

use std::path::Path;

use crate::chain::{Chain, OpenMode, Policy};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Env};
use crate::units::SECTOR;

/// A run of a disk that was written since.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct ChangedRun {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// Tells `found` the runs of the disk at `path` that were written since its ancestor at `since`, or else its parent, became
/// one: ascending, neighbours joined, sector by sector. Only bitmaps are read.
///
/// # Errors
/// Whatever is wrong with a file of the chain; `Busy` where somebody writes to one; `Refused` where there is no such
/// ancestor; what `found` fails with.
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
        None => return Err(Error::new(ErrorKind::Refused, "it has no parent to differ from").at_path(path)),
        Some(since) => depth_of(env, &chain, since)?,
    };
    chain.changed_ranges(ancestor, |range| found(ChangedRun { start: range.start() * SECTOR, length: range.bytes() }))
}

/// The place in the chain of the file at `since`.
fn depth_of(env: &dyn Env, chain: &Chain, since: &Path) -> Result<usize> {
    let id = env.open(since, Access::Read)?.stat()?.id;
    for (place, image) in chain.images().iter().enumerate() {
        if image.file().stat()?.id == id {
            return Ok(place);
        }
    }
    let child = chain.youngest().file().path().display();
    Err(Error::new(ErrorKind::Refused, format!("it is no ancestor of {child}")).at_path(since))
}
