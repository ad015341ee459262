//! Floor 1: one VHD file.
//!
//! Owns: opening with a check of every rule ([`open`]), creation, the allocation of new blocks ([`write::growth`]), and
//! the order in which a write becomes durable ([`commit`]). Leaves to others: the meaning of a clear bit (`chain`), and
//! the guest's requests (`disk`).
//!
//! ```text
//!   open ──> Image                     valid, read-only: footer, header, block table
//!              │ Writable::new         lock, recover: footers valid, free tail durably zero
//!              v
//!           Writable ── reserve ── (data is written) ── mark ──┐
//!              ^  │                                            v
//!              │  └── Growth: extends the free tail ahead    Commit: sync, pointers, sync
//!              │                                               │
//!              └───────────────────────────────────────────────┘
//!              │ trim                  cuts the file after its last block
//!              v
//!            closed
//!
//!   check ──> Report                   every rule, and the blocks' bitmaps; then repair, and undo of a repair
//!           Offline                    exclusively locked: changes of size, parent and places of blocks
//! ```

mod atomic_file;
pub mod bat;
mod batmap;
mod callbacks;
pub mod check;
pub mod create;
mod identity;
mod journal_id;
mod lost;
mod mtime;
pub mod offline;
pub mod open;
mod parent_record;
mod preallocate;
pub mod session_state;
mod sparse_array;
mod structures;
#[cfg(all(test, feature = "sim"))]
mod testing;
mod unrecognized;
pub mod write;

pub use atomic_file::{AtomicFile, is_temporary_name};
pub use bat::Bat;
pub use batmap::Batmap;
pub use check::apply_undo::undo_repair;
pub use check::check_image::{check, check_with_progress};
pub use check::repair::{FooterChoice, repair};
pub use check::report::{Report, Suspects};
pub use create::{ImageKind, ImageSpec, ParentLink, create, create_preallocated, file_name, folder_of, write_new};
pub use identity::ImageIdentity;
pub use lost::merge_ranges;
pub use mtime::SavedMtime;
pub use offline::compact::punch_unwritten;
pub use offline::offline_image::Offline;
pub use offline::reparent::{self, check_reparent, is_reparent_finished, open_reconciled, reparent};
pub use offline::resize::{ExposedSectors, check_size, grow_image};
pub use open::Image;
pub use session_state::{
    SessionState, refuse_if_file_is_live, refuse_if_live, refuse_if_on_other_machine, refuse_unless_replayable,
};
pub use sparse_array::SparseArray;
pub use write::allocation::Allocation;
pub use write::commit::Commit;
pub use write::discard_session::{discard_session, remove_journal_of};
pub use write::durability::Durability;
pub use write::gauges::WritableGauges;
pub use write::growth::Growth;
pub use write::job_step::JobStep;
pub use write::journal_layout::BYTES as JOURNAL_BYTES;
pub use write::pins::Pins;
pub use write::run_to_completion::run_to_completion;
pub use write::settle::settle;
pub use write::stale_journals::remove_stale_journals;
pub use write::writable::{NeedsGrowth, Writable};
pub use write::{commit, journal};

pub use crate::storage::{is_zero, next_data};
