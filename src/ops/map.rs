//! `map`: lists which file of the chain contains each range of a disk.

use std::path::Path;

use super::extents::Extents;
use crate::chain::{Chain, Extent, OpenMode, Policy, Source};
use crate::error::Result;
use crate::storage::{Env, FileSlot};
use crate::units::SECTOR;

/// A range of a disk that is contiguous in one file, or is in no file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapRun<'a> {
    /// Offset of the range on the disk, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Position of the range. `None` if no file contains the range. The range then reads as zeros.
    pub position: Option<FilePosition<'a>>,
}

/// A position in a file of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilePosition<'a> {
    /// Depth of the file in the chain. The depth of the youngest file is 0.
    pub depth: u16,
    /// Path of the file.
    pub file: &'a Path,
    /// Offset of the range in the file.
    pub offset: u64,
}

/// Calls `found` for each range of the disk at `path`. The ranges ascend without gaps. Adjacent ranges are joined if
/// they are contiguous in one file.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
/// - errors of `found`
pub fn map(env: &dyn Env, path: &Path, policy: &Policy, mut found: impl FnMut(MapRun<'_>) -> Result<()>) -> Result<()> {
    let version = Chain::open(env, path, policy, OpenMode::Read)?.into_frozen();
    let files: Vec<(FileSlot, &Path)> = version.files().map(|(slot, file)| (slot, file.path())).collect();
    version.files().for_each(|(_, file)| file.advise_random_reads());
    let mut report = |extent: Extent| {
        let position = match extent.source {
            Source::Zero => None,
            Source::File { slot, offset } => {
                let file = (0..).zip(&files).find(|(_, (of, _))| *of == slot);
                let (depth, (_, file)) = file.expect("an extent is in a file of the chain");
                Some(FilePosition { depth, file, offset })
            }
        };
        found(MapRun { start: extent.range.start() * SECTOR, length: extent.range.bytes(), position })
    };
    let (mut extents, mut pending) = (Extents::new(&version).uncached(), None::<Extent>);
    while let Some(next) = extents.next()? {
        pending = match pending {
            None => Some(next),
            Some(last) => match last.try_join(next) {
                Some(both) => Some(both),
                None => {
                    report(last)?;
                    Some(next)
                }
            },
        };
    }
    pending.map_or(Ok(()), report)
}
