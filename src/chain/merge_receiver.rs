//! The mark on the receiver of a merge: an extended attribute that is durable before the first byte is copied.
//!
//! Its value is `<uuid of CHILD> <path of CHILD>`. A receiver has the mark while it is partly overwritten, unless the
//! file system has no extended attributes.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::paths::{percent_decode, percent_encode};
use crate::error::Result;
use crate::storage::File;

const MERGE_ATTRIBUTE: &str = "user.diffdisk.merge";

/// Marks the image in `receiver` as partly overwritten by CHILD, and syncs the file.
///
/// # Errors
/// - `Unsupported` if the file system has no extended attributes
/// - `NoSpace` if the file system has no space for the attribute
/// - `Io`
pub fn mark_receiver(receiver: &File, child: Uuid, path: &Path) -> Result<()> {
    receiver.set_attribute(MERGE_ATTRIBUTE, Some(format!("{child} {}", percent_encode(path)).as_bytes()))?;
    receiver.sync_all()
}

/// Removes the mark of [`mark_receiver`], and syncs the file.
///
/// # Errors
/// `Io`.
pub fn unmark_receiver(receiver: &File) -> Result<()> {
    if receiver.attribute(MERGE_ATTRIBUTE)?.is_none() {
        return Ok(());
    }
    receiver.set_attribute(MERGE_ATTRIBUTE, None)?;
    receiver.sync_all()
}

/// Returns the UUID and path of CHILD if the image in `receiver` has the mark of [`mark_receiver`]. A malformed mark
/// counts as none.
///
/// # Errors
/// `Io`.
pub fn receiver_mark(receiver: &File) -> Result<Option<(Uuid, PathBuf)>> {
    let Some(value) = receiver.attribute(MERGE_ATTRIBUTE)? else { return Ok(None) };
    let decode = || {
        let (uuid, path) = std::str::from_utf8(&value).ok()?.split_once(' ')?;
        Some((uuid.parse().ok()?, percent_decode(path)?))
    };
    Ok(decode())
}
