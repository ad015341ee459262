//! Which file is the parent: an image may name anything, and gets only what lies in an allowed folder and has the
//! recorded UUID (crash-safety 4.2, vhd-format 4.4).
//!
//! A string from an image never chooses a path of the host: it is looked up *below* an allowed folder in one system
//! call, which follows no symbolic link and does not leave the folder. An absolute string is refused unless it begins
//! with an allowed folder.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Defect, ParentPath};
use crate::image::{Image, folder_of};
use crate::storage::{Env, File, FileId, Lock, Runtime};

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
    /// Where daemons of this user keep live journals. An image that is in use or was not closed is refused in any case; this
    /// is for what is said then, and for taking the journal of a parent in.
    pub runtime: Option<Runtime>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { allowed: Vec::new(), max_depth: MAX_DEPTH, runtime: None }
    }
}

/// What a search for a parent came to.
pub(super) enum Sought {
    /// It is here.
    Parent(Box<Image>),
    /// A file is where it should be, but is no sound image.
    Broken(File, Error),
    /// The image at this path is where it should be, but is another one.
    Wrong(Defect, PathBuf),
    /// No recorded path leads to a file.
    Nowhere(Defect),
}

/// The way down from the youngest image.
pub(super) struct Search<'a> {
    env: &'a dyn Env,
    /// Absolute folders without symbolic links, that of the youngest image first.
    roots: Vec<PathBuf>,
    max_depth: usize,
    /// What was passed on the way.
    passed: Vec<(FileId, uuid::Uuid)>,
    tables: u64,
    /// Whether parents are locked against writers.
    lock: bool,
}

impl<'a> Search<'a> {
    /// A search for the parents of the image at `youngest`.
    pub(super) fn new(env: &'a dyn Env, youngest: &Path, policy: &Policy, lock: bool) -> Result<Search<'a>> {
        let mut roots = vec![env.canonical(folder_of(youngest))?];
        for folder in &policy.allowed {
            roots.push(env.canonical(folder)?);
        }
        Ok(Search { env, roots, max_depth: policy.max_depth, passed: Vec::new(), tables: 0, lock })
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
        Ok(None)
    }

    /// Finds and opens the parent of a differencing image. A candidate with another UUID is not the parent: the search
    /// goes on.
    ///
    /// # Errors
    /// `NotFound` naming all that was tried and why not; `Refused` for raw parents.
    pub(super) fn parent_of(&self, child: &Image) -> Result<Image> {
        match self.seek(child)? {
            Sought::Parent(parent) => Ok(*parent),
            Sought::Broken(_, e) => Err(e),
            Sought::Wrong(defect, path) => Err(Error::from(defect).at_path(path)),
            Sought::Nowhere(defect) => Err(Error::from(defect).at_path(child.file().path())),
        }
    }

    /// As `parent_of`, with what stands in the way as a value.
    ///
    /// # Errors
    /// `Io`: of the child, or of a parent that is there.
    pub(super) fn seek(&self, child: &Image) -> Result<Sought> {
        let header = child.header().expect("differencing images have a header");
        if header.parent_is_raw() {
            return Ok(Sought::Nowhere(Defect::ParentRaw));
        }
        let candidates = child.parent_candidates()?;
        if candidates.is_empty() {
            return Ok(Sought::Nowhere(Defect::ParentUnnamed));
        }
        let folder = self.env.canonical(folder_of(child.file().path()))?;
        let (mut tried, mut worst) = (Vec::new(), None);
        for candidate in candidates {
            let (reason, found) = match self.open_candidate(&folder, &candidate.path) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Refused) => (reason(&e), None),
                Err(e) => (reason(&e), Some(Err(e))),
                Ok(file) => match Image::open(file.clone()) {
                    Ok(image) if image.uuid() == header.parent_uuid => return Ok(Sought::Parent(Box::new(image))),
                    Ok(image) => {
                        let defect = Defect::ParentUuid { recorded: header.parent_uuid, found: image.uuid() };
                        (defect.to_string(), Some(Ok(Sought::Wrong(defect, file.path().to_path_buf()))))
                    }
                    Err(e) => (reason(&e), Some(Ok(Sought::Broken(file, e)))),
                },
            };
            tried.push(format!("{} ({reason})", candidate.path.as_path().display()));
            // A parent that is there but cannot be opened says more than names that lead nowhere.
            worst = worst.or(found);
        }
        worst.unwrap_or(Ok(Sought::Nowhere(Defect::ParentMissing { tried })))
    }

    fn open_candidate(&self, folder: &Path, path: &ParentPath) -> Result<File> {
        let whole = match path {
            ParentPath::Relative(path) => folder.join(path),
            ParentPath::Absolute(path) => path.clone(),
        };
        let Some((root, below)) = self.below_root(&whole) else {
            return Err(Error::new(ErrorKind::Refused, "outside of the allowed folders").at_path(whole));
        };
        let file = self.env.open_beneath(root, &below)?;
        // A file that was passed on the way is locked already; that it comes again is found when it is passed.
        let id = file.stat()?.id;
        if self.lock && self.passed.iter().all(|(known, _)| *known != id) {
            file.lock(Lock::Shared)?;
        }
        Ok(file)
    }

    /// The allowed folder that a path begins with, and the rest of the path. `..` is taken away by text, never by
    /// following: what is left is looked up without leaving the folder.
    fn below_root(&self, path: &Path) -> Option<(&Path, PathBuf)> {
        let mut plain = PathBuf::new();
        for component in path.components() {
            match component {
                Component::ParentDir => {
                    plain.pop();
                }
                Component::CurDir => {}
                other => plain.push(other),
            }
        }
        let inside = |root: &'_ PathBuf| plain.strip_prefix(root).ok().map(Path::to_path_buf);
        let found = self.roots.iter().find_map(|root| Some((root.as_path(), inside(root)?)));
        found.filter(|(_, below)| !below.as_os_str().is_empty())
    }
}

/// Why a candidate is not the parent, in a few words.
fn reason(e: &Error) -> String {
    match e.kind() {
        ErrorKind::NotFound => "not there".to_owned(),
        ErrorKind::Refused if e.raw_os_error().is_none() => {
            "outside of the allowed folders; see --allow-parents".to_owned()
        }
        _ => e.line(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Use;
    use super::super::rig::Rig;
    use super::*;
    use crate::storage::host::Host;

    const BLOCK: u32 = 2 << 20;

    #[test]
    fn dots_are_taken_away_by_text() {
        let roots = vec![PathBuf::from("/vms/a"), PathBuf::from("/golden")];
        let search = Search { env: &Host, roots, max_depth: 9, passed: Vec::new(), tables: 0, lock: false };
        let below = |path: &str| search.below_root(Path::new(path)).map(|(root, rest)| root.join("|").join(rest));
        for (path, found) in [
            ("/vms/a/p.vhd", Some("/vms/a/|/p.vhd")),
            ("/vms/a/./x/../p.vhd", Some("/vms/a/|/p.vhd")),
            ("/vms/b/../a/p.vhd", Some("/vms/a/|/p.vhd")),
            ("/vms/a/../../golden/r.vhd", Some("/golden/|/r.vhd")),
            ("/vms/a/../b/p.vhd", None),
            ("/vms/ab/p.vhd", None),
            ("/vms/a/../../etc/passwd", None),
            ("/../../../golden/r.vhd", Some("/golden/|/r.vhd")),
            ("/vms/a", None),
            ("/vms/a/x/..", None),
        ] {
            assert_eq!(below(path), found.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn a_candidate_with_another_uuid_is_not_the_parent() {
        let rig = Rig::new();
        rig.dynamic("stranger", BLOCK, 100);
        rig.dynamic("parent", BLOCK, 100);
        rig.child_by("both", "parent", ["stranger", "parent"], BLOCK, 100);
        let chain = rig.chain("both", Use::Look).unwrap();
        assert_eq!(chain.images()[1].file().path().file_name().unwrap(), "parent", "the next candidate is tried");
        rig.child_by("wrong", "parent", ["stranger", "stranger"], BLOCK, 100);
        let e = rig.chain("wrong", Use::Look).unwrap_err();
        assert!(e.kind() == ErrorKind::Invalid && e.line().contains("UUID"), "{e}");
        rig.child_by("lost", "parent", ["gone", "../nowhere"], BLOCK, 100);
        let e = rig.chain("lost", Use::Look).unwrap_err();
        let line = e.line();
        assert!(e.kind() == ErrorKind::NotFound && line.contains("gone (not there)"), "{line}");
        assert!(line.contains("--allow-parents"), "{line}");
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
