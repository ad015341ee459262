//! The request for a snapshot, and its result.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::disk::shared::Disk;

/// A disk of a snapshot, and the name under which its present contents are kept.
#[derive(Clone)]
pub struct SnapshotRequest {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Name of the disk, for the report and for errors.
    pub name: String,
    /// Path that the present active image gets. It is in the folder of the active image, and does not exist. A relative
    /// path counts from that folder.
    pub keep_as: PathBuf,
}

/// Result of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotReport {
    /// The longest time for which writes of a disk were held.
    pub pause: Duration,
    /// The longest time for which flushes of a disk were held.
    pub held_flush: Duration,
    /// The kept images, in the order of the requests.
    pub members: Vec<KeptImage>,
}

/// An image that a snapshot has kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptImage {
    /// Name of the disk.
    pub disk: String,
    /// Absolute path of the kept image.
    pub kept: PathBuf,
    /// UUID of the kept image.
    pub uuid: Uuid,
}
