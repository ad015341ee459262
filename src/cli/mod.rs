//! Floor 7: the command line of both programs.
//!
//! This floor contains arguments, output, exit codes, error lines, and the start of the daemon. The floors below do the
//! work.
//!
//! ```text
//!   diffdisk    tool ──> images, settle ──> ops
//!                │         │  └───────────> progress   a progress bar on a terminal
//!               args       ├──────────────> output     text by print: for people, or JSON
//!                          └─ ctl ──> control          the verb `ctl` (ctl_args, ctl_print, ...)
//!   diffdiskd   serve ──> start ──> vhost
//!                │  ├───> handover       sockets of the starting process (inherited_fd, systemd)
//!                │  └───> serve_control  the control socket
//!               serve_args, disk_args
//!   both        exit, signals, size, log_level, system_config, runtime_dir
//! ```

mod args;
mod ctl;
mod ctl_args;
mod ctl_print;
mod ctl_snapshot_args;
mod ctl_stats;
mod disk_args;
mod exit;
mod handover;
mod images;
mod inherited_fd;
mod log_level;
mod output;
mod print;
mod progress;
mod runtime_dir;
pub mod serve;
mod serve_args;
mod serve_control;
mod settle;
mod signals;
mod size;
mod start;
mod system_config;
mod systemd;
pub mod tool;

pub use inherited_fd::InheritedFds;
