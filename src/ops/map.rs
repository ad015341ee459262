//! `map`: which file answers each range of a disk.

use std::path::Path;

use super::extents::Extents;
use crate::chain::{Chain, Extent, OpenMode, Policy, Source};
use crate::error::Result;
use crate::storage::Env;
use crate::units::SECTOR;

/// A run of a disk that one place answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapRun<'a> {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are; `None` where no file has them and they read as zeros.
    pub position: Option<FilePosition<'a>>,
}

/// A place in a file of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilePosition<'a> {
    /// Which file, counted from the youngest, which is 0.
    pub depth: u16,
    /// Its path.
    pub file: &'a Path,
    /// Byte offset of the run's first byte in it.
    pub offset: u64,
}

/// Tells `found` the runs of the disk at `path`, ascending, without gaps, neighbours joined.
///
/// # Errors
/// Whatever is wrong with a file of the chain; `Busy` where somebody writes to one; what `found` fails with.
pub fn map(env: &dyn Env, path: &Path, policy: &Policy, mut found: impl FnMut(MapRun<'_>) -> Result<()>) -> Result<()> {
    let version = Chain::open(env, path, policy, OpenMode::Read)?.into_frozen();
    let paths: Vec<&Path> = version.files().map(|(_, file)| file.path()).collect();
    version.files().for_each(|(_, file)| file.advise_random_reads());
    let mut tell = |extent: Extent| {
        let place = match extent.source {
            Source::Zero => None,
            // Slots are numbered as the files are, from the youngest.
            Source::File { slot, offset } => {
                Some(FilePosition { depth: slot.0, file: paths[usize::from(slot.0)], offset })
            }
        };
        found(MapRun { start: extent.range.start() * SECTOR, length: extent.range.bytes(), position: place })
    };
    let (mut extents, mut pending) = (Extents::new(&version).uncached(), None::<Extent>);
    while let Some(next) = extents.next()? {
        pending = match pending {
            None => Some(next),
            Some(last) => match last.try_join(next) {
                Some(both) => Some(both),
                None => {
                    tell(last)?;
                    Some(next)
                }
            },
        };
    }
    pending.map_or(Ok(()), tell)
}
