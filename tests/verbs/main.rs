//! The verbs that change images, killed at every point and run again.

#[path = "../common/mod.rs"]
mod common;
mod merge;
mod merge_scenes;
mod merge_worlds;
mod points;
mod scenes;
