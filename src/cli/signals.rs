//! Signal handlers: for the signals that stop the daemon, and for SIGXFSZ, which must not kill a program.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::{Error, Result};

/// The two ends of the socket by which signals, and the control socket, stop the daemon.
pub(super) struct StopSocket {
    /// Becomes readable when the daemon has to stop. No thread reads this end, so it stays readable for every thread
    /// that polls it.
    pub(super) stop: Arc<UnixStream>,
    raised: UnixStream,
}

impl StopSocket {
    /// Returns a function that stops the daemon as a signal does.
    ///
    /// # Errors
    /// `Io` if the process has no file descriptors left.
    pub(super) fn stopper(&self) -> Result<impl Fn() + Send + Sync + 'static> {
        let cannot = |e| Error::io("cannot prepare the end of the daemon", e);
        let raised = self.raised.try_clone().map_err(cannot)?;
        raised.set_nonblocking(true).map_err(cannot)?;
        // The write fails only if the socket is full, and then `stop` is readable already.
        Ok(move || drop((&raised).write(&[0])))
    }
}

/// Creates a socket that becomes readable at the first SIGTERM, SIGINT or SIGHUP. If the process inherited SIGHUP as
/// ignored (`nohup`), SIGHUP stays ignored.
///
/// # Errors
/// `Io` if the sockets cannot be created or a handler cannot be installed.
pub(super) fn stop_socket() -> Result<StopSocket> {
    let cannot = |e| Error::io("cannot install signal handlers", e);
    let (stop, raised) = UnixStream::pair().map_err(cannot)?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        if signal == libc::SIGHUP && is_ignored(&status, signal) {
            continue;
        }
        let end = raised.try_clone().map_err(cannot)?;
        signal_hook::low_level::pipe::register(signal, end).map_err(cannot)?;
    }
    Ok(StopSocket { stop: Arc::new(stop), raised })
}

/// Catches SIGXFSZ, so that a write beyond the file size limit (`ulimit -f`) fails with EFBIG instead of killing the
/// process.
pub(super) fn survive_file_size_limit() {
    if let Err(e) = signal_hook::flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false))) {
        log::warn!("cannot catch SIGXFSZ, so a write beyond the file size limit will kill the process: {e}");
    }
}

/// Returns whether a process ignores a signal, given the text of its status file (proc_pid_status(5)).
fn is_ignored(status: &str, signal: i32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, libc::SIGHUP) && is_ignored(status, libc::SIGPIPE));
        assert!(!is_ignored(status, libc::SIGTERM) && !is_ignored("", libc::SIGHUP));
    }
}
