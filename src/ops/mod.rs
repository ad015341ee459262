//! Floor 4: the verbs of `diffdisk`. Most of them refuse images that a daemon has open for writing.
//!
//! This floor contains each verb as a function that returns a value. Other floors contain arguments, printing and exit
//! codes (`cli`), requests of guests (`device`), and the order of writes to one image (`image`).
//!
//! ```text
//!   create  info  check  children  settle  diff  ────────────────────────────────> image, chain
//!   map  ──────────────────────> extents ────────────────────────────────────────> chain
//!   compare  salvage  ─────────> source ──> extents, zero_scan
//!   convert  ──────────────────> source, file_sink ──> image_writer,  device_sink
//!   flatten  rebase  ──────────> copy_up ──> extents, image_writer
//!   merge  ────────────────────> merge/copy_down ──> extents, image_writer
//!   compact  resize  ────────────────────────────────────────────────────────────> image::Offline
//! ```
//!
//! `compact`, `resize`, `flatten` and `rebase` lock the image exclusively (`open_exclusive`), and lock against writers
//! the parents that they read. `merge` locks the merged layers against writers, and the children of CHILD and (while
//! data is copied) the receiver exclusively. `settle` and `check --repair` lock only the file that they change,
//! exclusively; `check --undo` also locks the undo file. An interrupted verb leaves a valid image valid, except for
//! `check --undo`, which restores defects. The same call completes the work.
//!
//! A verb that only reads data takes shared locks, so the verb is refused while a daemon has the image open for
//! writing. `create` takes shared locks on the parents of a new child, and `convert` locks a file that it replaces
//! exclusively. `info` and `children` take no lock. The serialized field names of reports are the documented keys of
//! `--json`.

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

// Modules that several verbs share.
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
