//! Detects writes to a parent after its child was created or linked to it.
//!
//! The child records the modification time of the parent's file, rounded down to seconds. The parent counts as changed
//! if its current time, rounded in the same way, is later. A write by another program within the recorded second is not
//! detected. When diffdisk closes an image that it has written to, it moves the time to a later second
//! ([`SavedMtime`](crate::image::SavedMtime)). A recorded 0 means that no time was recorded.

use super::warning;
use crate::error::Result;
use crate::format::Defect;
use crate::format::footer::{time_from_unix, time_to_unix};
use crate::image::{Image, SavedMtime};
use crate::storage::File;

/// Returns [`Defect::ParentChanged`] if the file of `parent` is newer than `child` records.
///
/// # Errors
/// `Io`.
pub(super) fn changed(child: &Image, parent: &Image) -> Result<Option<Defect>> {
    let recorded = child.header().map_or(0, |header| header.parent_timestamp);
    let found = time_from_unix(u64::try_from(parent.file().stat()?.modified).unwrap_or(0));
    Ok((recorded != 0 && found > recorded).then_some(Defect::ParentChanged { recorded, found }))
}

/// Sets the modification time of `parent`, open for writing and locked exclusively, back to the time that `child`
/// records, durably, unless it is not later. The caller has changed the file, but not what `child` reads from it.
///
/// # Errors
/// `Io`.
pub(super) fn restore(child: &Image, parent: &File) -> Result<()> {
    let recorded = child.header().map_or(0, |header| header.parent_timestamp);
    let time = i64::try_from(time_to_unix(recorded)).expect("32 bits");
    if recorded == 0 || parent.stat()?.modified <= time {
        return Ok(());
    }
    SavedMtime::at(parent, time).restore_and_sync()
}

/// Logs a warning that a parent was written to. `defect` is the result of [`changed`].
pub(super) fn warn(child: &Image, parent: &Image, defect: &Defect) {
    let Defect::ParentChanged { recorded, found } = defect else { return };
    let (child, parent) = (child.file().path().display(), parent.file().path().display());
    let later = time_to_unix(*found) - time_to_unix(*recorded);
    warning::once(format!(
        "{parent}: it was written to {later} s after the modification time that {child} records, so the disk of \
         {child} may have changed; if the contents of that disk are right, run `diffdisk rebase {child} --unsafe \
         --parent {parent}` to record the time again"
    ));
}
