//! Floor 1: one VHD file.
//!
//! Owns: opening with every rule held ([`open`]), creating, giving room to new blocks ([`growth`]), and the order in which
//! a write becomes durable ([`commit`]). Leaves to others: what a clear bit means (`chain`), who asks (`disk`).
//!
//! ```text
//!   open ──> Image                     sound, read-only: footer, header, block table
//!              │ Writable::new         lock, recover: footers whole, tail durably zero
//!              v
//!           Writable ── reserve ── (data is written) ── mark ──┐
//!              ^  │                                            v
//!              │  └── Growth: the tail, away from the guest  Commit: sync, pointers, sync
//!              │                                               │
//!              └───────────────────────────────────────────────┘
//!              │ trim                  the file ends behind its last block
//!              v
//!            closed
//!
//!   check ──> Report                  every rule, and what blocks say (walk); repair mends what needs no guess (undo keeps
//!                                    what it replaces)
//!           Offline            nobody else has it open: another size, fewer blocks, blocks elsewhere
//! ```

mod allocation;
mod apply_undo;
mod atomic_file;
pub mod bat;
mod batmap;
mod bitmap_frame;
pub mod bitmaps;
pub mod check;
mod check_blocks;
mod clock;
#[cfg(all(test, feature = "sim"))]
mod clock_tests;
pub mod commit;
pub mod compact;
pub mod create;
mod durability;
mod free_tail;
pub mod growth;
mod holes;
mod identity;
pub mod journal;
mod journal_id;
mod journal_replay;
mod lost;
mod mtime;
#[cfg(feature = "mutants")]
mod mutants;
pub mod offline;
mod offline_bat;
pub mod open;
mod pins;
mod preallocate;
mod recover;
mod repair;
pub mod reparent;
pub mod resize;
mod run_to_completion;
mod session;
pub mod session_state;
mod settle;
mod sparse_array;
mod stale_journals;
mod structures;
#[cfg(all(test, feature = "sim"))]
mod testing;
mod trim;
mod undo_file;
mod unrecognized;
pub mod writable;
mod writable_session;

pub use allocation::Allocation;
pub use apply_undo::undo_repair;
pub use atomic_file::{AtomicFile, is_temporary_name};
pub use bat::Bat;
pub use batmap::Batmap;
pub use check::{Report, check, check_with_progress};
pub use check_blocks::Suspects;
pub use commit::{Commit, JobStep};
pub use compact::{OnProgress, punch_unwritten};
pub use create::{ImageKind, ImageSpec, ParentLink, create, create_preallocated, file_name, folder_of, write_new};
pub use durability::Durability;
pub use growth::Growth;
pub use holes::{is_zero, next_data};
pub use identity::ImageIdentity;
pub use journal::BYTES as JOURNAL_BYTES;
pub use lost::merge_ranges;
pub use mtime::SavedMtime;
pub use offline::Offline;
pub use open::Image;
pub use pins::Pins;
pub use repair::{FooterChoice, repair};
pub use reparent::{check_reparent, is_reparent_finished, open_reconciled, reparent};
pub use resize::ExposedSectors;
pub use run_to_completion::run_to_completion;
pub use session_state::{SessionState, discard_session, refuse_if_file_is_live, refuse_if_live};
pub use settle::settle;
pub use sparse_array::SparseArray;
pub use stale_journals::remove_stale_journals;
pub use writable::{NeedsGrowth, Writable};
