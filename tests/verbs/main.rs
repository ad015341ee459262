//! The verbs that change images, killed at every point and run again.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod compact;
mod convert;
mod drafts;
mod exchange;
mod foreign_images;
mod flatten;
mod listing;
mod merge;
mod merge_abandon;
mod merge_pending;
mod merge_cases;
mod merge_sim;
mod parent_time;
mod failpoints;
mod qemu_size;
mod rebase;
mod kill_cases;
mod resize;
mod fixture;
mod chain_spec;
mod sequences;
mod sweep;
mod xenserver;
mod truncation;
mod undo;
