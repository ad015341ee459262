//! `create`: creates a root, or a child of an image.

use std::path::{Path, PathBuf};

use uuid::Uuid;

pub use super::parent_link::Locators;
use super::parent_link::parent_link;
use crate::chain::{Chain, ImageChange, OpenMode, Policy, record_child, refuse_change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Defect;
use crate::image::{self, ImageKind, ImageSpec, folder_of};
use crate::storage::Env;
use crate::units::BlockSize;

/// Parameters of a new root.
#[derive(Clone, Copy, Debug)]
pub struct RootSpec {
    /// Whether the image is fixed. Otherwise it is dynamic.
    pub fixed: bool,
    /// Virtual size in bytes.
    pub size: u64,
    /// Block size. Ignored for a fixed image.
    pub block_size: BlockSize,
    /// Virtual size in bytes to which the disk can grow without a new block table.
    pub reserve: u64,
    /// Whether space for every block is reserved in the file system.
    pub preallocate: bool,
}

/// Parameters of a new child.
#[derive(Clone, Debug)]
pub struct ChildSpec {
    /// Path of the parent.
    pub parent: PathBuf,
    /// Virtual size in bytes. By default the size of the parent.
    pub size: Option<u64>,
    /// Block size. By default the block size of the parent, because other programs read chains with mixed block sizes
    /// wrongly or not at all (format 3.1). The default for a child of a fixed image is [`BlockSize::DEFAULT`].
    pub block_size: Option<BlockSize>,
    /// Virtual size in bytes to which the disk can grow without a new block table.
    pub reserve: u64,
    /// Kinds of paths to the parent that the child records.
    pub locators: Locators,
    /// Whether space for every block is reserved in the file system.
    pub preallocate: bool,
}

/// Properties of a new child.
#[derive(Clone, Debug)]
pub struct CreatedChild {
    /// UUID of the child.
    pub uuid: Uuid,
    /// Virtual size in bytes.
    pub size: u64,
    /// Absolute path of the parent.
    pub parent: PathBuf,
    /// Folders of parents that are neither the folder of the child nor an allowed folder, nor below one of these. The
    /// child can be opened only with these folders allowed.
    pub folders_not_allowed: Vec<PathBuf>,
}

/// Creates a root at `path`, and returns its UUID.
///
/// # Errors
/// - `Refused` if `path` exists
/// - `NotFound` if the folder of `path` does not exist
/// - `Invalid` if the format does not allow one of the sizes
/// - `Unsupported` if space for every block cannot be reserved
/// - `Io`, `NoSpace`
pub fn root(env: &dyn Env, path: &Path, root: &RootSpec) -> Result<Uuid> {
    let kind = if root.fixed { ImageKind::Fixed } else { ImageKind::Dynamic };
    let spec = ImageSpec { kind, size: root.size, block_size: root.block_size, reserve: root.reserve };
    create_function(root.preallocate)(env, path, &spec)
}

/// Creates a child at `path`. The parent's chain is opened according to `policy`, and stays locked against writers
/// until the child exists.
///
/// # Errors
/// - `Refused` if `path` exists, if the chain would be too deep, if the child would be smaller than its parent, or if
///   an unfinished merge forbids a child of the parent
/// - `Busy` if another process holds a conflicting lock on an image of the parent's chain
/// - `Invalid` if the format does not allow one of the sizes
/// - `Unsupported` if the path of the parent cannot be recorded, or if space for every block cannot be reserved
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
/// - `NotFound` if the folder of `path` does not exist
/// - `Io`, `NoSpace`
pub fn child(env: &dyn Env, path: &Path, child: &ChildSpec, policy: &Policy) -> Result<CreatedChild> {
    let chain = Chain::open(env, &child.parent, policy, OpenMode::Read)?;
    if chain.images().len() >= policy.max_depth {
        return Err(Error::from(Defect::ChainTooDeep { limit: policy.max_depth }).at_path(path));
    }
    let parent = chain.youngest();
    refuse_change(env, parent, ImageChange::Child, &policy.allowed, None)?;
    let size = child.size.unwrap_or(parent.size());
    if size < parent.size() {
        let what =
            format!("the size of the child, {size} bytes, is less than the {} bytes of its parent", parent.size());
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    let block_size = child.block_size.or(parent.block_size()).unwrap_or(BlockSize::DEFAULT);
    let link = parent_link(env, folder_of(path), parent, child.locators)?;
    let absolute = env.canonical(&child.parent)?;
    let outside = folders_not_allowed(env, folder_of(path), policy, &chain)?;
    let spec = ImageSpec { kind: ImageKind::Differencing(link), size, block_size, reserve: child.reserve };
    // The parent records the child before the child exists, because a recorded child that does not exist is ignored.
    record_child(env, parent, path);
    let made = create_function(child.preallocate)(env, path, &spec);
    drop(chain); // unlocks the parents
    made.map(|uuid| CreatedChild { uuid, size, parent: absolute, folders_not_allowed: outside })
}

fn create_function(preallocate: bool) -> fn(&dyn Env, &Path, &ImageSpec) -> Result<Uuid> {
    if preallocate { image::create_preallocated } else { image::create }
}

/// Returns the folders of a chain's files that are neither `folder` nor an allowed folder, nor below one of these. Each
/// folder is returned once.
fn folders_not_allowed(env: &dyn Env, folder: &Path, policy: &Policy, chain: &Chain) -> Result<Vec<PathBuf>> {
    let allowed = std::iter::once(folder).chain(policy.allowed.iter().map(PathBuf::as_path));
    let allowed = allowed.map(|folder| env.canonical(folder)).collect::<Result<Vec<_>>>()?;
    let mut outside: Vec<PathBuf> = Vec::new();
    for image in chain.images() {
        let real = env.canonical(image.file().path())?;
        let above = folder_of(&real);
        if !allowed.iter().any(|folder| above.starts_with(folder)) && outside.iter().all(|known| known != above) {
            outside.push(above.to_path_buf());
        }
    }
    Ok(outside)
}
