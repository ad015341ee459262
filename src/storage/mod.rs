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

pub mod bell;
pub mod blocking;
mod copy;
pub mod engine;
pub mod env;
pub mod folder;
pub mod host;
mod inline;
pub mod live;
pub mod op;
pub mod payload;
mod recent;
pub mod ring;
pub mod runtime;
pub mod sigbus;
#[cfg(feature = "sim")]
pub mod sim;
pub mod space;
mod sqe;
mod transfer;
#[cfg(test)]
mod twins;
mod warm;

pub use bell::Bell;
pub use copy::fetch_line;
pub use engine::{Engine, SLOTS};
pub use env::{
    Access, DirectRules, EngineKind, Env, File, FileId, Holder, Lock, Modified, Naming, Origin, Presence, Stat,
};
pub use folder::Folder;
pub use live::Live;
pub use op::{Action, Completion, Op, Slot};
pub use payload::{Buffer, Payload, Slices};
pub use runtime::Runtime;
pub use space::{HostRoom, RoomRule};
pub use warm::{Found, MOST_COPIED};
