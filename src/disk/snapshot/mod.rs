//! Snapshots of running disks: the present contents of each disk are kept under a new name, and the guest continues to
//! write into a new child at the path of the disk. Several disks are kept at one moment.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::shared::Disk;
use crate::error::{Error, ErrorKind, Result};

/// A disk of a snapshot, and the name under which its present contents are kept.
pub struct SnapshotRequest {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Name of the disk, for the report and for messages.
    pub name: String,
    /// Absolute path of the image with the present contents. No file has this name, and its folder is that of the
    /// image which takes the writes now.
    pub keep_as: PathBuf,
}

/// The outcome of a snapshot.
pub struct SnapshotReport {
    /// Time for which writes of the disks waited.
    pub pause: Duration,
    /// Longest time for which a flush waited.
    pub held_flush: Duration,
    /// The kept images, in the order of the requests.
    pub members: Vec<KeptImage>,
}

/// An image with the contents of a disk at the moment of the snapshot.
pub struct KeptImage {
    /// Name of the disk.
    pub disk: String,
    /// Absolute path of the image.
    pub kept: PathBuf,
    /// UUID of the image.
    pub uuid: Uuid,
}

/// Takes a snapshot of the disks at one moment. Guests continue meanwhile.
///
/// # Errors
/// - `Unsupported` in this version
pub fn snapshot(requests: &[SnapshotRequest]) -> Result<SnapshotReport> {
    let _ = requests;
    Err(Error::new(ErrorKind::Unsupported, "snapshots are not built yet"))
}
