//! Floor 4: the verbs on images that nobody serves.
//!
//! Owns: what `create`, `info`, `check`, `map`, `convert`, `compare` and `merge` do, as functions that return values.
//! Leaves to others: words, screens and exit codes (`cli`), requests of guests (`device`), one image's order of writes
//! (`image`).
//!
//! ```text
//!   create   info   check        map   convert   compare   merge ── kin: whose child is what
//!      |       |      |           |       |         |        |
//!      |       |      |           └── mover: a disk as runs, read past its holes
//!      v       v      v                   |         |        |
//!    image and chain <────────────────────┴─────────┴────────┘
//! ```
//!
//! What reads data takes shared locks, so it is refused while a daemon writes; `info` takes none.
//! The reports serialise under the names that `--json` promises.

pub mod check;
pub mod compare;
pub mod convert;
pub mod create;
pub mod info;
mod kin;
pub mod map;
pub mod merge;
mod mover;
mod sink;
mod writer;

pub use mover::{Disk, Format, Progress};
