//! Floor 3: requests become operations.
//!
//! This floor owns the disk that all queues share ([`Disk`]), the state of one queue ([`Lane`]), the requests in flight
//! (`task`), and group commit ([`group_commit`]). Other floors own the mapping of sectors to files (`chain`), the order
//! of durable writes (`image`), and virtqueues (`device`).
//!
//! ```text
//!   Request ──> Lane::push ── Plan ──┬── Load ──┐         reads bitmaps that are not in memory
//!                              ^     │          │
//!                              ├─────┼──────────┘
//!                              └─────┼── AwaitGrowth      waits until the file grows or the file system has space
//!                                    v
//!                                  Move                   moves bytes, then marks the written sectors
//!                                    ├── LoadForMark      reads bitmaps that were evicted, then marks again
//!                                    ├── AwaitCommit      only flushes, and writes that need a commit
//!                                    v
//!                                  Answer
//! ```
//!
//! A read whose bytes are known to be in the page cache can be answered by copies, without a task (`cached_reads`).
//! While reads wait for the disk, sequential reads are prefetched (`readahead`). Discards and zeroing are cut into
//! pieces, and a disk punches one piece at a time (`punch`).
//!
//! The served version can be replaced while requests run: the top moves to another file slot (`version_change`). Each
//! lane adopts the new version when it takes the event, or earlier to lead a commit (`lane_versions`). Writes wait
//! meanwhile (`lane_gate`). So the disk can grow in the file of its top ([`live_resize`]).
//!
//! A lane belongs to one thread. A read whose bitmaps are in memory takes no lock.
//!
//! Failures: `task_ops` evaluates failed operations of requests; `lane` evaluates failed commits and failed steps of
//! growth, and retries stalled writes and commits once a second while the file system is full; `stages` fails writes
//! and flushes of a poisoned image. [`DiskCounters`] is in `shared`.

mod cached_reads;
mod early_writeback;
mod file_table;
pub mod group_commit;
mod job;
mod lane;
mod lane_gate;
mod lane_lifecycle;
mod lane_table;
mod lane_versions;
pub mod live_resize;
mod lost_names;
pub mod mailbox;
mod op_queue;
mod open;
mod options;
mod pending_commit;
mod punch;
mod readahead;
mod request;
mod served_version;
mod shared;
mod slot_table;
mod snapshot;
mod stages;
mod stalled_writes;
pub mod statistics;
mod task;
mod task_ops;
mod task_table;
mod version_change;
mod version_swap;

pub use crate::image::Allocation;
pub use lane::Lane;
pub use options::{DiskOptions, WhenFull};
pub use request::{Answer, Outcome, Request, Work, ZeroRange};
pub use served_version::ServedVersion;
pub use shared::{Disk, DiskCounters};
pub use snapshot::{KeptImage, SnapshotReport, SnapshotRequest, SnapshotRun, snapshot};
pub use version_change::VersionChange;
pub use version_swap::ChangeStep;
