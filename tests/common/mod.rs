//! What integration tests share: the two programs, chains to try them on, the Linux guest, and programs by others.
//!
//! Each test binary takes what it needs, so the rest counts as unused in it.
#![allow(dead_code, unreachable_pub)]

pub mod chain;
pub mod daemon;
pub mod guest;
pub mod oracle;
pub mod random;
pub mod tool;
