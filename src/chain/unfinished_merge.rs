//! Restricts the use of images of an unfinished merge.
//!
//! A merge copies CHILD into an ancestor, the receiver. It leaves a [`MergeRecord`] in the folder of CHILD, and a mark
//! on the receiver (`merge_receiver`) while the receiver is partly overwritten: the mark is durable before the first
//! byte is copied, and is removed after the last one. If both exist, the record decides.
//!
//! A file system may have no attributes, and a copy of the receiver may lose the mark. Then only a record shows that
//! the receiver is partly overwritten; it is found in the folders of the chain and in the allowed folders. A record has
//! the UUID of the receiver, so it also applies to copies of the receiver and to files restored from a backup.
//!
//! | state of the merge | opening the receiver itself | opening CHILD | changing the receiver |
//! | --- | --- | --- | --- |
//! | nothing copied | its own disk | CHILD's disk | refused |
//! | partly copied | refused: neither disk | CHILD's disk: CHILD hides every overwritten sector | refused |
//! | all copied | CHILD's disk; refused as parent of a layer between | CHILD's disk | refused, as is changing CHILD |
//! | abandoned | refused: neither disk | CHILD's disk | only its size and the allocation of blocks |
//!
//! A merged layer gets no other parent and no other size before the merge is finished or abandoned. Its contents may
//! change until everything is copied: the merge then copies everything again.
//!
//! Opening a chain logs one warning for each unfinished merge in it, except the merge that opens the chain.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::merge_receiver::receiver_mark;
use super::merge_record::{Copied, MergeRecord};
use super::open_mode::OpenMode;
use super::unfinished_snapshot::refuse_unfinished_snapshot;
use super::warning;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, folder_of};
use crate::storage::{Access, Env, File, Folder};

/// A kind of change to an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageChange {
    /// The disk is written to.
    Contents,
    /// The image gets another parent or none, or is removed.
    Link,
    /// The disk gets another size.
    Size,
    /// Blocks move, or their space is freed; the contents of the disk stay the same.
    Allocation,
    /// The image gets a child.
    Child,
}

/// An unfinished merge that involves an image.
struct UnfinishedMerge {
    /// The UUID and the path of CHILD.
    child: Uuid,
    path: PathBuf,
    /// `None` if only the mark of the receiver was found.
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

    /// Whether the receiver may be partly overwritten: some of its sectors have CHILD's data, others do not. This is
    /// assumed if only the mark of the receiver was found.
    fn is_partial(&self) -> bool {
        self.record.as_ref().is_none_or(|record| matches!(record.copied, Copied::Before(_)))
    }

    /// Whether one of the images above the receiver is a layer between it and CHILD. Sectors that such a layer reads
    /// from the receiver may already be CHILD's.
    fn exposes(&self, above: &[&Image]) -> bool {
        let Some(record) = self.record.as_ref().filter(|record| record.copied != Copied::Nothing) else { return false };
        above.iter().any(|image| record.layers[1..].iter().any(|layer| layer.uuid == image.uuid()))
    }

    fn refusal(&self, receiver: &Path) -> Error {
        let (child, command) = (self.path.display(), self.command());
        let what = format!(
            "the image is partly overwritten by an unfinished merge of {child}, and readable only through that image: run \
             `{command}` to finish the merge"
        );
        Error::new(ErrorKind::Refused, what).at_path(receiver)
    }

    fn describe(&self) -> String {
        let (child, command) = (self.path.display(), self.command());
        match (self.is_abandoned(), self.is_complete()) {
            (true, _) => format!(
                "a merge of {child} into this image was abandoned, and the image is readable only through {child}; run \
                 `{command}` to finish the merge"
            ),
            (false, true) => format!(
                "a merge of {child} into this image copied everything, but was not finished; run `{command}` to finish it"
            ),
            (false, false) => format!(
                "a merge of {child} into this image was not finished; run `{command}` to finish it, or `{command} \
                 --abandon` to abandon it"
            ),
        }
    }
}

/// Refuses a chain (youngest image first) that reads a receiver which is partly overwritten, or reads a receiver
/// through a layer between CHILD and the receiver after copying began, unless CHILD is above the receiver in the chain.
/// Logs a warning for every other unfinished merge, except the merge of `own`. Returns the positions of receivers below
/// their CHILD: the merge explains why the file of such a receiver is newer than its child records.
///
/// # Errors
/// - `Refused`, with the image and the command that finishes the merge; not in the mode `Inspect`
/// - `Io`
pub(super) fn check_chain(
    env: &dyn Env,
    images: &[&Image],
    allowed: &[PathBuf],
    own: Option<Uuid>,
    mode: OpenMode,
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
            // A writer of the youngest image calls `refuse_change`.
            let is_read = matches!(mode, OpenMode::Read | OpenMode::Salvage) || (mode == OpenMode::Write && number > 0);
            if is_read && !is_hidden && (merge.is_partial() || merge.exposes(&images[..number])) {
                return Err(merge.refusal(path));
            }
            warning::once(format!("{}: {}", path.display(), merge.describe()));
        }
    }
    Ok(receiving)
}

/// Logs a warning for each unfinished merge into an image, and refuses none.
///
/// # Errors
/// `Io`.
pub fn warn_of_unfinished_merges(env: &dyn Env, image: &Image) -> Result<()> {
    check_chain(env, &[image], &[], None, OpenMode::Inspect).map(drop)
}

/// Refuses a change of an image after which an unfinished merge could be neither finished nor abandoned, or an
/// unfinished snapshot neither finished nor undone. The merge of `own` does not count.
///
/// # Errors
/// - `Refused`, with the command that finishes the merge or snapshot
/// - `Invalid` if the note of an unfinished snapshot is damaged
/// - `Io`
pub fn refuse_change(
    env: &dyn Env,
    image: &Image,
    change: ImageChange,
    allowed: &[PathBuf],
    own: Option<Uuid>,
) -> Result<()> {
    if change != ImageChange::Child {
        refuse_unfinished_snapshot(env, image, OpenMode::Write)?;
    }
    let records = records_near(env, &[image], allowed)?;
    let refuse = |merge: &UnfinishedMerge, what: &str| {
        let give_up = if merge.is_abandoned() || merge.is_complete() { "" } else { ", or abandon it with --abandon" };
        let what = format!("{what} was begun: finish that first with `{}`{give_up}", merge.command());
        Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
    };
    for merge in merges_into(image, &records)?.into_iter().filter(|merge| Some(merge.child) != own) {
        let is_free = match change {
            ImageChange::Size | ImageChange::Allocation => merge.is_abandoned(),
            ImageChange::Contents | ImageChange::Link | ImageChange::Child => false,
        };
        if !is_free {
            return refuse(&merge, &format!("a merge of {} into this image", merge.path.display()));
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
            return refuse(&UnfinishedMerge::of(record), "a merge of this image");
        }
    }
    Ok(())
}

impl UnfinishedMerge {
    fn of(record: &MergeRecord) -> UnfinishedMerge {
        UnfinishedMerge { child: record.layers[0].uuid, path: record.child(), record: Some(record.clone()) }
    }
}

/// The unfinished merges into an image.
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

/// The records in the folders of these images and in the allowed folders.
fn records_near(env: &dyn Env, images: &[&Image], allowed: &[PathBuf]) -> Result<Vec<MergeRecord>> {
    let mut folders: Vec<Folder> = Vec::new();
    let own = images.iter().map(|image| real_folder(env, image.file()));
    // A missing or inaccessible folder has no record that could be read.
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

/// The folder in which a file lies. If the operator's path ends in a symbolic link, the folder of its target.
fn real_folder(env: &dyn Env, file: &File) -> Result<Folder> {
    let folder = file.folder();
    match folder.open(file.name(), Access::Read) {
        Err(e) if e.kind() == ErrorKind::Refused => env.folder(folder_of(&env.canonical(file.path())?)),
        _ => Ok(folder),
    }
}
