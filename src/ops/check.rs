//! `check`: every rule of the format; with `repair` what can be mended without guessing is mended.

use std::path::Path;

use serde::Serialize;

use super::source::Progress;
use crate::chain::{self, Chain, CheckedFile, ImageChange, OpenMode, Policy, refuse_change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Consequence, Defect, Severity};
use crate::image::{self, FooterChoice, Image, SavedMtime, merge_ranges, refuse_if_file_is_live};
use crate::storage::{Access, Env, File, Lock, RuntimeFolder};
use crate::units::{SECTOR, SectorRange};

/// What was found in one file, or in all of a chain.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The file; of a chain the youngest.
    pub path: String,
    /// Whether nothing was found.
    pub ok: bool,
    /// Defects for which the disk cannot be trusted or not be opened.
    pub corruptions: u64,
    /// Regions that nothing refers to.
    pub leaks: u64,
    /// Defects that are neither.
    pub cosmetic: u64,
    /// All that was found; of one kind at most a thousand in a file.
    pub defects: Vec<FoundDefect>,
    /// What is no defect but may explain something.
    pub notes: Vec<FoundDefect>,
    /// The ranges of the disk that are lost, ascending; of a chain those that any of its files has lost.
    pub lost: Vec<LostRange>,
    /// Whether it is a child whose parents were not to be looked at.
    #[serde(skip)]
    pub parents_unchecked: bool,
    /// What a repair has mended; this report tells what is left.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<RepairedFile>,
    /// The same for each file, youngest first, when the chain was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<Vec<CheckReport>>,
}

/// A run of a disk that a file has lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct LostRange {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// A broken rule.
#[derive(Clone, Debug, Serialize)]
pub struct FoundDefect {
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
    /// What it prevents.
    #[serde(skip)]
    pub consequence: Consequence,
}

/// A file that was mended.
#[derive(Clone, Debug, Serialize)]
pub struct RepairedFile {
    /// The file.
    pub path: String,
    /// What was wrong with it and could be mended.
    pub defects: Vec<FoundDefect>,
    /// The file that keeps what was replaced; `None` where nothing had to be.
    pub undo: Option<String>,
}

/// Bytes of the files that a check goes through, as far as that can be told before: of a broken chain the youngest.
pub fn bytes_to_check(env: &dyn Env, path: &Path, parents: Option<&Policy>) -> u64 {
    let len = |file: &File| file.stat().map_or(0, |stat| stat.len);
    match parents.and_then(|policy| Chain::open(env, path, policy, OpenMode::Inspect).ok()) {
        Some(chain) => chain.images().iter().map(|image| len(image.file())).sum(),
        None => env.open(path, Access::Read).map_or(0, |file| len(&file)),
    }
}

/// Holds the image at `path`, and with a policy its parents, against every rule. Without a policy nothing that the
/// image names is opened. `progress` is told how many bytes of the files are done.
///
/// # Errors
/// `Busy` where somebody writes to a file; `Refused` for what is no regular file, and for an image whose daemon was killed and
/// whose live journal, which may be in one of the folders `runtime`, was not taken in; `Io`; what `progress` fails with.
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

/// As [`check`], after what can be mended without guessing was mended, file by file, under exclusive locks. With `take`
/// one of two footers that contradict each other is chosen. The guest's disk reads the same at every moment, unless the
/// chosen footer is of another disk. Nothing is mended in a file that has lost sectors. Once something is mended `progress` is not asked any more: the report has to
/// tell of it.
///
/// # Errors
/// As for [`check`]; `Busy` where somebody has a file open that is to be mended; `Refused` for an image of an unfinished
/// merge; `NoSpace`.
pub fn repair(
    env: &dyn Env,
    path: &Path,
    parents: Option<&Policy>,
    runtime: &[RuntimeFolder],
    take: Option<FooterChoice>,
    progress: &mut Progress<'_>,
) -> Result<CheckReport> {
    let before = chain::check(env, env.open(path, Access::Read)?, parents, runtime, progress)?;
    let allowed = parents.map_or(&[][..], |policy| &policy.allowed);
    let mut repaired = Vec::new();
    for checked in &before {
        let report = file_report(checked, parents.is_some());
        let taken = take.filter(|_| checked.defects.iter().any(is_footer_contradiction));
        let mended = |found: &FoundDefect| found.repairable || (taken.is_some() && found.kind == KINDS_DIFFER);
        let defects: Vec<FoundDefect> = report.defects.into_iter().filter(mended).collect();
        if defects.is_empty() {
            continue;
        }
        let file = env.open(&checked.path, Access::Write)?;
        file.lock(Lock::Exclusive)?;
        if file.stat()?.id != checked.id {
            return Err(Error::new(ErrorKind::Refused, "it was replaced meanwhile").at_path(&checked.path));
        }
        // A daemon may have come and gone since it was checked.
        refuse_if_file_is_live(env, runtime, &file)?;
        // What cannot be opened can be no part of a merge.
        if let Ok(image) = Image::open(file.clone()) {
            refuse_change(env, &image, ImageChange::Allocation, allowed, None)?;
        }
        let undo = SavedMtime::preserve(&file, || image::repair(env, &file, taken))?;
        let undo = undo.map(|path| path.display().to_string());
        repaired.push(RepairedFile { path: report.path, defects, undo });
    }
    Ok(CheckReport { repaired, ..check(env, path, parents, runtime, &mut |_| Ok(()))? })
}

/// Applies the undo file at `undo`, which a repair of the image at `path` left: the image is as before that repair.
///
/// # Errors
/// `Refused` if the file belongs to another image, if the image was changed since the repair, or if a live journal says more
/// than the image; `Invalid` for a file that is no undo file of a finished repair; `Busy`, `NoSpace`, `Io`: then the same
/// call completes it.
pub fn undo(env: &dyn Env, path: &Path, undo: &Path, runtime: &[RuntimeFolder]) -> Result<()> {
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    refuse_if_file_is_live(env, runtime, &file)?;
    let kept = env.open(undo, Access::Write)?;
    kept.lock(Lock::Exclusive)?;
    image::undo_repair(&file, &kept)
}

/// The word for footers of two kinds, which only a choice mends.
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
    // What ends an examination is grave, whatever it is.
    let last = file.defects.len().wrapping_sub(1);
    let corrupt =
        |number: usize, defect: &Defect| defect.severity() == Severity::Corruption || (!file.opens && number == last);
    // A padded file is mended although it does not open.
    let padded = file.defects.iter().any(|defect| matches!(defect, Defect::FixedPadded { .. }));
    let mendable = (file.opens || padded) && file.lost.is_empty();
    let found = |(number, defect): (usize, &Defect)| FoundDefect {
        path: named.then(|| path.clone()),
        kind: defect.kind(),
        offset: defect.offset(),
        detail: defect.to_string(),
        repairable: defect.repairable() && mendable,
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
