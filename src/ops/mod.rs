//! Floor 4: the verbs on images that nobody serves.
//!
//! Owns: what `create`, `info`, `check`, `map`, `convert` and `compare` do, as functions that return values. Leaves to
//! others: words, screens and exit codes (`cli`), requests of guests (`device`), one image's order of writes (`image`).
//!
//! ```text
//!   create   info   check        map      convert   compare
//!      |       |      |           |          |         |
//!      |       |      |           └── mover: a disk as runs, read past its holes
//!      v       v      v                      |
//!    image and chain <───────────────────────┘
//! ```
//!
//! What reads data takes shared locks, so it is refused while a daemon writes; `info` takes none.
//! The reports serialise under the names that `--json` promises.

mod alone;
pub mod check;
pub mod compact;
pub mod compare;
pub mod convert;
mod copy_up;
pub mod create;
pub mod flatten;
pub mod info;
mod kin;
pub mod map;
pub mod merge;
mod mover;
pub mod rebase;
pub mod resize;
mod sink;
mod writer;

pub use mover::{Disk, Format, Progress};
