//! `merge --abandon`: abandons an unfinished merge.
//!
//! | copied | result |
//! | --- | --- |
//! | nothing | The merge record is removed, and the mark, if there is one. |
//! | a part | The record and the mark are kept, so the ancestor is not opened by itself. The merge may be finished. |
//! | everything, no layer is left between | Record and mark are removed. CHILD and the ancestor have the same disk. |
//! | everything, a layer is left between | The record and the mark are kept: the layer's disk is a mixture. |
//!
//! "Between" means between CHILD and the ancestor. The merge record is also removed if the ancestor no longer exists,
//! or if CHILD no longer exists and the ancestor has no mark, because the ancestor was restored from a backup.

use std::path::{Path, PathBuf};

use super::resume::{check_same_merge, uuid_at};
use crate::chain::{
    Chain, Copied, ExistingRecord, FileStamp, MergeRecord, MergedLayer, OpenMode, Policy, mark_receiver, receiver_mark,
    relative_path, resolve_snapshot, unmark_receiver,
};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::failpoint;
use crate::image::{Image, ImageIdentity, SavedMtime, file_name, folder_of, open_reconciled, reparent};
use crate::ops::folder_scan;
use crate::ops::parent_link::{Locators, replacement_link};
use crate::storage::{Access, Env, File, Folder, Lock};

/// Result of abandoning a merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Abandoned {
    /// The merge record is removed. No image was changed, or the changed ancestor no longer exists or was restored.
    Undone,
    /// The ancestor at this path received everything: its disk and the disk of CHILD have the same contents.
    Whole(PathBuf),
    /// The ancestor at this path is partly overwritten and can be read only as a parent of CHILD.
    Partial(PathBuf),
}

/// Abandons an unfinished merge of the image at `child`. If `into` is given, the receiver of the merge must be that
/// image.
///
/// # Errors
/// - `Refused` if no such merge was begun, or if CHILD no longer exists and the ancestor is partly overwritten
/// - `Busy` if the merge is running in another process, or if the ancestor or the oldest layer is in use
/// - `Invalid` if the merge record cannot be read and CHILD was renamed
/// - `Invalid`, `Refused`, `Unsupported`, `NotFound` for a file of the chain, if the merge record must be rebuilt
/// - `Io`, `NoSpace`; the same call may be repeated
pub fn abandon(env: &dyn Env, child: &Path, into: Option<&Path>, policy: &Policy) -> Result<Abandoned> {
    let child = &env.canonical(child).unwrap_or_else(|_| child.to_path_buf());
    resolve_snapshot(env, child, &policy.runtime, false)?;
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
        // The disk of a layer between CHILD and the ancestor would be a mixture of its own disk and CHILD's.
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
                    "it is partly overwritten by a merge of {}, which is gone: restore one of the two from a backup as a new \
                     file, or remove this one",
                    child.display()
                );
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            log::warn!("{}: it has no mark of a merge, so it is assumed to be restored from a backup", path.display());
            remove_mark_and_record(env, &record, &ancestor).map(|()| Abandoned::Undone)
        }
        Copied::Before(_) => keep_as_partial(env, record, &ancestor).map(|()| Abandoned::Partial(path)),
    }
}

/// Opens the ancestor and locks it exclusively. Fails with `Busy` while the merge is running in another process,
/// because a running merge has the ancestor locked. Returns `None` if the ancestor no longer exists or another image
/// has its name.
fn lock_receiver(env: &dyn Env, path: &Path, record: &MergeRecord) -> Result<Option<File>> {
    let Some(file) = none_if_not_found(env.open(path, Access::Write))? else { return Ok(None) };
    file.lock(Lock::Exclusive)?;
    let is_ancestor = ImageIdentity::peek(&file)?.is_none_or(|identity| identity.uuid == record.ancestor);
    Ok(is_ancestor.then_some(file))
}

/// Records the ancestor's new modification time in the oldest layer, which is a child of the ancestor. This is correct
/// because only the merge has changed the ancestor.
fn refresh_parent_time(env: &dyn Env, record: &MergeRecord, ancestor: &File) -> Result<()> {
    let layer = record.layers.last().expect("a merge has a layer");
    let Some(file) = none_if_not_found(env.open(&record.folder.join(&layer.path), Access::Write))? else {
        return Ok(());
    };
    file.lock(Lock::Exclusive)?;
    SavedMtime::preserve(&file, || {
        let (image, ancestor) = (open_reconciled(&file)?, Image::open(ancestor.clone())?);
        let is_child = image.header().is_some_and(|header| header.parent_uuid == ancestor.uuid());
        if image.uuid() != layer.uuid || !is_child {
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
        Err(e) => log::warn!(
            "{}; only the record in the folder of CHILD shows that the image is partly overwritten",
            e.line()
        ),
        Ok(()) => failpoint::reached("abandon.marked"),
    }
    save_as_abandoned(env, record)
}

/// Saves the merge record with the state "abandoned".
fn save_as_abandoned(env: &dyn Env, mut record: MergeRecord) -> Result<()> {
    record.abandoned = true;
    record.save(&record_folder(env, &record)?)?;
    failpoint::reached("abandon.recorded");
    Ok(())
}

/// Returns whether a layer between CHILD and the ancestor still exists.
fn has_layer_between(env: &dyn Env, record: &MergeRecord) -> Result<bool> {
    for layer in &record.layers[1..] {
        if FileStamp::of_image_at(env, &record.folder.join(&layer.path), layer.uuid)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Builds a merge record to replace an unreadable one. The receiver is the ancestor whose mark names the image at
/// `child`. Returns `None` if no ancestor has such a mark.
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

/// Opens the folder of a merge record.
fn record_folder(env: &dyn Env, record: &MergeRecord) -> Result<Folder> {
    env.folder(&record.folder)
}

/// Removes the unreadable merge record at the path of the error `unreadable`, if CHILD of this merge is not in the
/// folder of the record. Otherwise returns the error.
fn remove_orphan(env: &dyn Env, unreadable: Error) -> Result<Abandoned> {
    let Some(path) = unreadable.path().map(Path::to_path_buf) else { return Err(unreadable) };
    let images = folder_scan::scan(env, &[env.folder(folder_of(&path))?])?;
    match MergeRecord::child_uuid_of(&path) {
        Some(uuid) if images.iter().all(|image| image.identity.uuid != uuid) => remove_record_file(env, &path),
        _ => Err(unreadable),
    }
}
