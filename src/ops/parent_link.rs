//! The link from a child to its parent: the paths that the child records, and the opening of a new parent.

use std::path::Path;

use crate::chain::{Chain, OpenMode, Policy, relative_path};
use crate::error::{Error, Result};
use crate::format::{Defect, Platform};
use crate::image::{Image, ParentLink, folder_of};
use crate::storage::{Env, FileId};

/// Kinds of paths to the parent that a child records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Locators {
    /// Relative to the child's folder: parent and child may be moved together.
    Relative,
    /// Absolute: the child may be moved alone.
    Absolute,
    /// Both, the relative one first.
    Both,
}

/// Returns the link that a child in `folder` records for `parent`.
///
/// # Errors
/// `NotFound`, `Io` if the path of the parent or of the folder cannot be resolved.
pub(super) fn parent_link(env: &dyn Env, folder: &Path, parent: &Image, locators: Locators) -> Result<ParentLink> {
    let absolute = env.canonical(parent.file().path())?;
    let name = relative_path(&env.canonical(folder)?, &absolute);
    Ok(ParentLink {
        uuid: parent.uuid(),
        modified: parent.file().stat()?.modified,
        relative: (locators != Locators::Absolute).then(|| name.clone()),
        absolute: (locators != Locators::Relative).then_some(absolute),
        name,
    })
}

/// Returns the link that `child` records when `parent` becomes its parent. The link has the kinds of paths that the
/// child records now, or the kinds `fallback` if the child records no Windows path.
///
/// # Errors
/// `NotFound`, `Io` if the path of `parent` or of the child's folder cannot be resolved.
pub(super) fn replacement_link(env: &dyn Env, child: &Image, parent: &Image, fallback: Locators) -> Result<ParentLink> {
    let entries = child.header().map_or([].as_slice(), |header| header.locators.as_slice());
    let has = |platform| entries.iter().any(|entry| entry.platform() == platform);
    let locators = match (has(Platform::W2ru), has(Platform::W2ku)) {
        (true, true) => Locators::Both,
        (true, false) => Locators::Relative,
        (false, true) => Locators::Absolute,
        (false, false) => fallback,
    };
    parent_link(env, folder_of(child.file().path()), parent, locators)
}

/// Opens the chain of the image at `parent`, the new parent of the image at `child`, and locks the files of this chain
/// against writers. The file at `parent` may lie in any folder. Parents of `parent` are accepted in and below the
/// folder of `parent`, the folder of `child`, and the allowed folders.
///
/// # Errors
/// - `Refused` if the child's chain would be too deep
/// - `Invalid`, `Refused`, `Unsupported`, `Busy`, `NotFound`, `Io` for a file of the chain
pub(super) fn open_new_parent(env: &dyn Env, child: &Path, parent: &Path, policy: &Policy) -> Result<Chain> {
    let chain = Chain::open(env, parent, &allowing_folder(policy, folder_of(child)), OpenMode::Read)?;
    if chain.images().len() >= policy.max_depth {
        return Err(Error::from(Defect::ChainTooDeep { limit: policy.max_depth }).at_path(child));
    }
    Ok(chain)
}

/// Returns the policy with one more allowed folder.
pub(super) fn allowing_folder(policy: &Policy, folder: &Path) -> Policy {
    let mut policy = policy.clone();
    policy.allowed.push(folder.to_path_buf());
    policy
}

/// Returns device and inode of each file of a chain, youngest first.
pub(super) fn file_ids(chain: &Chain) -> Result<Vec<FileId>> {
    chain.images().iter().map(|image| Ok(image.file().stat()?.id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_between_folders() {
        let relative = |folder, file| relative_path(Path::new(folder), Path::new(file)).display().to_string();
        assert_eq!(relative("/a/b", "/a/b/p.vhd"), "p.vhd");
        assert_eq!(relative("/a/b", "/a/c/p.vhd"), "../c/p.vhd");
        assert_eq!(relative("/a/b", "/p.vhd"), "../../p.vhd");
        assert_eq!(relative("/", "/a/b"), "a/b");
        assert_eq!(relative("/a/bc", "/a/b/p"), "../b/p");
    }
}
