//! The folders in which parents may lie, and the state of a search from the youngest image down. An image may record
//! any path, but only a file below an allowed folder with the recorded UUID is opened (format 4.4).
//!
//! A path from an image is never opened as such. It is compared, as text, with the paths of folders that are held open,
//! and the rest of the path is looked up below one of those folders without following symbolic links. The folders are
//! descriptors, so renaming or replacing a folder during the search changes nothing.

use std::path::{Path, PathBuf};

use super::case_insensitive::NameBudget;
use super::open_mode::OpenMode;
use super::paths::lexically_normal;
use crate::error::{Error, Result};
use crate::format::Defect;
use crate::image::Image;
use crate::storage::{Env, File, FileId, Folder, RuntimeFolder};

/// Default maximum number of files in a chain (O17).
pub const MAX_DEPTH: usize = 64;
/// Maximum total size of the block tables of a chain, in bytes (O17).
const MAX_CHAIN_TABLE_BYTES: u64 = 128 << 20;

/// The limits of a search for parents.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Folders in which parents may lie, in addition to the folder of the youngest image.
    pub allowed: Vec<PathBuf>,
    /// Maximum number of files in a chain.
    pub max_depth: usize,
    /// Folders in which daemons of this user keep live journals. The journals of images are searched in these folders:
    /// to replay or discard a journal, and to state where the journal is if an image is refused.
    pub runtime: Vec<RuntimeFolder>,
    /// UUID of the image CHILD of the merge that opens the chain. The record of a merge does not restrict that merge.
    pub merging: Option<uuid::Uuid>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { allowed: Vec::new(), max_depth: MAX_DEPTH, runtime: Vec::new(), merging: None }
    }
}

/// The state of a search from the youngest image down.
pub(super) struct ParentSearch<'a> {
    env: &'a dyn Env,
    /// Folders that are held open, with their absolute paths without symbolic links: the folder of the youngest image,
    /// the allowed folders, and those below them in which parents were found.
    folders: Vec<(PathBuf, Folder)>,
    /// Number of folders that the operator has allowed.
    allowed: usize,
    budget: NameBudget,
    max_depth: usize,
    /// The files of the chain so far, with the UUIDs of their images.
    visited: Vec<(FileId, uuid::Uuid)>,
    table_bytes: u64,
    /// The mode in which the chain is opened.
    mode: OpenMode,
}

impl<'a> ParentSearch<'a> {
    /// Begins a search for the parents of the image in the file `youngest`.
    ///
    /// # Errors
    /// `NotFound`, `Io` if a folder cannot be opened.
    pub(super) fn new(env: &'a dyn Env, youngest: &File, policy: &Policy, mode: OpenMode) -> Result<ParentSearch<'a>> {
        let hold = |folder: Folder| folder.absolute().map(|folder| (folder.path().to_path_buf(), folder));
        let mut folders = vec![hold(youngest.folder())?];
        for folder in &policy.allowed {
            folders.push(hold(env.folder(folder)?)?);
        }
        let (allowed, max_depth, budget) = (policy.allowed.len(), policy.max_depth, NameBudget::default());
        Ok(ParentSearch { env, folders, allowed, budget, max_depth, visited: Vec::new(), table_bytes: 0, mode })
    }

    /// Adds an image to the chain.
    ///
    /// # Errors
    /// - `Invalid` for a cycle, or if the UUID occurs twice
    /// - `Refused` for too many files or too large block tables
    /// - `Io`
    pub(super) fn visit(&mut self, image: &Image) -> Result<()> {
        let broken = self.check_visit(image)?;
        broken.map_or(Ok(()), |defect| Err(Error::from(defect).at_path(image.file().path())))
    }

    /// Adds an image as `visit` does, but returns a broken rule as a value.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn check_visit(&mut self, image: &Image) -> Result<Option<Defect>> {
        let id = image.file().stat()?.id;
        if self.visited.iter().any(|(file, _)| *file == id) {
            return Ok(Some(Defect::ChainCycle { file: image.file().path().display().to_string() }));
        }
        if self.visited.iter().any(|(_, uuid)| *uuid == image.uuid()) {
            return Ok(Some(Defect::ChainUuidTwice { uuid: image.uuid() }));
        }
        if self.visited.len() >= self.max_depth {
            return Ok(Some(Defect::ChainTooDeep { limit: self.max_depth }));
        }
        self.table_bytes += image.bat().map_or(0, |t| u64::from(t.len()) * 4);
        if self.table_bytes > MAX_CHAIN_TABLE_BYTES {
            return Ok(Some(Defect::ChainTablesTooLarge { bytes: self.table_bytes, limit: MAX_CHAIN_TABLE_BYTES }));
        }
        self.visited.push((id, image.uuid()));
        let folder = image.file().folder();
        if self.folders.iter().all(|(_, held)| !held.is_same(&folder)) {
            self.folders.push((folder.path().to_path_buf(), folder));
        }
        Ok(None)
    }

    pub(super) fn env(&self) -> &dyn Env {
        self.env
    }

    pub(super) fn budget(&self) -> &NameBudget {
        &self.budget
    }

    /// The mode in which the chain is opened.
    pub(super) fn mode(&self) -> OpenMode {
        self.mode
    }

    pub(super) fn has_visited(&self, id: FileId) -> bool {
        self.visited.iter().any(|(file, _)| *file == id)
    }

    /// The folder of an image that was visited.
    pub(super) fn folder_of(&self, image: &Image) -> (&Path, &Folder) {
        let folder = image.file().folder();
        let held = self.folders.iter().find(|(_, held)| held.is_same(&folder));
        held.map(|(path, folder)| (path.as_path(), folder)).expect("the image was visited")
    }

    /// The folders that the operator has allowed.
    pub(super) fn allowed(&self) -> impl Iterator<Item = (&Path, &Folder)> {
        self.folders[1..=self.allowed].iter().map(|(path, folder)| (path.as_path(), folder))
    }

    /// The open folder with which a path begins, and the rest of the path. If several folders match, returns the one
    /// with the longest path.
    pub(super) fn held_folder_above(&self, path: &Path) -> Option<(&Folder, PathBuf)> {
        let path = lexically_normal(path);
        let mut best: Option<(&Folder, &Path)> = None;
        for (root, folder) in &self.folders {
            if let Ok(below) = path.strip_prefix(root)
                && !below.as_os_str().is_empty()
                && best.is_none_or(|(_, other)| below.components().count() < other.components().count())
            {
                best = Some((folder, below));
            }
        }
        best.map(|(folder, below)| (folder, below.to_path_buf()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::ChainFolder;
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::host::Host;

    const BLOCK: u32 = 2 << 20;

    #[test]
    fn dots_are_removed_lexically() {
        // The descriptors do not matter here, only the paths.
        let folder = Host.folder(Path::new("/")).unwrap();
        let folders = ["/vms/a", "/golden", "/golden/deep"].map(|path| (PathBuf::from(path), folder.clone())).to_vec();
        let search = ParentSearch {
            env: &Host,
            folders,
            allowed: 2,
            budget: NameBudget::default(),
            max_depth: 9,
            visited: Vec::new(),
            table_bytes: 0,
            mode: OpenMode::Inspect,
        };
        let below = |path: &str| search.held_folder_above(Path::new(path)).map(|(_, rest)| rest.display().to_string());
        for (path, found) in [
            ("/vms/a/p.vhd", Some("p.vhd")),
            ("/vms/a/./x/../p.vhd", Some("p.vhd")),
            ("/vms/b/../a/p.vhd", Some("p.vhd")),
            ("/vms/a/../../golden/r.vhd", Some("r.vhd")),
            ("/golden/deep/x/r.vhd", Some("x/r.vhd")),
            ("/golden/deep", Some("deep")),
            ("/vms/a/../b/p.vhd", None),
            ("/vms/ab/p.vhd", None),
            ("/vms/a/../../etc/passwd", None),
            ("/../../../golden/r.vhd", Some("r.vhd")),
            ("/vms/a", None),
            ("/vms/a/x/..", None),
        ] {
            assert_eq!(below(path).as_deref(), found, "{path}");
        }
    }

    #[test]
    fn depth_and_cycles_are_limited() {
        let chains = ChainFolder::new();
        chains.dynamic("0", BLOCK, 100);
        for n in 1..=MAX_DEPTH {
            chains.child(&n.to_string(), &(n - 1).to_string(), BLOCK, 100);
        }
        let longest = chains.chain(&(MAX_DEPTH - 1).to_string(), OpenMode::Inspect).unwrap();
        assert_eq!(longest.images().len(), MAX_DEPTH);
        let e = chains.chain(&MAX_DEPTH.to_string(), OpenMode::Inspect).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("more than 64 files"), "{e}");
        std::fs::copy(chains.path("2"), chains.path("copy")).unwrap();
        std::fs::rename(chains.path("copy"), chains.path("1")).unwrap();
        let e = chains.chain("2", OpenMode::Write).unwrap_err();
        // The copy is not the parent: it has the UUID of the child.
        assert!(e.line().contains("UUID"), "{e}");
        std::fs::remove_file(chains.path("1")).unwrap();
        std::fs::hard_link(chains.path("2"), chains.path("1")).unwrap();
        assert!(chains.chain("2", OpenMode::Write).unwrap_err().kind() == ErrorKind::Invalid);
        assert!(chains.folder().is_dir());
    }
}
