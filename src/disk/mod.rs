//! Floor 3: requests become operations.
//!
//! Owns: the disk that all queues share ([`Disk`]), the engine of one queue ([`Lane`]), requests in flight (`task`), group
//! commit ([`group_commit`]). Leaves to others: where sectors are (`chain`), the order of durable writes (`image`),
//! virtqueues (`device`).
//!
//! ```text
//!   Request ──> Lane::push ── Plan ──┬── Load ──┐         reads bitmaps that are not in memory
//!                              ^     │          │
//!                              ├─────┼──────────┘
//!                              └─────┼── AwaitGrowth      a new block for which the file has to grow, or a full file system
//!                                    v
//!                                  Move                   operations on parts of the request's own memory, then the marks
//!                                    ├── LoadForMark      reads bitmaps that were evicted meanwhile, then marks again
//!                                    ├── AwaitCommit      flushes; writes in write-through mode
//!                                    v
//!                                  Answer
//! ```
//!
//! A read whose bytes are in the page cache is a copy and needs no task (`cached_reads`). Sequential reads that wait for the
//! disk are prefetched (`readahead`). Discards and zeroing are cut into pieces; a disk punches one piece at a time (`punch`).
//!
//! A lane belongs to one thread. A read of known sectors writes no state that lanes share.
//!
//! Failures: `task_ops` evaluates a failed operation of a request, `lane` a failed commit or step of growth. If the host
//! is full, `lane` tries again each second. `stages` fails writes to a poisoned image. [`DiskCounters`] is in `shared`.

mod cached_reads;
mod early_writeback;
mod file_table;
pub mod group_commit;
mod job;
mod lane;
mod lost_names;
pub mod mailbox;
mod op_queue;
mod open;
mod options;
mod punch;
mod readahead;
mod request;
mod shared;
mod stages;
mod stalled_writes;
mod task;
mod task_ops;
mod task_table;

pub use crate::image::Allocation;
pub use lane::Lane;
pub use options::{DiskOptions, WhenFull};
pub use request::{Answer, Outcome, Request, Work, ZeroRange};
pub use shared::{Disk, DiskCounters};
