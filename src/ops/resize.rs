//! `resize`: makes a disk larger, or smaller if only zeros are cut off.

use std::path::Path;

use super::source::{CHUNK_BYTES, CHUNK_SECTORS, Progress, SourceDisk};
use super::{folder_scan, open_exclusive};
use crate::chain::{Chain, ImageChange, PlanBuffer, Policy};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Defect, Footer};
use crate::image::{Image, Offline, SavedMtime, grow_image};
use crate::storage::{Buffer, Env};
use crate::units::SECTOR;

/// Result of a resize, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    /// Size before.
    pub from: u64,
    /// Size after.
    pub to: u64,
}

/// Changes the size of the disk at `path`. Added sectors read as zeros, and only zeros may be cut off.
///
/// Children keep their own sizes and contents, since only zeros are added or cut off. A warning is logged for each
/// child in the folder of the image if the sizes of child and image then differ, because other programs require equal
/// sizes. The same call completes an interrupted call.
///
/// # Errors
/// After any error the disk has its old or its new size.
/// - `Invalid` if the format does not allow the size
/// - `Refused` for a smaller size without `shrink`, if a byte that would be cut off is not zero, if the block table
///   would be too large, or if an unfinished merge forbids the change
/// - `Invalid`, `Refused`, `Unsupported`, `Busy`, `NotFound`, `Io` for a file of the chain
/// - `NoSpace`, `Io`; errors of `progress`
pub fn resize(
    env: &dyn Env,
    path: &Path,
    size: u64,
    shrink: bool,
    policy: &Policy,
    progress: &mut Progress<'_>,
) -> Result<Resized> {
    if !Footer::size_fits(size) {
        return Err(Error::from(Defect::DiskSize { at: 0, size }).without_offset().at_path(path));
    }
    let chain = open_exclusive::chain(env, path, ImageChange::Size, policy)?;
    let (file, from) = (chain.youngest().file().clone(), chain.youngest().size());
    if size > from {
        let (image, beneath) = chain.into_parts();
        let mut plan = PlanBuffer::default();
        grow_image(&image, size, &mut |range| beneath.data_ranges_now(range, &mut plan))?;
        warn_of_children(env, &image, size);
        return Ok(Resized { from, to: size });
    }
    SavedMtime::preserve(&file, || shrink_locked(env, path, chain, size, shrink, progress))
}

fn shrink_locked(
    env: &dyn Env,
    path: &Path,
    chain: Chain,
    size: u64,
    shrink: bool,
    progress: &mut Progress<'_>,
) -> Result<Resized> {
    let (file, from) = (chain.youngest().file().clone(), chain.youngest().size());
    let done = Resized { from, to: size };
    if size < from && !shrink {
        let what = format!("the disk has {from} bytes; give --shrink to make it smaller");
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    let disk = SourceDisk::Chain(chain.into_frozen());
    if let Some(at) = first_nonzero_byte(&disk, size / SECTOR, progress)? {
        let what = format!("byte {at} of the disk is not zero and would be lost");
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    let image = Image::open(file)?;
    let offline = Offline::new(&image)?;
    let mut watch = |_| progress(from);
    if size < from || shrink {
        offline.shrink(size, &mut watch)?
    } else {
        offline.truncate_after_blocks()?
    }
    if size < from {
        warn_of_children(env, &image, size);
    }
    Ok(done)
}

/// Logs a warning for each child in the folder of `parent` that does not have `size`, the new size of `parent`. Logs
/// nothing if the folder cannot be searched.
fn warn_of_children(env: &dyn Env, parent: &Image, size: u64) {
    for image in folder_scan::scan(env, &[parent.file().folder()]).unwrap_or_default() {
        if image.identity.parent == Some(parent.uuid()) && image.identity.size != size {
            let path = image.path.display();
            log::warn!("{path}: a child of the resized image keeps its own size, but Hyper-V requires equal sizes");
        }
    }
}

/// Returns the first byte at or after sector `from` that is not zero.
fn first_nonzero_byte(disk: &SourceDisk, from: u64, progress: &mut Progress<'_>) -> Result<Option<u64>> {
    let (mut data, mut plan) = (disk.data_runs_from(from), PlanBuffer::default());
    let mut buffer = Buffer::zeroed(CHUNK_BYTES);
    while let Some(run) = data.next()? {
        let mut rest = run;
        while !rest.is_empty() {
            let piece = rest.first(CHUNK_SECTORS);
            rest = rest.skip(piece.count());
            let bytes = &mut buffer[..usize::try_from(piece.bytes()).expect("at most a chunk")];
            disk.read(piece, bytes, &mut plan)?;
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                return Ok(Some(piece.start() * SECTOR + at as u64));
            }
            progress(piece.end() * SECTOR)?;
        }
    }
    Ok(None)
}
