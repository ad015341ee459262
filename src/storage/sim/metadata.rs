//! Metadata of a simulated file: modification time and extended attributes.
//!
//! A power cut restores the metadata of the last `sync_all`. This is the harshest reading of fdatasync(2), which may
//! but need not write metadata.

use std::collections::BTreeMap;

use crate::storage::types::ModifiedTime;

#[derive(Clone, Debug)]
struct MetadataState {
    modified: ModifiedTime,
    attributes: BTreeMap<String, Vec<u8>>,
}

/// Metadata of a file: current and durable.
#[derive(Clone, Debug)]
pub(super) struct InodeMetadata {
    now: MetadataState,
    durable: MetadataState,
    /// Time of the last change of bytes, regardless of later calls of `set_modified`.
    latest: ModifiedTime,
}

impl Default for InodeMetadata {
    fn default() -> InodeMetadata {
        InodeMetadata::new(0)
    }
}

impl InodeMetadata {
    /// Creates the metadata of a file that is created at `seconds`.
    pub(super) fn new(seconds: i64) -> InodeMetadata {
        let state = MetadataState { modified: ModifiedTime { seconds, nanos: 0 }, attributes: BTreeMap::new() };
        InodeMetadata { latest: state.modified, now: state.clone(), durable: state }
    }

    pub(super) fn modified(&self) -> ModifiedTime {
        self.now.modified
    }

    /// Updates the modification time after a change of bytes. The new time is later than every previous one, as if a
    /// nanosecond had passed.
    pub(super) fn touch(&mut self, clock: i64) {
        let ModifiedTime { seconds, nanos } = self.latest.max(self.now.modified);
        self.latest = match nanos.checked_add(1).filter(|nanos| *nanos < 1_000_000_000) {
            Some(nanos) => ModifiedTime { seconds, nanos },
            None => ModifiedTime { seconds: seconds + 1, nanos: 0 },
        };
        self.latest = self.latest.max(ModifiedTime { seconds: clock, nanos: 0 });
        self.now.modified = self.latest;
    }

    pub(super) fn set_modified(&mut self, time: ModifiedTime) {
        self.now.modified = time;
    }

    pub(super) fn attribute(&self, name: &str) -> Option<&[u8]> {
        self.now.attributes.get(name).map(Vec::as_slice)
    }

    pub(super) fn set_attribute(&mut self, name: &str, value: Option<&[u8]>) {
        match value {
            Some(value) => drop(self.now.attributes.insert(name.to_owned(), value.to_vec())),
            None => drop(self.now.attributes.remove(name)),
        }
    }

    /// Makes the metadata durable.
    pub(super) fn sync(&mut self) {
        self.durable = self.now.clone();
    }

    pub(super) fn after_crash(&self) -> InodeMetadata {
        InodeMetadata { now: self.durable.clone(), ..self.clone() }
    }
}
