//! The search for one parent: the recorded paths first; only if none of them names a file, the recorded file names.
//!
//! 1. Each recorded path, in order. Below an allowed folder the file is opened, and is the parent if it has the recorded
//!    UUID. Elsewhere it is only asked whether a file is there ([`Env::presence`](crate::storage::Env::presence)); if so
//!    the search fails, since that file may be the parent and any other one a copy that went its own way.
//! 2. Each recorded file name, next to the child and in the folders that the operator has allowed. Two files that fit
//!    are none: which one is the parent would be a guess.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::case_insensitive::{Lookup, look_up_ignoring_case};
use super::open_mode::OpenMode;
use super::parents::ParentSearch;
use super::paths::lexically_normal;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Defect, ParentPath};
use crate::image::Image;
use crate::storage::{File, FilePresence, Folder, Lock};

/// What a search for a parent came to.
pub(super) enum ParentLookup {
    /// It is here.
    Parent(Box<Image>),
    /// A file is where it should be, but is no sound image.
    Invalid(File, Error),
    /// A file is where it should be, and a policy forbids to open it: no fault of any image.
    Refused(Error),
    /// There is no parent to open, by this rule.
    NotFound(Defect),
}

/// What the candidates so far came to.
#[derive(Default)]
struct Candidates {
    /// Files with the recorded UUID.
    matching: Vec<Image>,
    /// The first thing that exists and is not the parent.
    first_failure: Option<Result<ParentLookup>>,
    /// Where nothing is, and why.
    absent: Vec<(PathBuf, String)>,
}

impl ParentSearch<'_> {
    /// Looks for the parent of a differencing image that was passed, and opens it.
    ///
    /// # Errors
    /// `Io`: of the child, or of a parent that is there.
    pub(super) fn find_parent(&self, child: &Image) -> Result<ParentLookup> {
        let header = child.header().expect("differencing images have a header");
        if header.parent_is_raw() {
            return Ok(ParentLookup::NotFound(Defect::ParentRaw));
        }
        let recorded = child.recorded_parent()?;
        if recorded.paths.is_empty() && recorded.names.is_empty() {
            return Ok(ParentLookup::NotFound(Defect::ParentUnnamed));
        }
        let (wanted, at) = (header.parent_uuid, child.file().path());
        let (here, folder) = self.folder_of(child);
        let mut seen = Candidates::default();
        for path in &recorded.paths {
            let whole = match path {
                ParentPath::Relative(path) => lexically_normal(&here.join(path)),
                ParentPath::Absolute(path) => lexically_normal(path),
            };
            if seen.has_tried(&whole) {
                continue;
            }
            match self.held_folder_above(&whole) {
                Some((folder, below)) => self.try_candidate(folder, &below, whole.clone(), wanted, &mut seen),
                None => match self.env().file_presence(&whole) {
                    FilePresence::Absent => seen.absent.push((whole, "not there".to_owned())),
                    FilePresence::Present => return Ok(ParentLookup::Refused(not_allowed(at, &whole, None))),
                    FilePresence::Unknown(why) => {
                        seen.record_failure(Ok(ParentLookup::Refused(not_allowed(at, &whole, Some(why)))))
                    }
                },
            }
            if let Some(parent) = seen.matching.pop() {
                return Ok(ParentLookup::Parent(Box::new(parent)));
            }
        }
        if let Some(first) = seen.first_failure {
            return first;
        }
        for name in &recorded.names {
            for (path, folder) in std::iter::once((here, folder)).chain(self.allowed()) {
                let whole = path.join(name);
                if !seen.has_tried(&whole) {
                    self.try_candidate(folder, Path::new(name), whole, wanted, &mut seen);
                }
            }
        }
        seen.into_lookup(at)
    }

    fn try_candidate(&self, folder: &Folder, below: &Path, whole: PathBuf, wanted: Uuid, seen: &mut Candidates) {
        let file = match look_up_ignoring_case(folder, below, self.budget()) {
            Ok(Lookup::File(file)) => file,
            Ok(Lookup::Absent(why)) => return seen.absent.push((whole, why)),
            Err(e) if e.kind() == ErrorKind::Refused => return seen.record_failure(Ok(ParentLookup::Refused(e))),
            Err(e) => return seen.record_failure(Err(e)),
        };
        match self.open_candidate(&file, wanted) {
            Ok(Ok(image)) => seen.add_match(image),
            Ok(Err(defect)) => seen.record_failure(Ok(ParentLookup::NotFound(defect))),
            Err(e) if e.kind() == ErrorKind::Busy => seen.record_failure(Err(e)),
            Err(e) => seen.record_failure(Ok(ParentLookup::Invalid(file, e))),
        }
    }

    /// Opens a candidate, locked; the inner error if it is another image.
    fn open_candidate(&self, file: &File, wanted: Uuid) -> Result<Result<Image, Defect>> {
        // A file that was passed on the way is locked already; that it comes again is found when it is passed.
        if self.mode() != OpenMode::Inspect && !self.has_visited(file.stat()?.id) {
            file.lock(Lock::Shared)?;
        }
        let image = self.mode().open_image(file.clone())?;
        if image.uuid() == wanted {
            return Ok(Ok(image));
        }
        let shown = file.path().display().to_string();
        Ok(Err(Defect::ParentUuid { file: shown, recorded: wanted, found: image.uuid() }))
    }
}

impl Candidates {
    fn has_tried(&self, path: &Path) -> bool {
        self.absent.iter().any(|(tried, _)| tried == path)
    }

    fn record_failure(&mut self, what: Result<ParentLookup>) {
        self.first_failure.get_or_insert(what);
    }

    /// Counts a file in that fits; once, by whatever names it was found.
    fn add_match(&mut self, image: Image) {
        let id = |image: &Image| image.file().stat().ok().map(|stat| stat.id);
        if self.matching.iter().all(|known| id(known) != id(&image)) {
            self.matching.push(image);
        }
    }

    /// What the names came to.
    fn into_lookup(mut self, child: &Path) -> Result<ParentLookup> {
        match (self.matching.pop(), self.matching.pop()) {
            (Some(parent), None) => Ok(ParentLookup::Parent(Box::new(parent))),
            (Some(one), Some(other)) => Ok(ParentLookup::Refused(ambiguous_parent(child, &one, &other))),
            (None, _) => self.first_failure.unwrap_or_else(|| {
                let tried = self.absent.iter().map(|(path, why)| format!("{} ({why})", path.display())).collect();
                Ok(ParentLookup::NotFound(Defect::ParentMissing { tried }))
            }),
        }
    }
}

/// `why` it is not known whether the parent is there.
fn not_allowed(child: &Path, parent: &Path, why: Option<&str>) -> Error {
    let folder = parent.parent().unwrap_or(Path::new("/")).display();
    let parent = parent.display();
    let there = match why {
        None => format!("its recorded parent {parent} is there but not below an allowed folder"),
        Some(why) => format!("its recorded parent may be {parent}, which is not below an allowed folder ({why})"),
    };
    let what = format!(
        "{there}: give --allow-parents {folder}, or link the child to another file with `diffdisk rebase --unsafe`"
    );
    Error::new(ErrorKind::Refused, what).at_path(child)
}

fn ambiguous_parent(child: &Path, one: &Image, other: &Image) -> Error {
    let what = format!(
        "its parent is at none of the recorded paths, and both {} and {} have its name and UUID: link the child to the \
         right one with `diffdisk rebase --unsafe`",
        other.file().path().display(),
        one.file().path().display()
    );
    Error::new(ErrorKind::Refused, what).at_path(child)
}

#[cfg(test)]
#[path = "parent_lookup_tests.rs"]
mod tests;
