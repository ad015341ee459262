//! Snapshots of running disks: the present contents of a disk get a name of their own, and a new child takes the writes
//! from now on, under the old name.
//!
//! ```text
//!   A  X <- guest          A  Y <- guest        X active image, Y new child
//!                   ──>       |                 A path of the active image, K kept name
//!                          K  X
//! ```
//!
//! One snapshot can keep several disks of a process at the same moment. Writes of the guest wait only while the file
//! that takes them is replaced, and no sync runs in that time. Flushes wait longer: until X is committed, and the note
//! of the snapshot durably records that the snapshot is decided. docs/crash-safety.md has the proof (crash-safety 12).
//!
//! `snapshot_run` has the order of the steps, and `snapshot_member` has the steps of one disk.

mod snapshot_member;
mod snapshot_run;
mod snapshot_types;

pub(super) use self::snapshot_member::SERIAL_ATTRIBUTE;
pub use self::snapshot_run::SnapshotRun;
pub use self::snapshot_types::{KeptImage, SnapshotReport, SnapshotRequest};
use crate::error::Result;

/// Takes a snapshot of disks at one moment. Waits until it is complete.
///
/// # Errors
/// - `Busy` if another change of a disk is in progress, a disk is closed or given twice, or a queue or a commit takes
///   too long.
/// - `Invalid` if `requests` is empty.
/// - `Refused` if a disk is read-only, an earlier snapshot of it is not complete, the name of its active image leads to
///   another file, all its file slots are in use, or a kept name cannot be used: it exists, or lies in another folder.
/// - The error of [`Defect::ChainTooDeep`](crate::format::Defect::ChainTooDeep) if a chain is too deep.
/// - `NotFound` if an active image, or the folder of a kept name, does not exist.
/// - `Unsupported` if the file system has no hard links.
/// - `Poisoned` if an image refuses writes.
/// - `NoSpace`, `Io`, and the errors of opening an image.
///
/// After an error before the switch, the snapshot is undone, and the disks are as before, unless an image is poisoned.
/// After an error between the switch and the decision, the disks refuse writes, and the next open for writing finishes
/// or undoes the snapshot. After an error after the decision, the snapshot exists, and the next open of a disk for
/// writing completes its names.
pub fn snapshot(requests: &[SnapshotRequest]) -> Result<SnapshotReport> {
    SnapshotRun::begin(requests)?.run()
}
