//! Tests of the verbs: their results, and kills at the failpoints of verbs that write files, each followed by a second
//! run of the verb.

mod chain_spec;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod compact;
mod convert;
mod drafts;
mod exchange;
mod failpoints;
mod fixture;
mod flatten;
mod foreign_images;
mod kill_cases;
mod listing;
mod merge;
mod merge_abandon;
mod merge_cases;
mod merge_pending;
mod merge_sim;
mod parent_time;
mod qemu_size;
mod rebase;
mod resize;
mod sequences;
mod sweep;
mod truncation;
mod undo;
mod xenserver;
