//! Checking a chain: each of its files, and the links between them. Goes on where an open stops.

use std::path::PathBuf;

use super::hidden;
use super::open::Use;
use super::parent_time;
use super::parents::{Policy, Search};
use super::pending::warn_of_merges;
use super::seek::Sought;
use crate::error::Result;
use crate::format::{Consequence, Defect, DiskType, Severity};
use crate::image::{self, Image, Suspects, refuse_if_live};
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, FileId, Lock, RuntimeFolder};
use crate::units::SectorRange;

/// What was found in a file of a chain, and in its link to its parent.
#[derive(Debug)]
pub struct Checked {
    /// Its path.
    pub path: PathBuf,
    /// Which file that was.
    pub id: FileId,
    /// Each broken rule.
    pub defects: Vec<Defect>,
    /// How many corruptions, leaks and cosmetic faults are not listed, since there are too many of their kind.
    pub unlisted: [u64; 3],
    /// Whether it can be opened at all.
    pub opens: bool,
    /// The ranges of its disk that are lost, ascending.
    pub lost: Vec<SectorRange>,
    /// Whether it is a child whose parents were not to be looked at.
    pub alone: bool,
}

/// Holds a file, and with a policy all its parents, against every rule; youngest first. Takes shared locks.
/// `progress` is told how many bytes of all files were passed.
///
/// # Errors
/// `Busy` where somebody writes to one; `Refused` if the daemon of one was killed and its live journal not taken in, which
/// may be in one of the folders `runtime`, and for a parent that is there and may not be opened; `Io`; what `progress` fails
/// with. Broken rules are in the report.
pub fn check(
    env: &dyn Env,
    youngest: File,
    parents: Option<&Policy>,
    runtime: &[RuntimeFolder],
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Vec<Checked>> {
    let mut passed = 0;
    let mut watch = |more| {
        passed += more;
        progress(passed)
    };
    let mut all: Vec<Checked> = Vec::new();
    let mut search = parents.map(|policy| Search::new(env, &youngest, policy, Use::Read)).transpose()?;
    // Open, and with that locked, until all is checked; and who of them may hide what its parents have.
    let (mut images, mut suspects): (Vec<Image>, Vec<(usize, Suspects)>) = (Vec::new(), Vec::new());
    let mut next = Some(youngest);
    while let Some(file) = next.take() {
        file.lock(Lock::Shared)?;
        let (path, id) = (file.path().to_path_buf(), file.stat()?.id);
        let (report, image) = image::check_watched(file, &mut watch)?;
        if let Some(image) = image.as_ref().filter(|_| all.is_empty() || !mutant::is(Mutant::ParentNotAsked)) {
            refuse_if_live(env, runtime, image)?;
        }
        let alone = parents.is_none() && image.as_ref().is_some_and(|image| image.kind() == DiskType::Differencing);
        if let Some(image) = &image {
            warn_of_merges(env, image)?;
        }
        let unlisted = [Severity::Corruption, Severity::Leak, Severity::Cosmetic].map(|s| report.unlisted(s));
        let mut checked =
            Checked { path, id, defects: report.defects, unlisted, opens: image.is_some(), lost: report.lost, alone };
        if let (Some(search), Some(image)) = (&mut search, image) {
            suspects.extend(report.suspects.map(|suspects| (images.len(), suspects)));
            next = link(search, &image, &mut checked.defects)?;
            images.push(image);
        }
        all.push(checked);
    }
    // Only a whole chain tells what its parents have.
    let is_readable = |c: &Checked| c.defects.iter().all(|d| d.consequence() < Consequence::NotReadable);
    let readable = images.len() == all.len() && all.iter().all(is_readable);
    if readable && images.last().is_some_and(|root| root.kind() != DiskType::Differencing) {
        for (number, suspects) in suspects {
            hidden::look(&images[number], &images[number + 1..], &suspects, &mut all[number].defects, &mut watch)?;
        }
    }
    Ok(all)
}

/// The parent's file, where the link leads to one.
fn link(search: &mut Search<'_>, image: &Image, defects: &mut Vec<Defect>) -> Result<Option<File>> {
    if let Some(defect) = search.broken_by(image)? {
        defects.push(defect);
        return Ok(None);
    }
    if image.kind() != DiskType::Differencing {
        return Ok(None);
    }
    match search.seek(image)? {
        Sought::Parent(parent) => {
            note_differences(image, &parent, defects)?;
            Ok(Some(parent.file().clone()))
        }
        Sought::Broken(file, _) => Ok(Some(file)),
        Sought::Refused(e) => Err(e),
        Sought::Nowhere(defect) => {
            // The image's own bytes may have shown it already.
            if !defects.contains(&defect) {
                defects.push(defect);
            }
            Ok(None)
        }
    }
}

/// What is no fault and may explain one.
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
