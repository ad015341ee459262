//! Support of the integration tests: running the two programs, a vhost-user client, golden images, patterns, random
//! numbers, temporary files, a byte-level VHD builder without `diffdisk::format`, the Linux guest, and other readers of
//! VHD.
//!
//! Most test targets compile this module and use a part of it. The others include single files of this folder.
#![allow(dead_code, unreachable_pub)]

pub(crate) mod chain;
pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod digest;
pub(crate) mod failpoints;
pub(crate) mod frontend;
pub(crate) mod golden;
pub(crate) mod guest;
pub(crate) mod oracle;
pub(crate) mod pattern;
pub(crate) mod rng;
pub(crate) mod temp;
pub(crate) mod tool;
pub(crate) mod vhd_bytes;
