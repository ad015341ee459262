//! Where parents may lie, and the way down from the youngest image: an image may name anything, and gets only what lies
//! below an allowed folder and has the recorded UUID (crash-safety 4.2, vhd-format 4.4).
//!
//! A string from an image never chooses a path of the host. It is compared by text with the paths of the folders that are
//! held open, and what is left of it is looked up below one of them, following no symbolic link. A folder on the way that
//! is renamed or replaced meanwhile changes nothing: the descriptor stays.

use std::path::{Path, PathBuf};

use super::any_case::Budget;
use super::open::Use;
use super::seek::plain;
use crate::error::{Error, Result};
use crate::format::Defect;
use crate::image::Image;
use crate::storage::{Env, File, FileId, Folder, RuntimeFolder};

/// Files that a chain may have, unless told otherwise (O17).
pub const MAX_DEPTH: usize = 64;
/// Bytes of block tables that a chain may have (O17).
const MAX_TABLES: u64 = 128 << 20;

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
pub(super) struct Search<'a> {
    env: &'a dyn Env,
    /// Folders under their absolute paths without symbolic links: that of the youngest image, the allowed ones, and
    /// those below them in which parents were found.
    known: Vec<(PathBuf, Folder)>,
    /// How many folders the operator has allowed.
    allowed: usize,
    budget: Budget,
    max_depth: usize,
    /// What was passed on the way.
    passed: Vec<(FileId, uuid::Uuid)>,
    tables: u64,
    /// What the chain is opened for.
    how: Use,
}

impl<'a> Search<'a> {
    /// A search for the parents of the youngest image, which is in `youngest`.
    ///
    /// # Errors
    /// `NotFound`, `Io`: of an allowed folder.
    pub(super) fn new(env: &'a dyn Env, youngest: &File, policy: &Policy, how: Use) -> Result<Search<'a>> {
        let hold = |folder: Folder| folder.absolute().map(|folder| (folder.path().to_path_buf(), folder));
        let mut known = vec![hold(youngest.folder())?];
        for folder in &policy.allowed {
            known.push(hold(env.folder(folder)?)?);
        }
        let (allowed, max_depth, budget) = (policy.allowed.len(), policy.max_depth, Budget::default());
        Ok(Search { env, known, allowed, budget, max_depth, passed: Vec::new(), tables: 0, how })
    }

    /// Counts an image in.
    ///
    /// # Errors
    /// `Invalid`: a cycle, a UUID for the second time, too deep, too large.
    pub(super) fn pass(&mut self, image: &Image) -> Result<()> {
        let broken = self.broken_by(image)?;
        broken.map_or(Ok(()), |defect| Err(Error::from(defect).at_path(image.file().path())))
    }

    /// As `pass`, with the broken rule as a value.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn broken_by(&mut self, image: &Image) -> Result<Option<Defect>> {
        let id = image.file().stat()?.id;
        if self.passed.iter().any(|(known, _)| *known == id) {
            return Ok(Some(Defect::ChainCycle { file: image.file().path().display().to_string() }));
        }
        if self.passed.iter().any(|(_, known)| *known == image.uuid()) {
            return Ok(Some(Defect::ChainUuidTwice { uuid: image.uuid() }));
        }
        if self.passed.len() >= self.max_depth {
            return Ok(Some(Defect::ChainTooDeep { limit: self.max_depth }));
        }
        self.tables += image.bat().map_or(0, |t| u64::from(t.len()) * 4);
        if self.tables > MAX_TABLES {
            return Ok(Some(Defect::ChainTablesTooLarge { bytes: self.tables, limit: MAX_TABLES }));
        }
        self.passed.push((id, image.uuid()));
        let folder = image.file().folder();
        if self.known.iter().all(|(_, known)| !known.is_same(&folder)) {
            self.known.push((folder.path().to_path_buf(), folder));
        }
        Ok(None)
    }

    pub(super) fn env(&self) -> &dyn Env {
        self.env
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// What the chain is opened for.
    pub(super) fn how(&self) -> Use {
        self.how
    }

    pub(super) fn has_passed(&self, id: FileId) -> bool {
        self.passed.iter().any(|(known, _)| *known == id)
    }

    /// The folder of an image that was passed.
    pub(super) fn place_of(&self, image: &Image) -> (&Path, &Folder) {
        let folder = image.file().folder();
        let known = self.known.iter().find(|(_, known)| known.is_same(&folder));
        known.map(|(path, folder)| (path.as_path(), folder)).expect("it was passed")
    }

    /// The folders that the operator has allowed.
    pub(super) fn allowed(&self) -> impl Iterator<Item = (&Path, &Folder)> {
        self.known[1..=self.allowed].iter().map(|(path, folder)| (path.as_path(), folder))
    }

    /// The held folder that a path begins with, and the rest of the path; of several the one with the longest path.
    pub(super) fn known_above(&self, path: &Path) -> Option<(&Folder, PathBuf)> {
        let path = plain(path);
        let mut best: Option<(&Folder, &Path)> = None;
        for (root, folder) in &self.known {
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
    use super::super::rig::Rig;
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::host::Host;

    const BLOCK: u32 = 2 << 20;

    #[test]
    fn dots_are_taken_away_by_text() {
        // Which folders they are does not matter here.
        let folder = Host.folder(Path::new("/")).unwrap();
        let known = ["/vms/a", "/golden", "/golden/deep"].map(|path| (PathBuf::from(path), folder.clone())).to_vec();
        let search = Search {
            env: &Host,
            known,
            allowed: 2,
            budget: Budget::default(),
            max_depth: 9,
            passed: Vec::new(),
            tables: 0,
            how: Use::Look,
        };
        let below = |path: &str| search.known_above(Path::new(path)).map(|(_, rest)| rest.display().to_string());
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
        let rig = Rig::new();
        rig.dynamic("0", BLOCK, 100);
        for n in 1..=MAX_DEPTH {
            rig.child(&n.to_string(), &(n - 1).to_string(), BLOCK, 100);
        }
        let longest = rig.chain(&(MAX_DEPTH - 1).to_string(), Use::Look).unwrap();
        assert_eq!(longest.images().len(), MAX_DEPTH);
        let e = rig.chain(&MAX_DEPTH.to_string(), Use::Look).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("more than 64 files"), "{e}");
        std::fs::copy(rig.path("2"), rig.path("copy")).unwrap();
        std::fs::rename(rig.path("copy"), rig.path("1")).unwrap();
        let e = rig.chain("2", Use::Write).unwrap_err();
        // The copy is not the parent: its UUID is that of the child.
        assert!(e.line().contains("UUID"), "{e}");
        std::fs::remove_file(rig.path("1")).unwrap();
        std::fs::hard_link(rig.path("2"), rig.path("1")).unwrap();
        assert!(rig.chain("2", Use::Write).unwrap_err().kind() == ErrorKind::Invalid);
        assert!(rig.folder().is_dir());
    }
}
