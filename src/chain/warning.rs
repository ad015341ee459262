//! Logs each warning about a chain once in a process: a verb may open a chain several times, and disks may share
//! parents.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

static WRITTEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Logs a warning, unless the process has already logged the same text.
pub(super) fn once(text: String) {
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    if !written.contains(&text) {
        log::warn!("{text}");
        written.insert(text);
    }
}
