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

pub mod check;
pub mod children;
pub mod compact;
pub mod compare;
pub mod convert;
mod copy_up;
pub mod create;
mod device_sink;
pub mod diff;
mod file_sink;
pub mod flatten;
mod folder_scan;
mod image_writer;
pub mod info;
pub mod map;
pub mod merge;
mod open_exclusive;
pub mod rebase;
pub mod resize;
pub mod salvage;
pub mod settle;
mod source;
mod write_behind;

pub use source::{Progress, SourceDisk, SourceFormat};
