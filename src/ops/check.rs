//! `check`: every rule of the format, without changing anything.

use std::path::Path;

use serde::Serialize;

use crate::chain::{self, Checked, Policy};
use crate::error::Result;
use crate::format::{Defect, Severity};
use crate::storage::{Access, Env};

/// What was found in one file, or in all of a chain.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The file; of a chain the youngest.
    pub path: String,
    /// Whether nothing was found.
    pub ok: bool,
    /// Defects for which the disk cannot be trusted or not be opened.
    pub corruptions: u64,
    /// Regions that nothing refers to.
    pub leaks: u64,
    /// All that was found.
    pub defects: Vec<Found>,
    /// The same for each file, youngest first, when the chain was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<Vec<Report>>,
}

/// A broken rule.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// The file, where a chain was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The word for programs.
    pub kind: &'static str,
    /// The byte offset it is about, where there is one.
    pub offset: Option<u64>,
    /// The sentence for people.
    pub detail: String,
    /// Whether it can be mended without guessing.
    pub repairable: bool,
    /// Whether it counts among the corruptions.
    #[serde(skip)]
    pub corrupt: bool,
}

/// Holds the image at `path`, and with a policy its parents, against every rule. Without a policy nothing that the
/// image names is opened.
///
/// # Errors
/// `Busy` where somebody writes to a file; `Refused` for what is no regular file, and where a live journal in the folder
/// `runtime` says more than the file; `Io`.
pub fn check(env: &dyn Env, path: &Path, parents: Option<&Policy>, runtime: Option<&Path>) -> Result<Report> {
    let checked = chain::check(env, env.open(path, Access::Read)?, parents, runtime)?;
    let mut reports: Vec<Report> = checked.iter().map(|file| report(file, parents.is_some())).collect();
    if parents.is_none() {
        return Ok(reports.remove(0));
    }
    Ok(Report {
        path: reports[0].path.clone(),
        ok: reports.iter().all(|r| r.ok),
        corruptions: reports.iter().map(|r| r.corruptions).sum(),
        leaks: reports.iter().map(|r| r.leaks).sum(),
        defects: reports.iter().flat_map(|r| r.defects.iter().cloned()).collect(),
        chain: Some(reports),
    })
}

fn report(file: &Checked, named: bool) -> Report {
    let path = file.path.display().to_string();
    // What ends an examination is grave, whatever it is.
    let last = file.defects.len().wrapping_sub(1);
    let corrupt =
        |number: usize, defect: &Defect| defect.severity() == Severity::Corruption || (!file.opens && number == last);
    let found = |(number, defect): (usize, &Defect)| Found {
        path: named.then(|| path.clone()),
        kind: defect.kind(),
        offset: defect.offset(),
        detail: defect.to_string(),
        repairable: defect.repairable(),
        corrupt: corrupt(number, defect),
    };
    let defects: Vec<Found> = file.defects.iter().enumerate().map(found).collect();
    Report {
        ok: defects.is_empty(),
        corruptions: defects.iter().filter(|d| d.corrupt).count() as u64,
        leaks: file.defects.iter().filter(|d| d.severity() == Severity::Leak).count() as u64,
        path,
        defects,
        chain: None,
    }
}
