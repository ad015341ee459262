//! `rebase`: replaces the parent of a child. The contents of the child's disk do not change, unless only the link is
//! replaced.

use std::path::Path;

use super::copy_up::{CopyUpStage, copy_up};
use super::image_writer::ImageWriter;
use super::open_exclusive;
use super::parent_link::{Locators, allowing_folder, file_ids, open_new_parent, replacement_link};
use super::source::Progress;
use crate::chain::{Chain, ImageChange, OpenMode, Policy, children_of, record_child};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::DiskType;
use crate::image::{Durability, Image, ParentLink, SavedMtime, check_reparent, folder_of, reparent};
use crate::storage::{Access, Env, File};

/// Result of a rebase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rebased {
    /// Bytes copied into the child.
    pub copied: u64,
    /// Whether the new parent is the same file as the old one. In this case only the recorded paths and the recorded
    /// modification time change.
    pub same_parent: bool,
}

/// Makes the image at `path` a child of the image at `parent`. Data of the old parents that the new parent lacks is
/// copied into the child first, so without `only_link` the contents of the disk never change.
///
/// With `only_link` nothing is copied, and the old parents need not exist. The disk then has the sectors of the child
/// over the disk of the new parent. The same call completes an interrupted call.
///
/// # Errors
/// After any error the image has its old or its new parent.
/// - `Refused` if the image is no child, if the new parent is the image itself or its descendant, if the chain would be
///   too deep, or if an unfinished merge forbids the change
/// - `Invalid`, `Refused`, `Unsupported`, `Busy`, `NotFound`, `Io` for a file of either chain
/// - `Unsupported` if the path of the new parent cannot be recorded in the child
/// - `NoSpace`, `Io`, `Poisoned` while copying; errors of `progress`
pub fn rebase(
    env: &dyn Env,
    path: &Path,
    parent: &Path,
    only_link: bool,
    policy: &Policy,
    progress: &mut Progress<'_>,
) -> Result<Rebased> {
    let image = open_exclusive::image(env, path, ImageChange::Link, policy)?;
    let file = image.file().clone();
    if image.kind() != DiskType::Differencing {
        let what = format!("a {} image has no parent to replace", image.kind().word());
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    refuse_cycle(env, &image, parent, policy)?;
    let new = open_new_parent(env, path, parent, policy)?;
    let same_parent = is_current_parent(env, &image, new.youngest(), policy)?;
    let to = replacement_link(env, &image, new.youngest(), Locators::Both)?;
    check_reparent(&image, Some(&to))?;
    record_child(env, new.youngest(), &env.canonical(path)?);
    failpoint::reached("rebase.begun");
    if only_link {
        if same_parent {
            SavedMtime::preserve(&file, || relink_child(env, &file, &to))?;
        } else {
            let time = SavedMtime::save(&file)?;
            warn_children(env, &image)?;
            relink_child(env, &file, &to)?;
            time.advance()?;
        }
        return Ok(Rebased { copied: 0, same_parent });
    }
    let copy = || {
        let new = new.into_frozen();
        // If an interrupted call has set the link, the new parent is the current parent already. So the folder of the
        // new parent is allowed when the current chain is opened.
        let policy = &allowing_folder(policy, folder_of(parent));
        let mut writer =
            ImageWriter::open(env, Chain::from_image(env, image, policy, OpenMode::Write)?, &Durability::FlushOnly)?;
        failpoint::reached("rebase.recovered");
        let outcome = copy_up(&mut writer, Some(&new), progress, &mut |stage| match stage {
            CopyUpStage::Written => failpoint::reached("rebase.some-written"),
            CopyUpStage::Committed => failpoint::reached("rebase.all-committed"),
        });
        let copied = writer.finish(outcome)?;
        failpoint::reached("rebase.file-cut");
        relink_child(env, &file, &to)?;
        Ok(copied)
    };
    let copied = SavedMtime::preserve(&file, copy)?;
    Ok(Rebased { copied, same_parent })
}

fn relink_child(env: &dyn Env, file: &File, to: &ParentLink) -> Result<()> {
    reparent(env, file, Some(to))?;
    failpoint::reached("rebase.linked");
    Ok(())
}

/// Returns whether `parent` is the current parent of `child`. Returns false if the current chain cannot be opened.
fn is_current_parent(env: &dyn Env, child: &Image, parent: &Image, policy: &Policy) -> Result<bool> {
    let again = Image::open(env.open(child.file().path(), Access::Read)?)?;
    let policy = allowing_folder(policy, folder_of(parent.file().path()));
    let Ok(chain) = Chain::from_image(env, again, &policy, OpenMode::Inspect) else { return Ok(false) };
    Ok(file_ids(&chain)?.get(1) == Some(&parent.file().stat()?.id))
}

/// Logs a warning for each child of `image` that the contents of the child's disk may change.
fn warn_children(env: &dyn Env, image: &Image) -> Result<()> {
    for child in children_of(env, image)? {
        let parent = image.file().path().display();
        log::warn!(
            "{}: its parent {parent} gets another parent, so the contents of its disk may change",
            child.display()
        );
    }
    Ok(())
}

/// Refuses a new parent whose chain contains `child`. Must be called before the new parent's chain is locked: if the
/// chain contains `child`, its lock would conflict with the exclusive lock on `child`.
fn refuse_cycle(env: &dyn Env, child: &Image, parent: &Path, policy: &Policy) -> Result<()> {
    let id = child.file().stat()?.id;
    let chain = Chain::open(env, parent, &allowing_folder(policy, folder_of(child.file().path())), OpenMode::Inspect)?;
    let why = match file_ids(&chain)?.iter().position(|other| *other == id) {
        Some(0) => "an image cannot be its own parent",
        Some(_) => "the new parent has this image among its own parents",
        None if chain.images().iter().any(|image| image.uuid() == child.uuid()) => {
            "the new parent, or one of its parents, has the same UUID"
        }
        None => return Ok(()),
    };
    Err(Error::new(ErrorKind::Refused, why).at_path(child.file().path()))
}
