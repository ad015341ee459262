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

pub mod bat;
mod batmap;
pub mod bitmaps;
pub mod check;
pub mod commit;
pub mod compact;
pub mod create;
mod draft;
mod drive;
mod evict;
#[cfg(all(test, feature = "sim"))]
mod evict_tests;
mod fit;
mod glance;
mod granule;
mod held;
mod holes;
pub mod journal;
mod keep;
mod kept_time;
mod lost;
#[cfg(feature = "mutants")]
mod mistakes;
pub mod offline;
pub mod open;
mod paged;
mod recover;
pub mod relink;
mod repair;
pub mod resize;
#[cfg(all(test, feature = "sim"))]
mod rig;
mod session;
mod settle;
mod stamping;
pub mod standing;
mod strange;
mod structures;
mod sweep;
mod table;
pub mod tail;
mod take_in;
mod undo;
mod undone;
mod walk;
pub mod writable;

pub use bat::Bat;
pub use batmap::Batmap;
pub use check::{Report, check, check_watched};
pub use commit::{Commit, Step};
pub use compact::{Watch, give_back};
pub use create::{Kind, ParentLink, Spec, create, file_name, folder_of, write_new};
pub use draft::{Draft, is_fresh_name};
pub use drive::drive;
pub use glance::Glance;
pub use held::Held;
pub use holes::{is_zero, next_data};
pub use journal::BYTES as JOURNAL_BYTES;
pub use keep::Keep;
pub use kept_time::KeptTime;
pub use lost::joined;
pub use offline::Offline;
pub use open::Image;
pub use paged::Paged;
pub use relink::{agreed, check_link, is_settled, relink};
pub use repair::{Take, repair};
pub use resize::Shining;
pub use settle::settle;
pub use standing::{Standing, discard, refuse_if_live, refuse_live_file};
pub use sweep::sweep;
pub use tail::Growth;
pub use undone::undo;
pub use walk::Suspects;
pub use writable::{NoRoom, Writable};
