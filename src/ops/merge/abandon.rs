//! Giving up a merge that was begun and not finished.
//!
//! | copied | what is left |
//! | --- | --- |
//! | nothing | nothing: the record is removed |
//! | a part | record and mark, which keep the receiver from being opened by itself; the merge may still be finished |
//! | all | the receiver with CHILD's disk, and CHILD, which shows the same: the record is removed, unless a layer between is |
//! |     | still there, which shows neither disk: then the record is kept as for a part |
//!
//! A record whose receiver is gone is removed, too, and so is one whose CHILD is gone if the receiver has no mark (it was
//! restored from a backup).

use std::path::{Path, PathBuf};

use super::resume::{check_same_merge, uuid_at};
use crate::chain::{
    Chain, Copied, ExistingRecord, FileStamp, MergeRecord, MergedLayer, OpenMode, Policy, mark_receiver, receiver_mark,
    relative_path, unmark_receiver,
};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::failpoint;
use crate::image::{Image, ImageIdentity, SavedMtime, file_name, folder_of, open_reconciled, reparent};
use crate::ops::folder_scan;
use crate::ops::parent_link::{Locators, replacement_link};
use crate::storage::{Access, Env, File, Folder, Lock};

/// What became of a merge that was given up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Abandoned {
    /// Nothing is left of it: no image was changed, or the one that was is gone.
    Undone,
    /// This image received everything: it shows CHILD's disk, and so does CHILD.
    Whole(PathBuf),
    /// This image is partly overwritten, and readable only below CHILD.
    Partial(PathBuf),
}

/// Gives up the merge of the image at `child`, which was begun into the image at `into` if that is given.
///
/// # Errors
/// - `Refused` if no such merge of it was begun, or if CHILD is gone and the receiver is partly overwritten
/// - `Busy` while a merge of it runs
/// - `Io`, `NoSpace`: the same call may be made again
pub fn abandon(env: &dyn Env, child: &Path, into: Option<&Path>, policy: &Policy) -> Result<Abandoned> {
    let child = &env.canonical(child).unwrap_or_else(|_| child.to_path_buf());
    let present = uuid_at(env, child)?;
    let record = match MergeRecord::find(env, child, present) {
        Ok(ExistingRecord::Record(record)) => *record,
        Ok(ExistingRecord::Unreadable(path)) => match rebuild_record(env, child, policy)? {
            Some(record) => record,
            None => return remove_record_file(env, &path),
        },
        Ok(ExistingRecord::None) => {
            return Err(Error::new(ErrorKind::Refused, "no merge of it was begun").at_path(child));
        }
        Err(e) if present.is_none() && e.kind() == ErrorKind::Invalid => return remove_orphan(env, e),
        Err(e) => return Err(e),
    };
    if into.is_some() {
        check_same_merge(env, &record, child, into)?;
    }
    let path = record.folder.join(&record.ancestor_path);
    let Some(ancestor) = lock_receiver(env, &path, &record)? else {
        record.remove(&record_folder(env, &record)?)?;
        return Ok(Abandoned::Undone);
    };
    match record.copied {
        Copied::Nothing => remove_mark_and_record(env, &record, &ancestor).map(|()| Abandoned::Undone),
        // A layer between would show parts of both disks.
        Copied::All if has_layer_between(env, &record)? => {
            save_as_abandoned(env, record).map(|()| Abandoned::Partial(path))
        }
        Copied::All => {
            refresh_parent_time(env, &record, &ancestor)?;
            remove_mark_and_record(env, &record, &ancestor).map(|()| Abandoned::Whole(path))
        }
        Copied::Before(_) if present.is_none() => {
            if receiver_mark(&ancestor)?.is_some_and(|(uuid, _)| uuid == record.layers[0].uuid) {
                let what = format!(
                    "it is partly overwritten by {}, which is gone: restore either of them from a backup as a new file, or \
                     remove this one",
                    child.display()
                );
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            log::warn!("{}: it has no mark of a merge and is taken for whole", path.display());
            remove_mark_and_record(env, &record, &ancestor).map(|()| Abandoned::Undone)
        }
        Copied::Before(_) => keep_as_partial(env, record, &ancestor).map(|()| Abandoned::Partial(path)),
    }
}

/// The receiver, locked so that no merge of it runs; `None` if it is gone, or another image has its name.
fn lock_receiver(env: &dyn Env, path: &Path, record: &MergeRecord) -> Result<Option<File>> {
    let Some(file) = none_if_not_found(env.open(path, Access::Write))? else { return Ok(None) };
    file.lock(Lock::Exclusive)?;
    let is_it = ImageIdentity::peek(&file)?.is_none_or(|glance| glance.uuid == record.ancestor);
    Ok(is_it.then_some(file))
}

/// Has the layer that stands on the receiver record its new time: nobody but the merge has changed it.
fn refresh_parent_time(env: &dyn Env, record: &MergeRecord, ancestor: &File) -> Result<()> {
    let layer = record.layers.last().expect("a merge folds an image");
    let Some(file) = none_if_not_found(env.open(&record.folder.join(&layer.path), Access::Write))? else {
        return Ok(());
    };
    file.lock(Lock::Exclusive)?;
    SavedMtime::preserve(&file, || {
        let (image, ancestor) = (open_reconciled(&file)?, Image::open(ancestor.clone())?);
        let stands_on_it = image.header().is_some_and(|header| header.parent_uuid == ancestor.uuid());
        if image.uuid() != layer.uuid || !stands_on_it {
            return Ok(());
        }
        let link = replacement_link(env, &image, &ancestor, Locators::Relative)?;
        reparent(env, &file, Some(&link))
    })
}

fn remove_mark_and_record(env: &dyn Env, record: &MergeRecord, ancestor: &File) -> Result<()> {
    unmark_receiver(ancestor)?;
    failpoint::reached("abandon.unmarked");
    record.remove(&record_folder(env, record)?)?;
    failpoint::reached("abandon.record-removed");
    Ok(())
}

fn keep_as_partial(env: &dyn Env, record: MergeRecord, ancestor: &File) -> Result<()> {
    match mark_receiver(ancestor, record.layers[0].uuid, &record.child()) {
        Err(e) => log::warn!("{}; only the record beside CHILD shows that it is not whole", e.line()),
        Ok(()) => failpoint::reached("abandon.marked"),
    }
    save_as_abandoned(env, record)
}

/// Keeps the record, as that of a merge that was given up.
fn save_as_abandoned(env: &dyn Env, mut record: MergeRecord) -> Result<()> {
    record.abandoned = true;
    record.save(&record_folder(env, &record)?)?;
    failpoint::reached("abandon.recorded");
    Ok(())
}

/// Whether an image between CHILD and the receiver is still there.
fn has_layer_between(env: &dyn Env, record: &MergeRecord) -> Result<bool> {
    for layer in &record.layers[1..] {
        if FileStamp::of_image_at(env, &record.folder.join(&layer.path), layer.uuid)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The record of a merge of the image at `child` into the ancestor that its mark names, in the place of one that cannot be
/// read; `None` if none of its ancestors has such a mark.
fn rebuild_record(env: &dyn Env, child: &Path, policy: &Policy) -> Result<Option<MergeRecord>> {
    let image = Image::open(env.open(child, Access::Read)?)?;
    let own = image.uuid();
    let chain = Chain::from_image(env, image, &Policy { merging: Some(own), ..policy.clone() }, OpenMode::Inspect)?;
    let folder = env.canonical(folder_of(child))?;
    let mut layers = Vec::new();
    for image in chain.images() {
        let (file, path) = (image.file(), relative_path(&folder, &env.canonical(image.file().path())?));
        if receiver_mark(file)?.is_some_and(|(uuid, _)| uuid == own) {
            return Ok(Some(MergeRecord {
                folder,
                layers,
                ancestor: image.uuid(),
                ancestor_stamp: FileStamp::of(file)?,
                ancestor_path: path,
                copied: Copied::Before(0),
                abandoned: true,
            }));
        }
        layers.push(MergedLayer { uuid: image.uuid(), stamp: FileStamp::of(file)?, path });
    }
    Ok(None)
}

fn remove_record_file(env: &dyn Env, path: &Path) -> Result<Abandoned> {
    let folder = env.folder(folder_of(path))?;
    folder.remove(file_name(path)?)?;
    folder.sync()?;
    Ok(Abandoned::Undone)
}

/// The folder of a record, held open.
fn record_folder(env: &dyn Env, record: &MergeRecord) -> Result<Folder> {
    env.folder(&record.folder)
}

/// Removes the record that `unreadable` names if the image that it is about is not in its folder.
fn remove_orphan(env: &dyn Env, unreadable: Error) -> Result<Abandoned> {
    let Some(path) = unreadable.path().map(Path::to_path_buf) else { return Err(unreadable) };
    let images = folder_scan::scan(env, &[env.folder(folder_of(&path))?])?;
    match MergeRecord::child_uuid_of(&path) {
        Some(uuid) if images.iter().all(|image| image.identity.uuid != uuid) => remove_record_file(env, &path),
        _ => Err(unreadable),
    }
}
