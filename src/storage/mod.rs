//! Floor 0: the doors to the outside.
//!
//! Owns: every system call on files and names ([`mod@env`]), and the engines that carry out operations many at a time
//! ([`engine`]). Leaves to others: what the bytes mean, and in which order they must become durable.
//!
//! ```text
//!   image, chain, ops            disk
//!        |                        |  push(Op) .. submit() .. reap()
//!        v                        v
//!   Env ── Folder ── File   Engine (one a thread)
//!    |  open, names, clock    |
//!    |                        ├── ring      io_uring, one call a batch; none for what the host has in memory
//!    ├── host  Linux          ├── blocking  preadv, pwritev, one call an operation
//!    └── sim   one seed       └── sim       any order, torn sectors, faults
//! ```
//!
//! Only positional I/O is used: there is no file position to share. Reads of what the host has in memory are copies from
//! mapped files (`warm`).

pub mod blocking;
mod copy_nofault;
pub mod engine;
#[cfg(test)]
mod engine_tests;
pub mod env;
pub mod folder;
mod holes;
pub mod host;
mod map_cache;
pub mod notifier;
mod nowait;
pub mod op;
pub mod payload;
mod reader;
pub mod runtime_folder;
pub mod shm;
pub mod sigbus;
#[cfg(feature = "sim")]
pub mod sim;
pub mod space;
mod sqe;
mod transfer;
pub mod uring;

pub use copy_nofault::prefetch_line;
pub use engine::{Engine, FILE_SLOTS};
pub use env::{
    Access, DirectRules, EngineKind, Env, File, FileId, FilePresence, Lock, LockHolder, ModifiedTime, NameStatus,
    Origin, Stat,
};
pub use folder::Folder;
pub use holes::{is_seek_unsupported, is_zero, next_data};
pub use notifier::Notifier;
pub use op::{Action, Completion, FileSlot, Op};
pub use payload::{Buffer, GuestIovecs, Payload};
pub use reader::{CachedRange, MAX_COPY};
pub use runtime_folder::RuntimeFolder;
pub use shm::Shm;
pub use space::{AllocationMode, FileSystemSpace};
