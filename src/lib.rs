//! diffdisk serves chains of differencing VHDs to virtual machines.

pub mod chain;
pub mod cli;
pub mod device;
pub mod disk;
pub mod error;
pub mod format;
pub mod image;
pub mod mutant;
pub mod ops;
pub mod storage;
pub mod units;
pub mod vhost;
