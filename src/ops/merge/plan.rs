//! Which files a merge concerns, whether it may be, and the locks on them. Nothing is changed here.

use std::path::Path;

use super::copy_down::LayerStack;
use crate::chain::{
    Chain, FileStamp, ImageChange, MergedLayer, OpenMode, Policy, absolute_path, refuse_change, relative_path,
};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, check_reparent, folder_of, refuse_if_live};
use crate::ops::folder_scan::{self, ScannedImage};
use crate::ops::parent_link::{Locators, replacement_link};
use crate::storage::{Access, Env, File, FileId, Folder, Lock};

/// What was found. Holds the locks: shared on what is folded, exclusive on what is relinked.
pub(super) struct MergePlan {
    /// CHILD and what lies between, youngest first.
    pub(super) layers: LayerStack,
    pub(super) merged_layers: Vec<MergedLayer>,
    /// The folder in which each of them was found.
    pub(super) layer_folders: Vec<Folder>,
    /// What receives it, read only.
    pub(super) ancestor: Image,
    /// CHILD's own children.
    pub(super) children: Vec<(FileId, File)>,
    /// Where children were looked for.
    pub(super) child_folders: Vec<Folder>,
}

/// Looks at the chain of `child` down to `into` (its parent if none), and at who else lives on it.
///
/// # Errors
/// Whatever is wrong with a file of the chain; `Busy` where somebody has one open in a way that does not go with ours;
/// `Refused` where another child would change, or the sizes do not fit, or (unless `changed_parent`) a parent was written
/// to since its child recorded its time.
pub(super) fn plan_merge(
    env: &dyn Env,
    child: &Path,
    into: Option<&Path>,
    changed_parent: bool,
    policy: &Policy,
) -> Result<MergePlan> {
    let file = env.open(child, Access::Read)?;
    file.lock(Lock::Shared)?;
    let folder = env.canonical(folder_of(child))?;
    let chain = Chain::from_image(env, Image::open(file)?, policy, OpenMode::Inspect)?;
    let depth = ancestor_depth(env, &chain, into)?;
    let (folded, ancestor) = (&chain.images()[..depth], &chain.images()[depth]);
    // Those between were opened before they were locked: once more, now that nobody changes them.
    let mut images = Vec::with_capacity(depth);
    for image in folded {
        let file = image.file().clone();
        file.lock(Lock::Shared)?;
        let image = Image::open(file)?;
        check_not_truncated(&image)?;
        images.push(image);
    }
    let parents = images.iter().map(|image| image.header().map(|header| header.parent_uuid));
    if !parents.eq(chain.images()[1..=depth].iter().map(|parent| Some(parent.uuid()))) {
        return Err(Error::new(ErrorKind::Busy, "its chain changed while it was looked at").at_path(child));
    }
    for image in images.iter().chain([ancestor]) {
        refuse_if_live(env, &policy.runtime, image)?;
    }
    // Another merge must find again what it recorded of its own images.
    let own = Some(images[0].uuid());
    for image in &images {
        refuse_change(env, image, ImageChange::Link, &policy.allowed, own)?;
    }
    refuse_change(env, ancestor, ImageChange::Contents, &policy.allowed, own)?;
    if !changed_parent {
        refuse_changed_parent(&chain, depth)?;
    }
    let own = images.iter().chain([ancestor]).map(|image| image.file().folder().absolute());
    let folders = folder_scan::folders_to_scan(env, own, &policy.allowed)?;
    let children = lock_children(env, &images, ancestor, &folders, policy)?;
    check_sizes(&images[0], ancestor, children.is_empty())?;
    let folded = images.iter().map(|image| merged_layer(env, image, &folder)).collect::<Result<_>>()?;
    let places = images.iter().map(|image| image.file().folder()).collect();
    let ancestor = Image::open(ancestor.file().folder().open(ancestor.file().name(), Access::Read)?)?;
    Ok(MergePlan {
        layers: LayerStack::new(images),
        merged_layers: folded,
        layer_folders: places,
        ancestor,
        children,
        child_folders: folders,
    })
}

/// # Errors
/// `Refused` if the parent of one of the first `depth` images was written to since.
fn refuse_changed_parent(chain: &Chain, depth: usize) -> Result<()> {
    let folded = &chain.images()[..depth];
    let outdated = chain.outdated().find(|(child, _)| folded.iter().any(|image| image.uuid() == child.uuid()));
    let Some((child, parent)) = outdated else { return Ok(()) };
    let what = format!(
        "it was written to after {} recorded its time, so the disk above may be damaged; if that disk is right, run the \
         same command with --changed-parent",
        child.file().path().display()
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()))
}

/// How many images are folded: those above `into`.
fn ancestor_depth(env: &dyn Env, chain: &Chain, into: Option<&Path>) -> Result<usize> {
    let refuse = |what: &str, path: &Path| Err(Error::new(ErrorKind::Refused, what).at_path(path));
    let child = chain.youngest().file().path();
    if chain.images().len() == 1 {
        return refuse("it has no parent to be merged into", child);
    }
    let Some(into) = into else { return Ok(1) };
    let id = env.open(into, Access::Read)?.stat()?.id;
    for (depth, image) in chain.images().iter().enumerate() {
        if image.file().stat()?.id == id {
            return if depth == 0 { refuse("an image cannot be merged into itself", into) } else { Ok(depth) };
        }
    }
    refuse(&format!("it is not an ancestor of {}", child.display()), into)
}

/// # Errors
/// `Invalid` for a file that was cut off inside a block: what is missing reads as zero, which cannot be told from what
/// was never there.
fn check_not_truncated(image: &Image) -> Result<()> {
    if image.used_end() > image.data_end() {
        let what = "a block goes on behind the end of the file: repair it before it is merged";
        return Err(Error::new(ErrorKind::Invalid, what).at_path(image.file().path()).at_offset(image.data_end()));
    }
    Ok(())
}

/// The disk must be the same afterwards, in size, too.
fn check_sizes(child: &Image, ancestor: &Image, youngest: bool) -> Result<()> {
    let (size, received) = (child.size(), ancestor.size());
    // A smaller child hides what its ancestor has behind its end; zeros there do the same for the child's children.
    if size == received || (size < received && !youngest) {
        return Ok(());
    }
    let (path, ancestor) = (child.file().path(), ancestor.file().path());
    let smaller = if size < received { path } else { ancestor };
    let what = format!(
        "its disk has {size} bytes, and that of {} has {received}: run `diffdisk resize {} {}` first",
        ancestor.display(),
        smaller.display(),
        size.max(received)
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(path))
}

/// CHILD's children, locked. Nobody else's child may be a child of what changes or goes.
fn lock_children(
    env: &dyn Env,
    images: &[Image],
    ancestor: &Image,
    folders: &[Folder],
    policy: &Policy,
) -> Result<Vec<(FileId, File)>> {
    let ids = images.iter().map(|image| Ok(image.file().stat()?.id)).collect::<Result<Vec<_>>>()?;
    let mut children = Vec::new();
    for found in folder_scan::scan(env, folders)? {
        if found.identity.parent == Some(images[0].uuid()) {
            children.push(lock_child(env, &found, ancestor, policy)?);
            continue;
        }
        // The parent of image n is image n + 1; that of the last one is the ancestor.
        for (above, parent) in images[1..].iter().chain([ancestor]).enumerate() {
            if found.identity.parent == Some(parent.uuid()) && found.id != ids[above] {
                let what = format!("it has another child, {}, whose disk would change", found.path.display());
                return Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()));
            }
        }
    }
    Ok(children)
}

/// A child that is going to be relinked: locked, and known to be fit for it.
fn lock_child(env: &dyn Env, child: &ScannedImage, ancestor: &Image, policy: &Policy) -> Result<(FileId, File)> {
    let file = child.open(Access::Write)?;
    file.lock(Lock::Exclusive)?;
    let image = Image::open(file.clone())?;
    refuse_if_live(env, &policy.runtime, &image)?;
    check_reparent(&image, Some(&replacement_link(env, &image, ancestor, Locators::Relative)?))?;
    Ok((file.stat()?.id, file))
}

fn merged_layer(env: &dyn Env, image: &Image, folder: &Path) -> Result<MergedLayer> {
    let path = relative_path(folder, &absolute_path(env, image.file().path())?);
    Ok(MergedLayer { uuid: image.uuid(), stamp: FileStamp::after_sync(image.file())?, path })
}
