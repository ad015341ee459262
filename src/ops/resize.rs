//! `resize`: a larger disk, or a smaller one where nothing is lost.

use std::path::Path;

use super::source::{CHUNK_BYTES, CHUNK_SECTORS, Progress, SourceDisk};
use super::{folder_scan, open_exclusive};
use crate::chain::{Chain, ImageChange, PlanBuffer, Policy, Source, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Defect, Footer};
use crate::image::{Image, Offline, SavedMtime};
use crate::storage::{Buffer, Env};
use crate::units::{SECTOR, SectorRange};

/// What became of the size, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    /// Before.
    pub from: u64,
    /// Now.
    pub to: u64,
}

/// Gives the disk at `path` another size. What is added reads as zeros; what is cut off must.
///
/// Children keep their own sizes and what they show, since both kinds of change are zeros; those beside the image are
/// named in the log, as other programs want sizes to be equal. A call that was interrupted is
/// completed by the same call.
///
/// # Errors
/// `Invalid` for a size that the format does not have; `Refused` for a smaller one without `shrink`, or where a byte that
/// would be cut off is not zero; `NoSpace`, `Io`: the disk has the one size or the other; what `progress` fails with.
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
    let file = chain.youngest().file().clone();
    SavedMtime::preserve(&file, || resize_locked(env, path, chain, size, shrink, progress))
}

fn resize_locked(
    env: &dyn Env,
    path: &Path,
    chain: Chain,
    size: u64,
    shrink: bool,
    progress: &mut Progress<'_>,
) -> Result<Resized> {
    let (file, from) = (chain.youngest().file().clone(), chain.youngest().size());
    let done = Resized { from, to: size };
    if size > from {
        let (image, beneath) = chain.into_parts();
        let mut plan = PlanBuffer::default();
        Offline::new(&image)?.grow(size, &mut |range| exposed_ranges(&beneath, range, &mut plan))?;
        warn_of_children(env, &image);
        return Ok(done);
    }
    if size < from && !shrink {
        let what = format!("it has {from} bytes, and is made smaller only with --shrink");
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    let disk = SourceDisk::Chain(chain.into_frozen());
    if let Some(at) = first_nonzero_byte(&disk, size / SECTOR, progress)? {
        let what = format!("byte {at} of the disk is not zero: it would be lost");
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
        warn_of_children(env, &image);
    }
    Ok(done)
}

/// Says which children beside the image have another size now. Not more than that: what they show is the same.
fn warn_of_children(env: &dyn Env, parent: &Image) {
    for kin in folder_scan::scan(env, &[parent.file().folder()]).unwrap_or_default() {
        if kin.identity.parent == Some(parent.uuid()) {
            let path = kin.path.display();
            log::warn!("{path}: a child of the resized image keeps its own size; Hyper-V wants the two to be equal");
        }
    }
}

/// The parts of a range that are not known to be zero in a chain.
fn exposed_ranges(beneath: &Version, range: SectorRange, plan: &mut PlanBuffer) -> Result<Vec<SectorRange>> {
    beneath.plan_read_now(range, plan)?;
    Ok(plan.extents.iter().filter(|e| e.source != Source::Zero).map(|e| e.range).collect())
}

/// The first byte at or behind a sector that is not zero.
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
