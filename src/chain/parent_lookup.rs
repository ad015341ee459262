//! Finds one parent: by the recorded paths first, and only if none of them leads to a file, by the recorded file names.
//!
//! 1. Each recorded path, in order. A file below an allowed folder is opened; it is the parent if it has the recorded
//!    UUID. For a path outside the allowed folders, only its existence is checked
//!    ([`Env::file_presence`](crate::storage::Env::file_presence)). If a file is there, the search fails: that file may
//!    be the parent, and any other match a diverged copy of it. If it is unknown whether a file is there, the search
//!    fails after the last path, unless another path leads to the parent.
//! 2. Each recorded file name, in the folder of the child and in the folders that the operator has allowed. If two
//!    files match, the search fails, since choosing one would be a guess.

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

/// The result of a search for a parent.
pub(super) enum ParentLookup {
    /// The parent.
    Parent(Box<Image>),
    /// The file at a recorded place cannot be read, or is not an image that can be opened.
    Invalid(File, Error),
    /// The parent may be a file that may not be opened, or two files match. This is not a defect of an image.
    Refused(Error),
    /// No parent was found. The defect states the reason.
    NotFound(Defect),
}

/// The results of the candidates so far.
#[derive(Default)]
struct Candidates {
    /// Files with the recorded UUID.
    matching: Vec<Image>,
    /// The result of the first candidate that exists, or may exist, and is not the parent.
    first_failure: Option<Result<ParentLookup>>,
    /// Paths without a file, with the reason.
    absent: Vec<(PathBuf, String)>,
}

impl ParentSearch<'_> {
    /// Finds and opens the parent of a differencing image that was visited.
    ///
    /// # Errors
    /// - `Busy` if another process holds a conflicting lock on the parent
    /// - `Unsupported` if the kernel has no openat2
    /// - `Io` if the child cannot be read, or if a folder cannot be searched for a candidate
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
        let mut candidates = Candidates::default();
        for path in &recorded.paths {
            let whole = match path {
                ParentPath::Relative(path) => lexically_normal(&here.join(path)),
                ParentPath::Absolute(path) => lexically_normal(path),
            };
            if candidates.has_tried(&whole) {
                continue;
            }
            match self.held_folder_above(&whole) {
                Some((folder, below)) => self.try_candidate(folder, &below, whole.clone(), wanted, &mut candidates),
                None => match self.env().file_presence(&whole) {
                    FilePresence::Absent => candidates.absent.push((whole, "not there".to_owned())),
                    FilePresence::Present => return Ok(ParentLookup::Refused(not_allowed(at, &whole, None))),
                    FilePresence::Unknown(why) => {
                        candidates.record_failure(Ok(ParentLookup::Refused(not_allowed(at, &whole, Some(why)))))
                    }
                },
            }
            if let Some(parent) = candidates.matching.pop() {
                return Ok(ParentLookup::Parent(Box::new(parent)));
            }
        }
        if let Some(first) = candidates.first_failure {
            return first;
        }
        for name in &recorded.names {
            for (path, folder) in std::iter::once((here, folder)).chain(self.allowed()) {
                let whole = path.join(name);
                if !candidates.has_tried(&whole) {
                    self.try_candidate(folder, Path::new(name), whole, wanted, &mut candidates);
                }
            }
        }
        candidates.into_lookup(at)
    }

    fn try_candidate(&self, folder: &Folder, below: &Path, whole: PathBuf, wanted: Uuid, candidates: &mut Candidates) {
        let file = match look_up_ignoring_case(folder, below, self.budget()) {
            Ok(Lookup::File(file)) => file,
            Ok(Lookup::Absent(why)) => return candidates.absent.push((whole, why)),
            Err(e) if e.kind() == ErrorKind::Refused => return candidates.record_failure(Ok(ParentLookup::Refused(e))),
            Err(e) => return candidates.record_failure(Err(e)),
        };
        match self.open_candidate(&file, wanted) {
            Ok(Ok(image)) => candidates.add_match(image),
            Ok(Err(defect)) => candidates.record_failure(Ok(ParentLookup::NotFound(defect))),
            Err(e) if e.kind() == ErrorKind::Busy => candidates.record_failure(Err(e)),
            Err(e) => candidates.record_failure(Ok(ParentLookup::Invalid(file, e))),
        }
    }

    /// Opens a candidate, and locks it except in mode `Inspect`. The inner error means that the candidate has another
    /// UUID.
    fn open_candidate(&self, file: &File, wanted: Uuid) -> Result<Result<Image, Defect>> {
        // A file that was visited is already locked. `visit` reports the cycle.
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

    /// Adds a file that matches, unless it was found under another name before.
    fn add_match(&mut self, image: Image) {
        let id = |image: &Image| image.file().stat().ok().map(|stat| stat.id);
        if self.matching.iter().all(|other| id(other) != id(&image)) {
            self.matching.push(image);
        }
    }

    /// The result of the search by names.
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

/// The error for a recorded path outside the allowed folders. `why` is the reason if it is unknown whether a file is
/// there.
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
