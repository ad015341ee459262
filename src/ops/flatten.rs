//! `flatten`: copies data of the parents into a child. The child then has no parent, or one of its ancestors as parent.

use std::path::Path;

use super::copy_up::{CopyUpStage, copy_up};
use super::image_writer::ImageWriter;
use super::open_exclusive;
use super::parent_link::{Locators, file_ids, open_new_parent, replacement_link};
use super::source::Progress;
use crate::chain::{Chain, ImageChange, Policy, record_child};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::{DiskType, bitmap};
use crate::image::{
    Durability, Image, Offline, ParentLink, SavedMtime, check_reparent, is_reparent_finished, next_data, reparent,
};
use crate::storage::{Access, Env, File};
use crate::units::SECTOR;

/// Copies data of the parents into the image at `path`. Without `keep`, the data of all parents is copied, and the link
/// to the parent is removed. With `keep`, the data of the parents above `keep` is copied, and the link is set to
/// `keep`. The contents of the disk never change. Returns the number of bytes that were copied.
///
/// The same call completes an interrupted call. A fixed image is not changed.
///
/// # Errors
/// After any error the image has its old or its new parent.
/// - `Refused` if `keep` is not among the parents, or if an unfinished merge forbids the change
/// - `Invalid`, `Refused`, `Unsupported`, `Busy`, `NotFound`, `Io` for a file of the chain
/// - `Unsupported` if the path of `keep` cannot be recorded in the child
/// - `NoSpace`, `Io`, `Poisoned` while copying; errors of `progress`
pub fn flatten(
    env: &dyn Env,
    path: &Path,
    keep: Option<&Path>,
    policy: &Policy,
    progress: &mut Progress<'_>,
) -> Result<u64> {
    let chain = open_exclusive::chain(env, path, ImageChange::Link, policy)?;
    let file = chain.youngest().file().clone();
    SavedMtime::preserve(&file, || copy_and_link(env, path, chain, keep, policy, progress))
}

fn copy_and_link(
    env: &dyn Env,
    path: &Path,
    chain: Chain,
    keep: Option<&Path>,
    policy: &Policy,
    progress: &mut Progress<'_>,
) -> Result<u64> {
    let (file, kind) = (chain.youngest().file().clone(), chain.youngest().kind());
    let number = match keep {
        None => None,
        Some(ancestor) => {
            let id = env.open(ancestor, Access::Read)?.stat()?.id;
            let what = || format!("{} is not among its parents", ancestor.display());
            let number = file_ids(&chain)?.iter().skip(1).position(|other| *other == id);
            Some(number.ok_or_else(|| Error::new(ErrorKind::Refused, what()).at_path(path))?)
        }
    };
    let kept = keep.map(|ancestor| open_new_parent(env, path, ancestor, policy)).transpose()?;
    let link = kept
        .as_ref()
        .map(|kept| replacement_link(env, chain.youngest(), kept.youngest(), Locators::Both))
        .transpose()?;
    if let Some(kept) = &kept {
        record_child(env, kept.youngest(), &env.canonical(path)?);
    }
    match (kind, number) {
        (DiskType::Fixed, _) => return Ok(0),
        (DiskType::Dynamic, _) | (DiskType::Differencing, Some(0)) => {
            drop(chain);
            return complete_interrupted(env, &file, link.as_ref()).map(|()| 0);
        }
        (DiskType::Differencing, _) => {}
    }
    check_reparent(chain.youngest(), link.as_ref())?;
    let kept = kept.map(Chain::into_frozen);
    let mut writer = ImageWriter::open(env, chain, &Durability::FlushOnly)?;
    failpoint::reached("flatten.recovered");
    let copied = copy_up(&mut writer, kept.as_ref(), progress, &mut |stage| match stage {
        CopyUpStage::Written => failpoint::reached("flatten.some-written"),
        CopyUpStage::Committed => failpoint::reached("flatten.all-committed"),
    });
    let copied = writer.finish(copied)?;
    failpoint::reached("flatten.file-cut");
    if link.is_none() {
        zero_absent_sectors(&file)?;
        failpoint::reached("flatten.absent-blank");
    }
    reparent(env, &file, link.as_ref())?;
    failpoint::reached("flatten.linked");
    Ok(copied)
}

/// Completes a call that was interrupted after it had set or removed the link.
fn complete_interrupted(env: &dyn Env, file: &File, link: Option<&ParentLink>) -> Result<()> {
    let image = Image::open(file.clone())?;
    match is_reparent_finished(&image) {
        true => Offline::new(&image)?.truncate_after_blocks(),
        false => reparent(env, file, link),
    }
}

/// Zeroes the data of sectors whose bits are clear. In a root these sectors read as zeros, but programs that ignore
/// bitmaps would read old data.
fn zero_absent_sectors(file: &File) -> Result<()> {
    let offline = Offline::new(&Image::open(file.clone())?)?;
    let block_size = offline.block_size().expect("it is a child");
    for block in offline.blocks() {
        let (words, (_, data)) = (offline.bitmap(block)?, offline.block(block).expect("it has a place"));
        let mut at = 0;
        while at < block_size.sectors() {
            let (set, count) = bitmap::run(&words, at, block_size.sectors());
            let (start, len) = (data + u64::from(at) * SECTOR, u64::from(count) * SECTOR);
            if !set && next_data(file, start..start + len)?.is_some() {
                file.punch_hole(start, len)?;
            }
            at += count;
        }
    }
    file.sync()
}
