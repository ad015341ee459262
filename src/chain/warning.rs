//! Warnings about a chain, each once in a process: a verb may open a chain several times, and disks may share parents.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

static WRITTEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Logs a warning unless the process has logged the same one before.
pub(super) fn once(text: String) {
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    if !written.contains(&text) {
        log::warn!("{text}");
        written.insert(text);
    }
}
