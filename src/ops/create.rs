//! `create`: a new root, or a child of an image.

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

/// A root to be made.
#[derive(Clone, Copy, Debug)]
pub struct RootSpec {
    /// All sectors in place, or blocks on demand.
    pub fixed: bool,
    /// Virtual size in bytes.
    pub size: u64,
    /// Size of its blocks; of no meaning for a fixed image.
    pub block_size: BlockSize,
    /// Virtual size in bytes up to which the block table has room to grow.
    pub reserve: u64,
    /// Whether every block gets its room on the host.
    pub preallocate: bool,
}

/// A child to be made.
#[derive(Clone, Debug)]
pub struct ChildSpec {
    /// Path of the parent.
    pub parent: PathBuf,
    /// Virtual size in bytes; that of the parent if not given.
    pub size: Option<u64>,
    /// Size of its blocks; that of the parent if not given: other programs read chains of one block size only, or read
    /// others wrongly (vhd-format 6). A child of a fixed image has the size that all expect.
    pub block_size: Option<BlockSize>,
    /// Virtual size in bytes up to which the block table has room to grow.
    pub reserve: u64,
    /// What it records of where the parent is.
    pub locators: Locators,
    /// Whether every block gets its room on the host.
    pub preallocate: bool,
}

/// A child that was made.
#[derive(Clone, Debug)]
pub struct CreatedChild {
    /// Its identity.
    pub uuid: Uuid,
    /// Its virtual size in bytes.
    pub size: u64,
    /// Its parent's absolute path.
    pub parent: PathBuf,
    /// Folders of its parents that lie neither below its own nor below an allowed one: it cannot be opened before they are
    /// allowed.
    pub folders_not_allowed: Vec<PathBuf>,
}

/// Makes a root at `path`, which must not exist.
///
/// # Errors
/// `Refused` where the name exists; `Invalid` for sizes that the format does not have; `Io`, `NoSpace`.
pub fn root(env: &dyn Env, path: &Path, root: &RootSpec) -> Result<Uuid> {
    let kind = if root.fixed { ImageKind::Fixed } else { ImageKind::Dynamic };
    let spec = ImageSpec { kind, size: root.size, block_size: root.block_size, reserve: root.reserve };
    create_function(root.preallocate)(env, path, &spec)
}

/// Makes a child at `path`, which must not exist. The parent's whole chain is opened first, by `policy`, and stays
/// locked against writing until the child is there.
///
/// # Errors
/// As for [`root`]; whatever is wrong with the parent's chain; `Refused` where the chain would be too deep or the child
/// smaller than its parent; `Busy` where somebody writes to the parent.
pub fn child(env: &dyn Env, path: &Path, child: &ChildSpec, policy: &Policy) -> Result<CreatedChild> {
    let chain = Chain::open(env, &child.parent, policy, OpenMode::Read)?;
    if chain.images().len() >= policy.max_depth {
        return Err(Error::from(Defect::ChainTooDeep { limit: policy.max_depth }).at_path(path));
    }
    let parent = chain.youngest();
    refuse_change(env, parent, ImageChange::Child, &policy.allowed, None)?;
    let size = child.size.unwrap_or(parent.size());
    if size < parent.size() {
        let what = format!("{size} bytes are less than the {} bytes of its parent", parent.size());
        return Err(Error::new(ErrorKind::Refused, what).at_path(path));
    }
    let block_size = child.block_size.or(parent.block_size()).unwrap_or(BlockSize::DEFAULT);
    let link = parent_link(env, folder_of(path), parent, child.locators)?;
    let absolute = env.canonical(&child.parent)?;
    let outside = folders_not_allowed(env, folder_of(path), policy, &chain)?;
    let spec = ImageSpec { kind: ImageKind::Differencing(link), size, block_size, reserve: child.reserve };
    // Before the child is there: a mark that leads to no child is dropped when it is looked at.
    record_child(env, parent, path);
    let made = create_function(child.preallocate)(env, path, &spec);
    drop(chain); // and with it the locks on the parents
    made.map(|uuid| CreatedChild { uuid, size, parent: absolute, folders_not_allowed: outside })
}

fn create_function(preallocate: bool) -> fn(&dyn Env, &Path, &ImageSpec) -> Result<Uuid> {
    if preallocate { image::create_preallocated } else { image::create }
}

/// The folders of a chain that lie neither below `folder` nor below an allowed one, each once.
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
