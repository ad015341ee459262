//! A simulated host for crash tests: torn writes, lost names, injected faults, and any order of completions. A run is
//! reproducible from its seed.
//!
//! What survives the end of a machine is a choice among *units* ([`DurableUnit`]): each sector, each length and each
//! name that changed since it was last made durable, and each sector of the operations in flight.
//! [`SimHost::crash_with`] takes any choice, [`SimHost::crash`] draws one from a [`Random`]. [`SimHost::kill`] ends
//! only the process: completed operations stay, and each operation in flight may or may not have happened. Each of them
//! returns a new host, on which old handles do not exist. After a `crash` or `kill` every call on the old host fails.
//!
//! The model is harsher than ext4, XFS and btrfs: a new length may survive without the bytes that caused it, a punched
//! sector may come back, and an fsync of a file does not make its name durable. The model is kinder in two respects: a
//! sector is either old or new (unless [`SimHost::crash_torn`] tears it), and a rename is either done or not.
//!
//! Operations of a simulated engine complete in `reap` (some or, in the order [`CompletionOrder::Pushed`], all), in
//! `wait` (at least one), and when the engine is dropped (all), never on their own. The engine has no descriptor to
//! wait on: its user calls `wait` while operations are outstanding.
//!
//! ```text
//!   env  inspect                           Env; observation by tests
//!   host  crash                            SimHost: crashes, kills, faults
//!   engine  page_cache                     handles on the machine
//!   runtime_folder  folder  file           likewise
//!   shared                                 the lock around the machine
//!   machine                                state of the machine; steps, faults, space, locks
//!   inode  metadata  names  torn_write     files and names: current, durable, and the changes between
//!   types                                  plain data
//! ```

mod crash;
mod engine;
mod env;
mod file;
mod folder;
mod host;
mod inode;
mod inspect;
mod machine;
mod metadata;
mod names;
mod page_cache;
mod runtime_folder;
mod shared;
#[cfg(test)]
mod sim_tests;
mod torn_write;
mod types;

pub use self::host::SimHost;
pub use self::torn_write::Tear;
pub use self::types::{CompletionOrder, DurableUnit, Fault, FaultPlan, StepCounts};
pub use crate::random::Random;
