//! Floor 4: the verbs of `diffdisk`, on images that no daemon serves.
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
//! A verb that changes an image locks the image exclusively and locks its parents against writers (`open_exclusive`).
//! The image is valid at every moment. If a verb is interrupted, the same call completes the work.
//!
//! A verb that reads data takes shared locks, so the verb is refused while a daemon has the image open for writing.
//! `info` and `children` take no lock. The serialized field names of reports are the documented keys of `--json`.

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
