//! diffdisk serves chains of differencing VHDs to virtual machines.

pub mod cli;
pub mod device;
pub mod disk;
pub mod error;
pub mod storage;
pub mod units;
pub mod vhost;
