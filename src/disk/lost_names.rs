//! The names of served files. A file that is removed, renamed or replaced while it is served stays open, so nothing fails
//! until the daemon ends: then its data is gone, or the next start finds another file. The log warns once for each file.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use super::Disk;
use crate::storage::{FileSlot, NameStatus};

/// Files whose names were lost and reported.
#[derive(Debug, Default)]
pub(super) struct LostNames(Mutex<BTreeSet<FileSlot>>);

impl Disk {
    /// Looks up the name of each file of the chain, and warns of those that no longer lead to it.
    pub fn check_names(&self) {
        let mut lost = self.lost_names.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, file) in self.version.files().filter(|(slot, _)| !lost.contains(slot)).collect::<Vec<_>>() {
            match file.name_status() {
                Ok(NameStatus::Kept) => {}
                Ok(naming) => {
                    lost.insert(slot);
                    log::warn!("{}: {}", file.path().display(), describe(naming));
                }
                // An unreachable folder comes back, or the disk itself fails.
                Err(e) => log::debug!("{}", e.line()),
            }
        }
    }
}

fn describe(naming: NameStatus) -> String {
    match naming {
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
