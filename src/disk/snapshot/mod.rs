//! Snapshots of running disks: the present contents of a disk get a name of their own, and a new child takes the writes
//! from now on, under the old name.
//!
//! ```text
//!   A  X <- guest          A  Y <- guest        X active image, Y new child
//!                   ──>       |                 A path of the active image, K kept name
//!                          K  X
//! ```
//!
//! Several disks of one process can be kept at one moment. The phases ([`snapshot_run`]) hold the writes of the guest
//! only while the file that takes them is replaced, without a sync. Flushes wait longer: until X is committed, and the
//! note of the snapshot says that the snapshot is decided. `crash-safety.md` has the argument.
//!
//! `snapshot_run` has the order of the steps, `snapshot_member` the steps of one disk.

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
/// - `Busy` if another change of a disk is in progress, a disk is closed, or a queue or a commit does not answer in
///   time.
/// - `Refused` if a disk is read-only, its chain is too deep, an earlier snapshot of it is not complete, or a name
///   cannot be used: it exists, or lies in another folder.
/// - `Unsupported` if the file system has no hard links.
/// - `Poisoned`, `NoSpace`, `Io`.
///
/// After an error before the decision the disks are as before, unless an image is poisoned. If an error comes after the
/// decision, the snapshot exists, and the next open of the disk for writing completes its names.
pub fn snapshot(requests: &[SnapshotRequest]) -> Result<SnapshotReport> {
    SnapshotRun::begin(requests)?.run()
}
