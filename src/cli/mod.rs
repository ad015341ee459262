//! Floor 7: human words.
//!
//! Owns: arguments, what is printed, exit codes, the one line of a failure, and the wiring of the daemon. Leaves to
//! others: everything that is done.
//!
//! ```text
//!   diffdisk    args ──> images ──> ops
//!                size      │ └────> progress   a bar, on a terminal only
//!                          └──────> print      people, or JSON
//!   diffdiskd   serve_args ──> serve ──> start ──> vhost
//!                 disk_args     ├── handover   sockets of the starting process (inherited, systemd)
//!                               └── signals    what ends the daemon
//!   both        system_config, runtime
//! ```

mod args;
mod disk_args;
mod exit;
mod handover;
mod images;
mod inherited_fd;
mod output;
mod print;
mod progress;
mod runtime_dir;
pub mod serve;
mod serve_args;
mod settle;
mod signals;
mod size;
mod start;
mod system_config;
mod systemd;
pub mod tool;

pub use inherited_fd::InheritedFds;
