//! What a child records of its parent, and the chain on which it is going to stand.

use std::path::Path;

use crate::chain::{Chain, OpenMode, Policy, relative_path};
use crate::error::{Error, Result};
use crate::format::{Defect, Platform};
use crate::image::{Image, ParentLink, folder_of};
use crate::storage::{Env, FileId};

/// Which paths to the parent a child records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Locators {
    /// From the child's folder: the two may move together.
    Relative,
    /// From the root of the file system: the child may move alone.
    Absolute,
    /// Both, the relative one first.
    Both,
}

/// What a child in `folder` records of its parent, by these locators.
///
/// # Errors
/// `Io`: the parent or the folder is not where it was opened.
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

/// Returns what `child` records when `parent` becomes its parent: the kinds of paths that it records now, or `fallback` if it
/// records no Windows path.
///
/// # Errors
/// `Io`.
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

/// The chain that the image at `child` is to stand on, locked against writers. Its files may lie where those of the
/// child may.
///
/// # Errors
/// Whatever is wrong with a file of it; `Refused` where the child's chain would be too deep.
pub(super) fn open_new_parent(env: &dyn Env, child: &Path, parent: &Path, policy: &Policy) -> Result<Chain> {
    let chain = Chain::open(env, parent, &allowing_folder(policy, folder_of(child)), OpenMode::Read)?;
    if chain.images().len() >= policy.max_depth {
        return Err(Error::from(Defect::ChainTooDeep { limit: policy.max_depth }).at_path(child));
    }
    Ok(chain)
}

/// The policy, with one more folder in which parents may lie.
pub(super) fn allowing_folder(policy: &Policy, folder: &Path) -> Policy {
    let mut policy = policy.clone();
    policy.allowed.push(folder.to_path_buf());
    policy
}

/// The files of a chain, youngest first.
pub(super) fn file_ids(chain: &Chain) -> Result<Vec<FileId>> {
    chain.images().iter().map(|image| Ok(image.file().stat()?.id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_between_folders() {
        let way = |folder, file| relative_path(Path::new(folder), Path::new(file)).display().to_string();
        assert_eq!(way("/a/b", "/a/b/p.vhd"), "p.vhd");
        assert_eq!(way("/a/b", "/a/c/p.vhd"), "../c/p.vhd");
        assert_eq!(way("/a/b", "/p.vhd"), "../../p.vhd");
        assert_eq!(way("/", "/a/b"), "a/b");
        assert_eq!(way("/a/bc", "/a/b/p"), "../b/p");
    }
}
