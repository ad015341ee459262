//! Floor 7: human words. Arguments, printing, exit codes, and the wiring of the daemon.

mod adopt;
pub mod serve;
mod serve_args;
mod systemd;
