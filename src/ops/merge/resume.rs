//! Going on with a merge that was begun: whether it is the same one, and what of it is done.

use std::path::Path;

use uuid::Uuid;

use super::plan::MergePlan;
use crate::chain::{Copied, ExistingRecord, FileStamp, MergeRecord, MergedLayer, receiver_mark};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::image::ImageIdentity;
use crate::storage::{Access, Env};

/// Returns the identity of the image that has a name now, if there is one.
///
/// # Errors
/// `Io`; `Refused` for what is no regular file.
pub(super) fn uuid_at(env: &dyn Env, path: &Path) -> Result<Option<Uuid>> {
    let Some(file) = none_if_not_found(env.open(path, Access::Read))? else { return Ok(None) };
    Ok(ImageIdentity::peek(&file)?.map(|glance| glance.uuid))
}

/// Puts into `record`, which is that of a new merge, what an earlier start has done of it.
///
/// # Errors
/// `Refused` if the earlier one was into another image; `Io`.
pub(super) fn resume_from(earlier: ExistingRecord, record: &mut MergeRecord, survey: &MergePlan) -> Result<()> {
    let earlier = match earlier {
        // A mark without a record: somebody removed that.
        ExistingRecord::None => {
            let marked = receiver_mark(survey.ancestor.file())?.map(|(uuid, _)| uuid);
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
            "a merge of it into {} was begun, and that is not its parent any more: run `diffdisk merge {} --abandon` first",
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
        // A record that everything is copied was looked at before: something was written since.
        Copied::Before(_) | Copied::All => record.copied = Copied::Before(0),
    }
    Ok(())
}

/// Whether a merge that was begun is the one that is asked for.
pub(super) fn check_same_merge(env: &dyn Env, record: &MergeRecord, child: &Path, into: Option<&Path>) -> Result<()> {
    let ancestor = record.folder.join(&record.ancestor_path);
    let same = match into {
        None => record.layers.len() == 1,
        Some(into) => {
            ImageIdentity::peek(&env.open(into, Access::Read)?)?.map(|glance| glance.uuid) == Some(record.ancestor)
        }
    };
    if same {
        return Ok(());
    }
    let what = format!("a merge of it into {0} was begun: end that first, with --into {0}", ancestor.display());
    Err(Error::new(ErrorKind::Refused, what).at_path(child))
}

/// Whether names and links are all that is left of a merge whose note says that all is copied: the ancestor and the
/// layers are what they were then.
///
/// # Errors
/// `Refused` where the ancestor is not and CHILD is gone; `Io`.
pub(super) fn is_copy_complete(env: &dyn Env, record: &MergeRecord, is_child_there: bool) -> Result<bool> {
    let ancestor = record.folder.join(&record.ancestor_path);
    let same = FileStamp::of_image_at(env, &ancestor, record.ancestor)? == Some(record.ancestor_stamp);
    if !is_child_there {
        if same {
            return Ok(true);
        }
        let what = format!(
            "it was changed or replaced since all was copied into it, and {} is gone: nothing more is removed; if its disk \
             is right, run the same command with --abandon",
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
