//! The daemon on real file systems and failing media: power cuts, full disks, I/O errors, slow disks (crash-safety 5.2,
//! R7 to R10).
//!
//! The machinery of crash-safety 5.3: `fuse` is a medium that notes and misbehaves, `pages` its contents, `loopdev` puts
//! kernel file systems on it, `guest` knows what must be there afterwards. All of it needs root: elsewhere each test
//! says "skipped: needs root".
#![allow(unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;

mod alignment;
mod devices;
mod disk_full;
mod failing_device;
mod fence;
mod fuse;
#[path = "../common/fuse_file.rs"]
mod fuse_file;
mod guest;
mod loopdev;
mod pages;
mod power_cut;
mod space;
