//! `check`: tests an image against every rule of the format. With `--repair`, defects are repaired if only one repair
//! is possible.

use std::path::Path;

use serde::Serialize;

use super::source::Progress;
use crate::chain::{self, Chain, CheckedFile, ImageChange, OpenMode, Policy, refuse_change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Consequence, Defect, Severity};
use crate::image::{self, FooterChoice, Image, SavedMtime, merge_ranges, refuse_if_file_is_live};
use crate::storage::{Access, Env, File, Lock, RuntimeFolder};
use crate::units::{SECTOR, SectorRange};

/// Result of a check of one file, or of a whole chain.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// Path of the file. For a chain, path of the youngest file.
    pub path: String,
    /// Whether no defect was found.
    pub ok: bool,
    /// Number of defects that make the disk unreadable or its contents unreliable.
    pub corruptions: u64,
    /// Number of regions of the file to which nothing refers.
    pub leaks: u64,
    /// Number of other defects.
    pub cosmetic: u64,
    /// The defects. A report lists at most 1000 defects of one kind in a file.
    pub defects: Vec<FoundDefect>,
    /// Observations that are no defects but may explain one.
    pub notes: Vec<FoundDefect>,
    /// Lost ranges of the disk, ascending. For a chain, the ranges that any of its files has lost.
    pub lost: Vec<LostRange>,
    /// Whether the image is a child and its parents were not checked.
    #[serde(skip)]
    pub parents_unchecked: bool,
    /// Repaired files. All other fields have the state after the repair.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<RepairedFile>,
    /// Report of each file, youngest first, if the chain was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<Vec<CheckReport>>,
}

/// A range of a disk that a file has lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct LostRange {
    /// Offset of the range on the disk, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A violation of a rule of the format, or an observation that is no defect.
#[derive(Clone, Debug, Serialize)]
pub struct FoundDefect {
    /// Path of the file, if a chain was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Name of the defect, for programs.
    pub kind: &'static str,
    /// Byte offset in the file, if the defect has one.
    pub offset: Option<u64>,
    /// Description of the defect, for people.
    pub detail: String,
    /// Whether `check --repair` can repair the defect.
    pub repairable: bool,
    /// Whether the defect counts among the corruptions.
    #[serde(skip)]
    pub corrupt: bool,
    /// Which uses of the image the defect prevents.
    #[serde(skip)]
    pub consequence: Consequence,
}

/// A file that was repaired.
#[derive(Clone, Debug, Serialize)]
pub struct RepairedFile {
    /// Path of the file.
    pub path: String,
    /// The defects that were repaired.
    pub defects: Vec<FoundDefect>,
    /// Path of the undo file, which contains the replaced bytes. `None` if no bytes were replaced.
    pub undo: Option<String>,
}

/// Returns the total length of the files that a check will read, as the end of its progress. If the chain cannot be
/// opened, returns the length of the youngest file.
pub fn bytes_to_check(env: &dyn Env, path: &Path, parents: Option<&Policy>) -> u64 {
    let len = |file: &File| file.stat().map_or(0, |stat| stat.len);
    match parents.and_then(|policy| Chain::open(env, path, policy, OpenMode::Inspect).ok()) {
        Some(chain) => chain.images().iter().map(|image| len(image.file())).sum(),
        None => env.open(path, Access::Read).map_or(0, |file| len(&file)),
    }
}

/// Checks the image at `path`, and with a policy its parents, against every rule. Without a policy no file that the
/// image names is opened.
///
/// # Errors
/// - `Busy` if another process holds a conflicting lock on a file
/// - `Refused` if `path` is no regular file, if a parent may not be opened, or if an image lacks writes that are in the
///   live journal of a killed daemon; the message states whether the live journal is in one of the folders `runtime`
/// - `NotFound` if there is no file at `path`
/// - `Io`; errors of `progress`
pub fn check(
    env: &dyn Env,
    path: &Path,
    parents: Option<&Policy>,
    runtime: &[RuntimeFolder],
    progress: &mut Progress<'_>,
) -> Result<CheckReport> {
    let checked = chain::check(env, env.open(path, Access::Read)?, parents, runtime, progress)?;
    Ok(combined_report(&checked, parents.is_some()))
}

/// Repairs the defects that have only one possible repair. Locks and repairs one file after another, then checks the
/// files again and returns the result of the second check.
///
/// `take` chooses one of two footers that contradict each other. The contents of the disk never change, unless the
/// chosen footer belongs to another disk. A file that has lost sectors is not repaired, except that `take` may replace
/// a footer of another disk type. After the first check `progress` is not called again, so that an error of `progress`
/// cannot prevent the report of a repair.
///
/// # Errors
/// - `Busy` if another process holds any lock on a file to repair, or a conflicting lock on another file
/// - `Refused` if `path` is no regular file, if a parent may not be opened, if an image lacks writes that are in the
///   live journal of a killed daemon, if an unfinished merge forbids the repair, or if a file was replaced after the
///   first check
/// - `NotFound` if there is no file at `path`
/// - `Invalid`, `Refused`, `Unsupported` if a file cannot be opened, for another reason than its padding or footers
/// - `Io`, `NoSpace`; errors of `progress`
pub fn repair(
    env: &dyn Env,
    path: &Path,
    parents: Option<&Policy>,
    runtime: &[RuntimeFolder],
    take: Option<FooterChoice>,
    progress: &mut Progress<'_>,
) -> Result<CheckReport> {
    chain::resolve_snapshot(env, path, runtime, false)?;
    let before = chain::check(env, env.open(path, Access::Read)?, parents, runtime, progress)?;
    let allowed = parents.map_or(&[][..], |policy| &policy.allowed);
    let mut repaired = Vec::new();
    for checked in &before {
        let report = file_report(checked, parents.is_some());
        let taken = take.filter(|_| checked.defects.iter().any(is_footer_contradiction));
        let is_repaired = |found: &FoundDefect| found.repairable || (taken.is_some() && found.kind == KINDS_DIFFER);
        let defects: Vec<FoundDefect> = report.defects.into_iter().filter(is_repaired).collect();
        if defects.is_empty() {
            continue;
        }
        let file = env.open(&checked.path, Access::Write)?;
        file.lock(Lock::Exclusive)?;
        if file.stat()?.id != checked.id {
            return Err(Error::new(ErrorKind::Refused, "the file was replaced during the check").at_path(&checked.path));
        }
        // Since the first check, a daemon may have served the image and may have been killed.
        refuse_if_file_is_live(env, runtime, &file)?;
        // An image that cannot be opened is not part of a merge.
        if let Ok(image) = Image::open(file.clone()) {
            refuse_change(env, &image, ImageChange::Allocation, allowed, None)?;
        }
        let undo = SavedMtime::preserve(&file, || image::repair(env, &file, taken))?;
        let undo = undo.map(|path| path.display().to_string());
        repaired.push(RepairedFile { path: report.path, defects, undo });
    }
    Ok(CheckReport { repaired, ..check(env, path, parents, runtime, &mut |_| Ok(()))? })
}

/// Undoes a repair of the image at `path` with the undo file of the repair, at `undo`.
///
/// # Errors
/// The same call completes an interrupted call.
/// - `Refused` if the undo file belongs to another image, if its repair was not finished or was undone already, if the
///   image was changed since the repair, or if a live journal has writes that the image lacks
/// - `Invalid` if the file at `undo` is no undo file, or if the metadata of the image cannot be read
/// - `Busy` if another process holds a lock on one of the two files
/// - `NotFound`, `NoSpace`, `Io`
pub fn undo(env: &dyn Env, path: &Path, undo: &Path, runtime: &[RuntimeFolder]) -> Result<()> {
    chain::resolve_snapshot(env, path, runtime, false)?;
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    refuse_if_file_is_live(env, runtime, &file)?;
    let kept = env.open(undo, Access::Write)?;
    kept.lock(Lock::Exclusive)?;
    image::undo_repair(&file, &kept)
}

/// Name of the defect that the two footers have different types. It is repaired only if `take` chooses a footer.
const KINDS_DIFFER: &str = "footer-kinds-differ";

fn is_footer_contradiction(defect: &Defect) -> bool {
    matches!(defect, Defect::FootersDiffer { .. } | Defect::FooterKindsDiffer { .. })
}

fn combined_report(checked: &[CheckedFile], chain: bool) -> CheckReport {
    let mut reports: Vec<CheckReport> = checked.iter().map(|file| file_report(file, chain)).collect();
    if !chain {
        return reports.remove(0);
    }
    CheckReport {
        path: reports[0].path.clone(),
        ok: reports.iter().all(|r| r.ok),
        corruptions: reports.iter().map(|r| r.corruptions).sum(),
        leaks: reports.iter().map(|r| r.leaks).sum(),
        cosmetic: reports.iter().map(|r| r.cosmetic).sum(),
        defects: reports.iter().flat_map(|r| r.defects.iter().cloned()).collect(),
        notes: reports.iter().flat_map(|r| r.notes.iter().cloned()).collect(),
        lost: lost_ranges(&merge_ranges(checked.iter().flat_map(|file| file.lost.iter().copied()).collect())),
        parents_unchecked: false,
        repaired: Vec::new(),
        chain: Some(reports),
    }
}

fn file_report(file: &CheckedFile, named: bool) -> CheckReport {
    let path = file.path.display().to_string();
    // If an image cannot be opened, its last defect is the reason and counts as a corruption.
    let last = file.defects.len().wrapping_sub(1);
    let corrupt =
        |number: usize, defect: &Defect| defect.severity() == Severity::Corruption || (!file.opens && number == last);
    // A fixed image with padding after its footer can be repaired although it cannot be opened.
    let padded = file.defects.iter().any(|defect| matches!(defect, Defect::FixedPadded { .. }));
    let is_repairable = (file.opens || padded) && file.lost.is_empty();
    let found = |(number, defect): (usize, &Defect)| FoundDefect {
        path: named.then(|| path.clone()),
        kind: defect.kind(),
        offset: defect.offset(),
        detail: defect.to_string(),
        repairable: defect.repairable() && is_repairable,
        corrupt: corrupt(number, defect),
        consequence: defect.consequence(),
    };
    let (mut defects, mut notes) = (Vec::new(), Vec::new());
    for (number, defect) in file.defects.iter().enumerate() {
        let to = if defect.severity() == Severity::Note { &mut notes } else { &mut defects };
        to.push(found((number, defect)));
    }
    let [corruptions, leaks, cosmetic] = file.unlisted;
    let corrupt = defects.iter().filter(|d| d.corrupt).count() as u64;
    let leak = file.defects.iter().filter(|d| d.severity() == Severity::Leak).count() as u64;
    CheckReport {
        ok: defects.is_empty(),
        corruptions: corruptions + corrupt,
        leaks: leaks + leak,
        cosmetic: cosmetic + defects.len() as u64 - corrupt - leak,
        path,
        defects,
        notes,
        lost: lost_ranges(&file.lost),
        parents_unchecked: file.parents_skipped,
        repaired: Vec::new(),
        chain: None,
    }
}

fn lost_ranges(lost: &[SectorRange]) -> Vec<LostRange> {
    lost.iter().map(|range| LostRange { start: range.start() * SECTOR, length: range.bytes() }).collect()
}
