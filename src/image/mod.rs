//! Floor 1: one VHD file.
//!
//! Owns: opening with every rule held ([`open`]), creating, giving room to new blocks ([`tail`]), and the order in which
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
pub mod bat;
mod batmap;
pub mod bitmaps;
pub mod check;
pub mod commit;
pub mod compact;
pub mod create;
mod atomic_file;
mod run_to_completion;
mod clock;
#[cfg(all(test, feature = "sim"))]
mod clock_tests;
mod journal_id;
mod identity;
mod bitmap_frame;
mod pins;
mod holes;
pub mod journal;
mod durability;
mod mtime;
mod lost;
#[cfg(feature = "mutants")]
mod mutants;
pub mod offline;
pub mod open;
mod sparse_array;
mod preallocate;
mod recover;
pub mod reparent;
mod repair;
pub mod resize;
#[cfg(all(test, feature = "sim"))]
mod testing;
mod free_tail;
mod session;
mod settle;
mod writable_session;
pub mod session_state;
mod unrecognized;
mod structures;
mod stale_journals;
mod offline_bat;
pub mod growth;
mod journal_replay;
mod trim;
mod undo_file;
mod apply_undo;
mod check_blocks;
pub mod writable;

pub use allocation::Allocation;
pub use bat::Bat;
pub use batmap::Batmap;
pub use check::{Report, check, check_with_progress};
pub use commit::{Commit, JobStep};
pub use compact::{OnProgress, punch_unwritten};
pub use create::{ImageKind, ParentLink, ImageSpec, create, create_preallocated, file_name, folder_of, write_new};
pub use atomic_file::{AtomicFile, is_temporary_name};
pub use run_to_completion::run_to_completion;
pub use identity::ImageIdentity;
pub use pins::Pins;
pub use holes::{is_zero, next_data};
pub use journal::BYTES as JOURNAL_BYTES;
pub use durability::Durability;
pub use mtime::SavedMtime;
pub use lost::merge_ranges;
pub use offline::Offline;
pub use open::Image;
pub use sparse_array::SparseArray;
pub use reparent::{open_reconciled, check_reparent, is_reparent_finished, reparent};
pub use repair::{FooterChoice, repair};
pub use resize::ExposedSectors;
pub use settle::settle;
pub use session_state::{SessionState, discard_session, refuse_if_live, refuse_if_file_is_live};
pub use stale_journals::remove_stale_journals;
pub use growth::Growth;
pub use apply_undo::undo_repair;
pub use check_blocks::Suspects;
pub use writable::{NeedsGrowth, Writable};
