//! Selection of the files of a merge, the locks on all of them except the ancestor, and the checks that the merge is
//! allowed. No file is changed.

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

/// The files of a merge, with their locks: shared locks on the layers, exclusive locks on the children of CHILD, and no
/// lock on the ancestor.
pub(super) struct MergePlan {
    /// CHILD and the images between CHILD and the ancestor, youngest first.
    pub(super) layers: LayerStack,
    /// The entry of each layer in the merge record.
    pub(super) merged_layers: Vec<MergedLayer>,
    /// The folder of each layer.
    pub(super) layer_folders: Vec<Folder>,
    /// The image that receives the data, open for reading and not locked.
    pub(super) ancestor: Image,
    /// The children of CHILD, locked.
    pub(super) children: Vec<(FileId, File)>,
    /// Folders that were searched for children.
    pub(super) child_folders: Vec<Folder>,
}

/// Opens the chain of `child`, selects the files of the merge into `into` (by default the parent of `child`), and
/// checks that the merge is allowed. Locks the merged layers against writers, and the children of CHILD exclusively.
/// Does not lock the ancestor: `run.rs` locks the ancestor before the copy, and checks the ancestor again.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file, or changed the chain meanwhile
/// - `Refused` if `child` is a root, if `into` is no ancestor, if the disk of another child would change, if the sizes
///   do not allow the merge, if an unfinished merge forbids the change, if a live journal has writes that a file lacks,
///   or (without `changed_parent`) if a parent has a later modification time than its child records
/// - `Invalid` if a merged layer was truncated inside a block
/// - `Unsupported` if the path of the ancestor cannot be recorded in a child of CHILD
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain or a child of CHILD
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
    let (layers, ancestor) = (&chain.images()[..depth], &chain.images()[depth]);
    // The chain was opened without locks, so each layer is locked and then opened again.
    let mut images = Vec::with_capacity(depth);
    for image in layers {
        let file = image.file().clone();
        file.lock(Lock::Shared)?;
        let image = Image::open(file)?;
        check_not_truncated(&image)?;
        images.push(image);
    }
    let parents = images.iter().map(|image| image.header().map(|header| header.parent_uuid));
    if !parents.eq(chain.images()[1..=depth].iter().map(|parent| Some(parent.uuid()))) {
        return Err(Error::new(ErrorKind::Busy, "its chain changed while it was being opened").at_path(child));
    }
    for image in images.iter().chain([ancestor]) {
        refuse_if_live(env, &policy.runtime, image)?;
    }
    // An image of another unfinished merge must not change.
    let own = Some(images[0].uuid());
    for image in &images {
        refuse_change(env, image, ImageChange::Link, &policy.allowed, own)?;
    }
    refuse_change(env, ancestor, ImageChange::Contents, &policy.allowed, own)?;
    if !changed_parent {
        refuse_changed_parent(&chain, depth)?;
    }
    let own = images.iter().chain([ancestor]).map(|image| image.file().folder().absolute());
    let child_folders = folder_scan::folders_to_scan(env, own, &policy.allowed)?;
    let children = lock_children(env, &images, ancestor, &child_folders, policy)?;
    check_sizes(&images[0], ancestor, children.is_empty())?;
    let merged_layers = images.iter().map(|image| merged_layer(env, image, &folder)).collect::<Result<_>>()?;
    let layer_folders = images.iter().map(|image| image.file().folder()).collect();
    let ancestor = Image::open(ancestor.file().folder().open(ancestor.file().name(), Access::Read)?)?;
    Ok(MergePlan { layers: LayerStack::new(images), merged_layers, layer_folders, ancestor, children, child_folders })
}

/// Refuses the merge if the parent of one of the first `depth` images has a later modification time than the image
/// records.
fn refuse_changed_parent(chain: &Chain, depth: usize) -> Result<()> {
    let layers = &chain.images()[..depth];
    let outdated = chain.outdated().find(|(child, _)| layers.iter().any(|image| image.uuid() == child.uuid()));
    let Some((child, parent)) = outdated else { return Ok(()) };
    let what = format!(
        "it was written to after the modification time that its child {} records, so the child's disk may be damaged; \
         if the child's disk is right, run the same command with --changed-parent",
        child.file().path().display()
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()))
}

/// Returns the depth of the ancestor in the chain, which is the number of layers to merge.
fn ancestor_depth(env: &dyn Env, chain: &Chain, into: Option<&Path>) -> Result<usize> {
    let refuse = |what: &str, path: &Path| Err(Error::new(ErrorKind::Refused, what).at_path(path));
    let child = chain.youngest().file().path();
    if chain.images().len() == 1 {
        return refuse("the image has no parent to merge it into", child);
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

/// Refuses a file that was truncated inside a block, because the lost sectors would be merged as zeros.
fn check_not_truncated(image: &Image) -> Result<()> {
    if image.used_end() > image.data_end() {
        let what = "a block ends after the end of the file; run `diffdisk check --repair` before the merge";
        return Err(Error::new(ErrorKind::Invalid, what).at_path(image.file().path()).at_offset(image.data_end()));
    }
    Ok(())
}

/// Checks that the sizes of CHILD and the ancestor allow the merge: they are equal, or CHILD is smaller and has
/// children.
fn check_sizes(child: &Image, ancestor: &Image, youngest: bool) -> Result<()> {
    let (size, received) = (child.size(), ancestor.size());
    // A smaller CHILD hides the end of the ancestor's disk from the children of CHILD. The merge writes zeros there,
    // which has the same effect for these children. Without children, the disk would become larger.
    if size == received || (size < received && !youngest) {
        return Ok(());
    }
    let (path, ancestor) = (child.file().path(), ancestor.file().path());
    let smaller = if size < received { path } else { ancestor };
    let what = format!(
        "its disk has {size} bytes, but that of {} has {received}: run `diffdisk resize {} {}` first",
        ancestor.display(),
        smaller.display(),
        size.max(received)
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(path))
}

/// Locks the children of CHILD. Refuses the merge if another image is a child of the ancestor or of a layer.
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
        // The parent of image n is image n + 1, and the parent of the last image is the ancestor.
        for (above, parent) in images[1..].iter().chain([ancestor]).enumerate() {
            if found.identity.parent == Some(parent.uuid()) && found.id != ids[above] {
                let what = format!("it has another child, {}, whose disk would change", found.path.display());
                return Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()));
            }
        }
    }
    Ok(children)
}

/// Locks a child that the merge will link to the ancestor, and checks that the new link can be written into the child.
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
