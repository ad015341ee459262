//! The verbs that change images, killed at every point and run again.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod points;
