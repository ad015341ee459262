//! The verbs that change images, killed at every point and run again.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod compact;
mod convert;
mod drafts;
mod exchange;
mod field;
mod flatten;
mod listing;
mod merge;
mod merge_abandon;
mod merge_pending;
mod merge_scenes;
mod merge_worlds;
mod parent_time;
mod points;
mod qemu_size;
mod rebase;
mod reshape;
mod resize;
mod scene;
mod scenes;
mod sequences;
mod sweep;
mod tap;
mod truncation;
mod undo;
