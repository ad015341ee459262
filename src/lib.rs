//! diffdisk serves chains of differencing VHDs to virtual machines.

pub mod error;
pub mod format;
pub mod storage;
pub mod units;
