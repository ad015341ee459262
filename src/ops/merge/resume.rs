//! Continuing an unfinished merge: whether it is the requested merge, and which part of the copy is complete.

use std::path::Path;

use uuid::Uuid;

use super::plan::MergePlan;
use crate::chain::{Copied, ExistingRecord, FileStamp, MergeRecord, MergedLayer, receiver_mark};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env};

/// Returns the UUID of the image at `path`, or `None` if there is no file or the file is no image.
///
/// # Errors
/// - `Io`
/// - `Refused` if `path` is no regular file
pub(super) fn uuid_at(env: &dyn Env, path: &Path) -> Result<Option<Uuid>> {
    let Some(file) = none_if_not_found(env.open(path, Access::Read))? else { return Ok(None) };
    Ok(ImageIdentity::peek(&file)?.map(|identity| identity.uuid))
}

/// Copies the progress of an interrupted run from its merge record, `earlier`, into `record`, the merge record of this
/// run.
///
/// # Errors
/// - `Refused` if the interrupted merge has another ancestor
/// - `Io`
pub(super) fn resume_from(earlier: ExistingRecord, record: &mut MergeRecord, plan: &MergePlan) -> Result<()> {
    let earlier = match earlier {
        // If the user removed the merge record, the ancestor may still have a mark.
        ExistingRecord::None => {
            let marked = receiver_mark(plan.ancestor.file())?.map(|(uuid, _)| uuid);
            if marked == Some(record.layers[0].uuid) {
                record.copied = Copied::Before(0);
            }
            return Ok(());
        }
        ExistingRecord::Unreadable(path) => {
            log::warn!("{}: the record of a merge cannot be read; the merge begins again", path.display());
            record.copied = Copied::Before(0);
            return Ok(());
        }
        ExistingRecord::Record(earlier) => *earlier,
    };
    if earlier.ancestor != record.ancestor {
        let (child, into) = (record.child(), earlier.folder.join(&earlier.ancestor_path));
        let what = format!(
            "a merge of it into {} was begun, which is no longer its parent: run `diffdisk merge {} --abandon` first",
            into.display(),
            child.display()
        );
        return Err(Error::new(ErrorKind::Refused, what).at_path(child));
    }
    let is_same = |layer: &MergedLayer, now: &MergedLayer| layer.uuid == now.uuid && layer.stamp == now.stamp;
    let all_same = earlier.layers.len() == record.layers.len()
        && earlier.layers.iter().zip(&record.layers).all(|(layer, now)| is_same(layer, now));
    match earlier.copied {
        Copied::Nothing => {}
        Copied::Before(_) if all_same => {
            (record.copied, record.ancestor_stamp) = (earlier.copied, earlier.ancestor_stamp);
        }
        // A layer or the ancestor changed. (`prepare` has handled a complete copy without changes, see
        // `is_copy_complete`.)
        Copied::Before(_) | Copied::All => record.copied = Copied::Before(0),
    }
    Ok(())
}

/// Refuses a merge into another ancestor than that of the unfinished merge in `record`.
pub(super) fn check_same_merge(env: &dyn Env, record: &MergeRecord, child: &Path, into: Option<&Path>) -> Result<()> {
    let ancestor = record.folder.join(&record.ancestor_path);
    let same = match into {
        None => record.layers.len() == 1,
        Some(into) => {
            ImageIdentity::peek(&env.open(into, Access::Read)?)?.map(|identity| identity.uuid) == Some(record.ancestor)
        }
    };
    if same {
        return Ok(());
    }
    let what = format!("a merge of it into {0} was begun: end that first, with --into {0}", ancestor.display());
    Err(Error::new(ErrorKind::Refused, what).at_path(child))
}

/// Returns whether a copy that `record` reports as complete is still valid: the ancestor and the existing layers have
/// the recorded file stamps.
///
/// # Errors
/// - `Refused` if the ancestor changed and CHILD no longer exists
/// - `Io`
pub(super) fn is_copy_complete(env: &dyn Env, record: &MergeRecord, child_exists: bool) -> Result<bool> {
    let ancestor = record.folder.join(&record.ancestor_path);
    let same = FileStamp::of_image_at(env, &ancestor, record.ancestor)? == Some(record.ancestor_stamp);
    if !child_exists {
        if same {
            return Ok(true);
        }
        let what = format!(
            "it was changed or replaced after everything was copied into it, and {} is gone, so no more layers are removed; if \
             its disk is right, run the same command with --abandon",
            record.child().display()
        );
        return Err(Error::new(ErrorKind::Refused, what).at_path(ancestor));
    }
    for layer in &record.layers {
        let state = FileStamp::of_image_at(env, &record.folder.join(&layer.path), layer.uuid)?;
        if state.is_some_and(|state| state != layer.stamp) {
            return Ok(false);
        }
    }
    Ok(same)
}
