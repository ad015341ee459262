//! Where parents may lie, and the way down from the youngest image: an image may name anything, and gets only what lies
//! below an allowed folder and has the recorded UUID (crash-safety 4.2, vhd-format 4.4).
//!
//! A string from an image never chooses a path of the host. It is compared by text with the paths of the folders that are
//! held open, and what is left of it is looked up below one of them, following no symbolic link. A folder on the way that
//! is renamed or replaced meanwhile changes nothing: the descriptor stays.

use std::path::{Path, PathBuf};

use super::case_insensitive::NameBudget;
use super::open_mode::OpenMode;
use super::paths::lexically_normal;
use crate::error::{Error, Result};
use crate::format::Defect;
use crate::image::Image;
use crate::storage::{Env, File, FileId, Folder, RuntimeFolder};

/// Files that a chain may have, unless told otherwise (O17).
pub const MAX_DEPTH: usize = 64;
/// Bytes of block tables that a chain may have (O17).
const MAX_CHAIN_TABLE_BYTES: u64 = 128 << 20;

/// Where parents may be, and how many.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Folders in which parents may lie, besides the folder of the youngest image.
    pub allowed: Vec<PathBuf>,
    /// Files that a chain may have.
    pub max_depth: usize,
    /// Folders in which daemons of this user keep live journals. An image that is in use or was not closed is refused in any
    /// case; this is for what is said then, and for taking the journal of a parent in.
    pub runtime: Vec<RuntimeFolder>,
    /// CHILD of the merge that opens the chain: what its own record forbids to others does not count.
    pub merging: Option<uuid::Uuid>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { allowed: Vec::new(), max_depth: MAX_DEPTH, runtime: Vec::new(), merging: None }
    }
}

/// The way down from the youngest image.
pub(super) struct ParentSearch<'a> {
    env: &'a dyn Env,
    /// Folders under their absolute paths without symbolic links: that of the youngest image, the allowed ones, and
    /// those below them in which parents were found.
    folders: Vec<(PathBuf, Folder)>,
    /// How many folders the operator has allowed.
    allowed: usize,
    budget: NameBudget,
    max_depth: usize,
    /// What was passed on the way.
    visited: Vec<(FileId, uuid::Uuid)>,
    table_bytes: u64,
    /// What the chain is opened for.
    mode: OpenMode,
}

impl<'a> ParentSearch<'a> {
    /// A search for the parents of the youngest image, which is in `youngest`.
    ///
    /// # Errors
    /// `NotFound`, `Io`: of an allowed folder.
    pub(super) fn new(env: &'a dyn Env, youngest: &File, policy: &Policy, how: OpenMode) -> Result<ParentSearch<'a>> {
        let hold = |folder: Folder| folder.absolute().map(|folder| (folder.path().to_path_buf(), folder));
        let mut known = vec![hold(youngest.folder())?];
        for folder in &policy.allowed {
            known.push(hold(env.folder(folder)?)?);
        }
        let (allowed, max_depth, budget) = (policy.allowed.len(), policy.max_depth, NameBudget::default());
        Ok(ParentSearch {
            env,
            folders: known,
            allowed,
            budget,
            max_depth,
            visited: Vec::new(),
            table_bytes: 0,
            mode: how,
        })
    }

    /// Counts an image in.
    ///
    /// # Errors
    /// `Invalid`: a cycle, a UUID for the second time, too deep, too large.
    pub(super) fn visit(&mut self, image: &Image) -> Result<()> {
        let broken = self.check_visit(image)?;
        broken.map_or(Ok(()), |defect| Err(Error::from(defect).at_path(image.file().path())))
    }

    /// As `pass`, with the broken rule as a value.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn check_visit(&mut self, image: &Image) -> Result<Option<Defect>> {
        let id = image.file().stat()?.id;
        if self.visited.iter().any(|(known, _)| *known == id) {
            return Ok(Some(Defect::ChainCycle { file: image.file().path().display().to_string() }));
        }
        if self.visited.iter().any(|(_, known)| *known == image.uuid()) {
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
        if self.folders.iter().all(|(_, known)| !known.is_same(&folder)) {
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

    /// What the chain is opened for.
    pub(super) fn mode(&self) -> OpenMode {
        self.mode
    }

    pub(super) fn has_visited(&self, id: FileId) -> bool {
        self.visited.iter().any(|(known, _)| *known == id)
    }

    /// The folder of an image that was passed.
    pub(super) fn folder_of(&self, image: &Image) -> (&Path, &Folder) {
        let folder = image.file().folder();
        let known = self.folders.iter().find(|(_, known)| known.is_same(&folder));
        known.map(|(path, folder)| (path.as_path(), folder)).expect("it was passed")
    }

    /// The folders that the operator has allowed.
    pub(super) fn allowed(&self) -> impl Iterator<Item = (&Path, &Folder)> {
        self.folders[1..=self.allowed].iter().map(|(path, folder)| (path.as_path(), folder))
    }

    /// The held folder that a path begins with, and the rest of the path; of several the one with the longest path.
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
    fn dots_are_taken_away_by_text() {
        // Which folders they are does not matter here.
        let folder = Host.folder(Path::new("/")).unwrap();
        let known = ["/vms/a", "/golden", "/golden/deep"].map(|path| (PathBuf::from(path), folder.clone())).to_vec();
        let search = ParentSearch {
            env: &Host,
            folders: known,
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
    fn chains_end() {
        let rig = ChainFolder::new();
        rig.dynamic("0", BLOCK, 100);
        for n in 1..=MAX_DEPTH {
            rig.child(&n.to_string(), &(n - 1).to_string(), BLOCK, 100);
        }
        let longest = rig.chain(&(MAX_DEPTH - 1).to_string(), OpenMode::Inspect).unwrap();
        assert_eq!(longest.images().len(), MAX_DEPTH);
        let e = rig.chain(&MAX_DEPTH.to_string(), OpenMode::Inspect).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("more than 64 files"), "{e}");
        std::fs::copy(rig.path("2"), rig.path("copy")).unwrap();
        std::fs::rename(rig.path("copy"), rig.path("1")).unwrap();
        let e = rig.chain("2", OpenMode::Write).unwrap_err();
        // The copy is not the parent: its UUID is that of the child.
        assert!(e.line().contains("UUID"), "{e}");
        std::fs::remove_file(rig.path("1")).unwrap();
        std::fs::hard_link(rig.path("2"), rig.path("1")).unwrap();
        assert!(rig.chain("2", OpenMode::Write).unwrap_err().kind() == ErrorKind::Invalid);
        assert!(rig.folder().is_dir());
    }
}
