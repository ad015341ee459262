//! The verbs that change images, killed at every point and run again.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod compact;
mod convert;
mod drafts;
mod flatten;
mod listing;
mod merge;
mod merge_scenes;
mod merge_worlds;
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
