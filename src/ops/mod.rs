//! Floor 4: the verbs on images that nobody serves.
//!
//! Owns: what the verbs of the tool do, as functions that return values. Leaves to others: words, screens and exit codes
//! (`cli`), requests of guests (`device`), one image's order of writes (`image`).
//!
//! ```text
//!   create info check diff   map  convert  compare     flatten  rebase  merge     resize  compact
//!   children  |    |    |    |     |        |           |        |      |          |        |
//!      |     |    |    |      └─ mover: a disk as runs   └─ copy_up      |          |        |
//!      |     |    |    |         past its holes              └─ writer ──┘          |        |
//!      v     v    v    v           |                          |                  v        v
//!    image and chain <─────────────┴──────────────────────────┘             image::Offline
//! ```
//!
//! What changes an image takes it for itself, with its parents only to be read, and is valid at every moment: a verb that
//! was ended is called again and goes on.
//!
//! What reads data takes shared locks, so it is refused while a daemon writes; `info` takes none.
//! The reports serialise under the names that `--json` promises.

// The verbs.
pub mod check;
pub mod children;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod create;
pub mod diff;
pub mod flatten;
pub mod info;
pub mod map;
pub mod merge;
pub mod rebase;
pub mod resize;
pub mod salvage;
pub mod settle;

// What they share.
mod copy_up;
mod device_sink;
mod extents;
mod file_sink;
mod folder_scan;
mod image_writer;
mod open_exclusive;
mod parent_link;
mod source;
mod write_behind;
mod zero_scan;

pub use source::{Progress, SourceDisk, SourceFormat};
