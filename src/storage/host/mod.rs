//! The Linux host: files, folders, locks, clock and randomness.
//!
//! ```text
//!   env                                          Host: opens everything, creates engines
//!   folder  runtime_folder  lock_holder          over files
//!   file  direct  zeros  metadata  space         an open file, and its methods by topic
//!   shared_file_system
//!   lock  file_presence  origin  call            system calls
//! ```

mod call;
mod direct;
mod env;
pub(super) mod file;
mod file_presence;
mod folder;
mod lock;
mod lock_holder;
mod metadata;
mod origin;
mod runtime_folder;
mod shared_file_system;
mod space;
mod zeros;

pub use self::env::Host;
