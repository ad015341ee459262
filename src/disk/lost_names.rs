//! Detection of served files whose names are lost. A file that is removed, renamed or replaced while it is served stays
//! open, so nothing fails until the daemon ends. Then the data of a removed file is gone, or the next start opens
//! another file under the same name. The log warns once for each file slot.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::storage::{File, FileSlot, NameStatus};

/// The file slots whose files the log has reported because the names no longer lead to the files.
#[derive(Debug, Default)]
pub(super) struct LostNames(Mutex<BTreeSet<FileSlot>>);

impl LostNames {
    /// Looks up the name of each file in a slot that was not reported yet, and warns of names that no longer lead to
    /// their file.
    pub(super) fn check<'a>(&self, files: impl Iterator<Item = (FileSlot, &'a File)>) {
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, file) in files {
            if lost.contains(&slot) {
                continue;
            }
            match file.name_status() {
                Ok(NameStatus::Kept) => {}
                Ok(status) => {
                    lost.insert(slot);
                    log::warn!("{}: {}", file.path().display(), describe(status));
                }
                // The folder may be unreachable for a while. If its storage fails, reads of the file fail, too.
                Err(e) => log::debug!("{}", e.line()),
            }
        }
    }
}

fn describe(status: NameStatus) -> String {
    match status {
        NameStatus::Kept => String::new(),
        NameStatus::Renamed => "the file was renamed or moved while it is served; the daemon still serves it".into(),
        NameStatus::Removed => format!(
            "the file was removed while it is served: its data is lost when the daemon ends. To save it, stop the guest's \
             writes and copy the file from /proc/{}/fd before the daemon ends",
            std::process::id()
        ),
        NameStatus::Replaced => format!(
            "another file was put in its place while it is served: the daemon still serves the old one, which may have no \
             other name than its entry in /proc/{}/fd; the next start takes the new one",
            std::process::id()
        ),
    }
}
