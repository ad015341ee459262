//! The daemon on real file systems and failing media: power cuts, full disks, I/O errors, slow disks (crash-safety 11,
//! R7 to R10).
//!
//! The test support of crash-safety 11.2: `fuse` is a medium that logs, delays and fails requests, `pages` stores the
//! contents of the medium, `loopdev` makes kernel file systems on the medium, `guest` checks the guest's disk
//! afterwards. Tests that mount a file system need root; without root such a test prints "skipped: needs root".
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
