//! diffdisk serves chains of differencing VHDs to virtual machines.

pub mod device;
pub mod error;
pub mod storage;
pub mod units;
