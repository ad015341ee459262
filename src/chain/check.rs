//! Checking a chain: each of its files, and the links between them. Goes on where an open stops.

use std::path::{Path, PathBuf};

use super::parents::{Policy, Search, Sought};
use crate::error::Result;
use crate::format::{Defect, DiskType};
use crate::image::{self, Image, refuse_if_live};
use crate::storage::{Env, File, Lock};

/// What was found in a file of a chain, and in its link to its parent.
#[derive(Debug)]
pub struct Checked {
    /// Its path.
    pub path: PathBuf,
    /// Each broken rule.
    pub defects: Vec<Defect>,
    /// Whether it can be opened at all.
    pub opens: bool,
}

/// Holds a file, and with a policy all its parents, against every rule; youngest first. Takes shared locks.
///
/// # Errors
/// `Busy` where somebody writes to one; `Refused` where a live journal in the folder `runtime` says more than the file;
/// `Io`. Broken rules are in the report.
pub fn check(env: &dyn Env, youngest: File, parents: Option<&Policy>, runtime: Option<&Path>) -> Result<Vec<Checked>> {
    let mut all = Vec::new();
    let mut search = parents.map(|policy| Search::new(env, youngest.path(), policy, true)).transpose()?;
    let mut locked = Vec::new();
    let mut next = Some(youngest);
    while let Some(file) = next.take() {
        file.lock(Lock::Shared)?;
        let path = file.path().to_path_buf();
        let (report, image) = image::check(file)?;
        if let (Some(folder), Some(image), true) = (runtime, &image, all.is_empty()) {
            refuse_if_live(env, folder, image)?;
        }
        let mut checked = Checked { path, defects: report.defects, opens: image.is_some() };
        if let (Some(search), Some(image)) = (&mut search, image) {
            next = link(search, &image, &mut checked.defects)?;
            locked.push(image);
        }
        all.push(checked);
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
        Sought::Parent(parent) => Ok(Some(parent.file().clone())),
        Sought::Broken(file, _) => Ok(Some(file)),
        Sought::Wrong(defect, _) | Sought::Nowhere(defect) => {
            defects.push(defect);
            Ok(None)
        }
    }
}
