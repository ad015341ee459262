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

pub mod notifier;
pub mod blocking;
mod copy_nofault;
pub mod engine;
pub mod env;
pub mod folder;
pub mod host;
mod nowait;
pub mod shm;
pub mod op;
pub mod payload;
mod map_cache;
pub mod uring;
pub mod runtime_folder;
pub mod sigbus;
#[cfg(feature = "sim")]
pub mod sim;
pub mod space;
mod sqe;
mod transfer;
#[cfg(test)]
mod engine_tests;
mod reader;

pub use notifier::Notifier;
pub use copy_nofault::prefetch_line;
pub use engine::{Engine, FILE_SLOTS};
pub use env::{
    Access, DirectRules, EngineKind, Env, File, FileId, LockHolder, Lock, ModifiedTime, NameStatus, Origin, FilePresence, Stat,
};
pub use folder::Folder;
pub use shm::Shm;
pub use op::{Action, Completion, Op, FileSlot};
pub use payload::{Buffer, Payload, GuestIovecs};
pub use runtime_folder::RuntimeFolder;
pub use space::{FileSystemSpace, AllocationMode};
pub use reader::{CachedRange, MAX_COPY};
