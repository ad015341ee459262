//! Images of a merge that was begun and not finished: what may still be done with them.
//!
//! A merge leaves a [`MergeRecord`] beside CHILD, and on the image that receives a mark: the extended attribute
//! `user.diffdisk.merge`, `<uuid of CHILD> <path of CHILD>`. The mark is there while the receiver is partly overwritten: it
//! is durable before the first byte is copied, and goes when all is copied. Where both are found, the record counts. A file
//! system may keep no attributes, and a copy of the receiver may lose its mark: then only a record shows that the receiver
//! is not whole, if it lies in a folder of the chain or in an allowed one. A record names the receiver by UUID, so it also
//! counts for copies and for files restored from a backup.
//!
//! | state of the merge | the receiver by itself | below CHILD | changed |
//! | --- | --- | --- | --- |
//! | nothing copied | its own disk | CHILD's disk | refused |
//! | partly copied | refused: neither disk | CHILD's disk: CHILD hides every sector that was overwritten | refused |
//! | all copied | CHILD's disk; refused below a layer between | CHILD's disk | refused, and CHILD too |
//! | abandoned | refused: neither disk | CHILD's disk | only its size and room |
//!
//! Every open of a chain writes one warning for each unfinished merge in it.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::merge_receiver::receiver_mark;
use super::merge_record::{Copied, MergeRecord};
use super::open_mode::OpenMode;
use super::warning;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, folder_of};
use crate::storage::{Access, Env, File, Folder};

/// What is going to be done with an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageChange {
    /// Its disk is written to.
    Contents,
    /// It gets another parent or none, or is removed.
    Link,
    /// Its disk gets another size.
    Size,
    /// Its blocks move, or give room back: the disk stays as it is.
    Allocation,
    /// It gets a child.
    Child,
}

/// An unfinished merge, as far as an image of it shows.
struct UnfinishedMerge {
    /// CHILD: identity and path.
    child: Uuid,
    path: PathBuf,
    /// None if only the receiver's mark was found.
    record: Option<MergeRecord>,
}

impl UnfinishedMerge {
    fn is_abandoned(&self) -> bool {
        self.record.as_ref().is_none_or(|record| record.abandoned)
    }

    fn is_complete(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.copied == Copied::All)
    }

    fn command(&self) -> String {
        let by_mark = || format!("diffdisk merge {}", self.path.display());
        self.record.as_ref().map_or_else(by_mark, MergeRecord::command)
    }

    /// Whether the disk of the receiver is neither its own nor CHILD's.
    fn is_partial(&self) -> bool {
        self.record.as_ref().is_none_or(|record| matches!(record.copied, Copied::Before(_)))
    }

    /// Whether one of the images above the receiver is folded below CHILD: what it takes from the receiver is CHILD's by now.
    fn exposes(&self, above: &[&Image]) -> bool {
        let Some(record) = self.record.as_ref().filter(|record| record.copied != Copied::Nothing) else { return false };
        above.iter().any(|image| record.layers[1..].iter().any(|layer| layer.uuid == image.uuid()))
    }

    fn refusal(&self, receiver: &Path) -> Error {
        let (child, command) = (self.path.display(), self.command());
        let what = format!(
            "it is partly overwritten by a merge of {child} that was not finished, and is readable only below that: run \
             `{command}` to finish the merge"
        );
        Error::new(ErrorKind::Refused, what).at_path(receiver)
    }

    fn describe(&self) -> String {
        let (child, command) = (self.path.display(), self.command());
        match (self.is_abandoned(), self.is_complete()) {
            (true, _) => format!(
                "a merge of {child} into it was abandoned, and it is readable only below that; run `{command}` to finish \
                 the merge"
            ),
            (false, true) => format!(
                "a merge of {child} into it copied everything and was not finished; run `{command}` to finish it"
            ),
            (false, false) => format!(
                "a merge of {child} into it was not finished; run `{command}` to finish it, or `{command} --abandon` to \
                 give it up"
            ),
        }
    }
}

/// Refuses a chain (youngest image first) in which an image is read that is partly overwritten and that its CHILD does not
/// hide; warns of every other unfinished merge in it. The merge of `own` does not count. Returns the positions of images
/// that CHILD's data was written to below CHILD: their files are newer than recorded for this reason.
///
/// # Errors
/// - `Refused` naming the image and the command that finishes the merge, unless only headers are looked at
/// - `Io`
pub(super) fn check_chain(
    env: &dyn Env,
    images: &[&Image],
    allowed: &[PathBuf],
    own: Option<Uuid>,
    how: OpenMode,
) -> Result<Vec<usize>> {
    let records = records_near(env, images, allowed)?;
    let mut receiving = Vec::new();
    for (number, image) in images.iter().enumerate() {
        for merge in merges_into(image, &records)? {
            let is_hidden = images[..number].iter().any(|above| above.uuid() == merge.child);
            if is_hidden {
                receiving.push(number);
            }
            if own == Some(merge.child) {
                continue;
            }
            let path = image.file().path();
            // Who writes the youngest image asks `refuse_change`.
            let is_read = matches!(how, OpenMode::Read | OpenMode::Salvage) || (how == OpenMode::Write && number > 0);
            if is_read && !is_hidden && (merge.is_partial() || merge.exposes(&images[..number])) {
                return Err(merge.refusal(path));
            }
            warning::once(format!("{}: {}", path.display(), merge.describe()));
        }
    }
    Ok(receiving)
}

/// Warns of unfinished merges into an image whose headers alone are looked at.
///
/// # Errors
/// `Io`.
pub fn warn_of_unfinished_merges(env: &dyn Env, image: &Image) -> Result<()> {
    check_chain(env, &[image], &[], None, OpenMode::Inspect).map(drop)
}

/// Refuses a change of an image after which a merge that was begun could be neither finished nor abandoned. The merge of
/// `own` does not count.
///
/// # Errors
/// - `Refused` naming the command that finishes the merge
/// - `Io`
pub fn refuse_change(
    env: &dyn Env,
    image: &Image,
    change: ImageChange,
    allowed: &[PathBuf],
    own: Option<Uuid>,
) -> Result<()> {
    let records = records_near(env, &[image], allowed)?;
    let refuse = |merge: &UnfinishedMerge, what: &str| {
        let give_up = if merge.is_abandoned() || merge.is_complete() { "" } else { ", or give it up with --abandon" };
        let what = format!("{what} was begun: finish that first with `{}`{give_up}", merge.command());
        Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
    };
    for merge in merges_into(image, &records)?.into_iter().filter(|merge| Some(merge.child) != own) {
        let is_free = match change {
            ImageChange::Size | ImageChange::Allocation => merge.is_abandoned(),
            ImageChange::Contents | ImageChange::Link | ImageChange::Child => false,
        };
        if !is_free {
            return refuse(&merge, &format!("a merge of {} into it", merge.path.display()));
        }
    }
    for record in records.iter().filter(|record| Some(record.layers[0].uuid) != own) {
        let Some(place) = record.layers.iter().position(|layer| layer.uuid == image.uuid()) else { continue };
        let complete = record.copied == Copied::All;
        let is_free = match change {
            ImageChange::Child => place == 0,
            ImageChange::Contents | ImageChange::Allocation => !complete,
            ImageChange::Link | ImageChange::Size => record.abandoned,
        };
        if !is_free {
            return refuse(&UnfinishedMerge::of(record), "a merge of it");
        }
    }
    Ok(())
}

impl UnfinishedMerge {
    fn of(record: &MergeRecord) -> UnfinishedMerge {
        UnfinishedMerge { child: record.layers[0].uuid, path: record.child(), record: Some(record.clone()) }
    }
}

/// The merges into an image.
fn merges_into(image: &Image, records: &[MergeRecord]) -> Result<Vec<UnfinishedMerge>> {
    let mut merges: Vec<UnfinishedMerge> =
        records.iter().filter(|record| record.ancestor == image.uuid()).map(UnfinishedMerge::of).collect();
    if let Some((child, path)) = receiver_mark(image.file())?
        && merges.iter().all(|merge| merge.child != child)
    {
        merges.push(UnfinishedMerge { child, path, record: None });
    }
    Ok(merges)
}

/// The records in the folders of these images, and in allowed ones.
fn records_near(env: &dyn Env, images: &[&Image], allowed: &[PathBuf]) -> Result<Vec<MergeRecord>> {
    let mut folders: Vec<Folder> = Vec::new();
    let own = images.iter().map(|image| real_folder(env, image.file()));
    // A folder that is gone or closed to us holds no record that we could read.
    for folder in own.chain(allowed.iter().map(|folder| env.folder(folder))) {
        if let Ok(folder) = folder.and_then(|folder| folder.absolute()) {
            folder.add_if_missing(&mut folders);
        }
    }
    let mut records = Vec::new();
    for folder in &folders {
        records.extend(MergeRecord::all_in(folder)?);
    }
    Ok(records)
}

/// The folder in which a file really lies: that of what a symbolic link leads to, if an operator's path ends in one.
fn real_folder(env: &dyn Env, file: &File) -> Result<Folder> {
    let folder = file.folder();
    match folder.open(file.name(), Access::Read) {
        Err(e) if e.kind() == ErrorKind::Refused => env.folder(folder_of(&env.canonical(file.path())?)),
        _ => Ok(folder),
    }
}
