//! Progress of a long operation, as a bar if standard error is a terminal, and interruption of the operation by a
//! signal.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::{Error, ErrorKind, Result};

/// The progress bar and the interrupt flag of an operation over a known number of bytes.
pub(super) struct ProgressDisplay {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl ProgressDisplay {
    /// Shows the progress of an operation over `bytes`. From now on SIGINT and SIGTERM interrupt the operation at its
    /// next call of [`ProgressDisplay::report`].
    ///
    /// # Errors
    /// `Io` if the signal handlers cannot be installed.
    pub(super) fn new(bytes: u64, quiet: bool) -> Result<ProgressDisplay> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // A second signal kills the program at once. A file with a temporary name may then remain.
            signal_hook::flag::register_conditional_default(signal, stop.clone())
                .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
                .map_err(|e| Error::io("cannot wait for signals", e))?;
        }
        let shown = !quiet && std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
        if !shown {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = "{bar:40} {percent:>3} %  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a template of known keys"));
        Ok(ProgressDisplay { bar, interrupted: stop })
    }

    /// Reports that `bytes` bytes in total are processed.
    ///
    /// # Errors
    /// `Refused` if the user interrupted the operation.
    pub(super) fn report(&self, bytes: u64) -> Result<()> {
        self.bar.set_position(bytes);
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Refused, "interrupted"));
        }
        Ok(())
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
