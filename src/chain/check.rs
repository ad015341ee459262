//! Checks a chain: each of its files, and the links between them. A check continues after defects that prevent an open.

use std::path::PathBuf;

use super::masked_parent;
use super::open_mode::OpenMode;
use super::parent_lookup::ParentLookup;
use super::parent_time;
use super::parents::{ParentSearch, Policy};
use super::unfinished_merge::warn_of_unfinished_merges;
use crate::error::Result;
use crate::format::{Consequence, Defect, DiskType, Severity};
use crate::image::{self, Image, Suspects, refuse_if_live};
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, FileId, Lock, RuntimeFolder};
use crate::units::{OnProgress, SectorRange};

/// The defects of one file of a chain, and of its link to its parent.
#[derive(Debug)]
pub struct CheckedFile {
    /// The path of the file.
    pub path: PathBuf,
    /// The identity of the file.
    pub id: FileId,
    /// The defects.
    pub defects: Vec<Defect>,
    /// The numbers of corruptions, leaks and cosmetic defects that are not listed, since there are too many of one
    /// kind.
    pub unlisted: [u64; 3],
    /// Whether all metadata of the image could be read. The image may still have defects that an open refuses.
    pub opens: bool,
    /// The ranges of its disk that are lost, in ascending order.
    pub lost: Vec<SectorRange>,
    /// Whether the image is a child whose parents were not checked.
    pub parents_skipped: bool,
}

/// Checks every rule for a file and, if `parents` is given, for all its parents. Returns the results, youngest file
/// first. Takes shared locks, and calls `progress` with the number of bytes checked so far. Live journals are
/// searched in the folders `runtime`.
///
/// # Errors
/// Broken rules are returned as defects. Errors are:
/// - `Busy` if another process holds a conflicting lock on one of the files
/// - `Refused` if a file has a live journal that was not replayed, or if a parent may not be opened
/// - `NotFound` if an allowed folder does not exist
/// - `Io`
/// - the error of `progress`
pub fn check(
    env: &dyn Env,
    youngest: File,
    parents: Option<&Policy>,
    runtime: &[RuntimeFolder],
    progress: &mut OnProgress<'_>,
) -> Result<Vec<CheckedFile>> {
    let mut passed = 0;
    let mut watch = |more| {
        passed += more;
        progress(passed)
    };
    let mut all: Vec<CheckedFile> = Vec::new();
    let mut search = parents.map(|policy| ParentSearch::new(env, &youngest, policy, OpenMode::Read)).transpose()?;
    // The images stay open, and therefore locked, until the end. `suspects` contains the positions of images that may
    // hide data of their parents.
    let (mut images, mut suspects): (Vec<Image>, Vec<(usize, Suspects)>) = (Vec::new(), Vec::new());
    let mut next = Some(youngest);
    while let Some(file) = next.take() {
        file.lock(Lock::Shared)?;
        let (path, id) = (file.path().to_path_buf(), file.stat()?.id);
        let (report, image) = image::check_with_progress(file, &mut watch)?;
        if let Some(image) = image.as_ref().filter(|_| all.is_empty() || !mutant::enabled(Mutant::IgnoreParentStamp)) {
            refuse_if_live(env, runtime, image)?;
        }
        let alone = parents.is_none() && image.as_ref().is_some_and(|image| image.kind() == DiskType::Differencing);
        if let Some(image) = &image {
            warn_of_unfinished_merges(env, image)?;
        }
        let unlisted = [Severity::Corruption, Severity::Leak, Severity::Cosmetic].map(|s| report.unlisted(s));
        let mut checked = CheckedFile {
            path,
            id,
            defects: report.defects,
            unlisted,
            opens: image.is_some(),
            lost: report.lost,
            parents_skipped: alone,
        };
        if let (Some(search), Some(image)) = (&mut search, image) {
            suspects.extend(report.suspects.map(|suspects| (images.len(), suspects)));
            next = check_link(search, &image, &mut checked.defects)?;
            images.push(image);
        }
        all.push(checked);
    }
    // The data of the parents can be read only in a complete chain.
    let is_readable = |c: &CheckedFile| c.defects.iter().all(|d| d.consequence() < Consequence::NotReadable);
    let readable = images.len() == all.len() && all.iter().all(is_readable);
    if readable && images.last().is_some_and(|root| root.kind() != DiskType::Differencing) {
        for (number, suspects) in suspects {
            masked_parent::find_masked(
                &images[number],
                &images[number + 1..],
                &suspects,
                &mut all[number].defects,
                &mut watch,
            )?;
        }
    }
    Ok(all)
}

/// Checks the link to the parent. Returns the parent's file if the link leads to one.
fn check_link(search: &mut ParentSearch<'_>, image: &Image, defects: &mut Vec<Defect>) -> Result<Option<File>> {
    if let Some(defect) = search.check_visit(image)? {
        defects.push(defect);
        return Ok(None);
    }
    if image.kind() != DiskType::Differencing {
        return Ok(None);
    }
    match search.find_parent(image)? {
        ParentLookup::Parent(parent) => {
            note_differences(image, &parent, defects)?;
            Ok(Some(parent.file().clone()))
        }
        ParentLookup::Invalid(file, _) => Ok(Some(file)),
        ParentLookup::Refused(e) => Err(e),
        ParentLookup::NotFound(defect) => {
            // The check of the image alone may have found the same defect.
            if !defects.contains(&defect) {
                defects.push(defect);
            }
            Ok(None)
        }
    }
}

/// Adds notes on differences that are no defects but may explain one.
fn note_differences(child: &Image, parent: &Image, defects: &mut Vec<Defect>) -> Result<()> {
    if child.size() != parent.size() {
        defects.push(Defect::ParentSize { child: child.size(), parent: parent.size() });
    }
    defects.extend(parent_time::changed(child, parent)?);
    Ok(())
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
