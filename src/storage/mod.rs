//! Floor 0: access to everything outside the process.
//!
//! Contains every system call on files and names ([`mod@env`]), and the engines, which carry out many operations
//! concurrently ([`mod@engine`]). Other modules define the meaning of the bytes and the order in which they become
//! durable.
//!
//! ```text
//!   image, chain, ops            disk
//!        |                        |  push(Op) .. submit() .. reap();  PageCache: find() .. copy()
//!        v                        v
//!   Env ── Folder ── File      Engine (one per thread)
//!        |                        |
//!        |                        ├── uring     io_uring: one call per batch; none for reads from the page cache
//!        ├── host  Linux          ├── blocking  preadv, pwritev: one call per operation
//!        └── sim   one seed       └── sim       any order, torn sectors, faults
//! ```
//!
//! The interfaces do not depend on their implementations:
//!
//! ```text
//!   host/env, sim/env                                        implement Env
//!   uring, blocking, sim/engine                              implement Engine
//!   pagecache/reader, sim/page_cache                         implement PageCache
//!   host/{file, folder, ..}, sim/{file, folder, ..}          implement File and Folder
//!   -------------------------------------------------------------------------------------------
//!   env, engine                                              interfaces
//!   backend, file, folder, runtime_folder                    handles on trait objects
//!   op, payload, shm, types, sigbus, notifier, prefetch,
//!   timestamp                                                data, memory, signals, the processor's counter
//! ```
//!
//! All I/O is positional: no code depends on the position of a file. With the io_uring engine, reads of resident
//! pages are copies from mapped files (`pagecache/`), without system calls.

mod backend;
pub mod blocking;
pub mod engine;
#[cfg(test)]
mod engine_tests;
pub mod env;
mod file;
mod folder;
mod holes;
pub mod host;
pub mod notifier;
pub mod op;
mod pagecache;
pub mod payload;
mod prefetch;
pub mod runtime_folder;
pub mod shm;
pub mod sigbus;
#[cfg(feature = "sim")]
pub mod sim;
pub mod timestamp;
mod transfer;
pub mod types;
pub mod uring;

pub use backend::{File, Folder};
pub use engine::{Engine, PageCache};
pub use env::Env;
pub use holes::{is_seek_unsupported, is_zero, next_data};
pub use notifier::Notifier;
pub use op::{Action, Completion, FILE_SLOTS, FileSlot, Op};
pub use pagecache::range::{CachedRange, MAX_COPY};
pub use payload::{Buffer, GuestIovecs, Payload};
pub use prefetch::prefetch_line;
pub use runtime_folder::RuntimeFolder;
pub use shm::Shm;
pub use timestamp::{Timestamp, TimestampClock};
pub use types::{
    Access, AllocationMode, DirectRules, EngineKind, FileId, FilePresence, FileSystemSpace, Lock, LockHolder,
    ModifiedTime, NameStatus, Origin, Stat,
};
