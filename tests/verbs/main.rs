//! The verbs that change images, killed at every point and run again.

#[path = "../common/mod.rs"]
mod common;
mod points;
mod reshape;
mod resize;
mod scene;
mod sweep;
mod tap;
