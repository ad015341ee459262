//! What a simulated file has besides its bytes: the time of their last change, and attributes.
//!
//! Both are durable only after a `sync_all`: a power cut brings back those of the last one. The harshest reading of
//! fdatasync(2), which need not write them.

use std::collections::BTreeMap;

use crate::storage::env::ModifiedTime;

#[derive(Clone, Debug)]
struct State {
    modified: ModifiedTime,
    attributes: BTreeMap<String, Vec<u8>>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct InodeMetadata {
    now: State,
    durable: State,
    /// The time of the last change of bytes, whatever was set since.
    latest: ModifiedTime,
}

impl Default for InodeMetadata {
    fn default() -> InodeMetadata {
        InodeMetadata::new(0)
    }
}

impl InodeMetadata {
    /// Those of a file that is made at a time.
    pub(super) fn new(seconds: i64) -> InodeMetadata {
        let state = State { modified: ModifiedTime { seconds, nanos: 0 }, attributes: BTreeMap::new() };
        InodeMetadata { latest: state.modified, now: state.clone(), durable: state }
    }

    pub(super) fn modified(&self) -> ModifiedTime {
        self.now.modified
    }

    /// A change of bytes: later than any before it, as if a nanosecond had passed.
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

    /// Makes them durable.
    pub(super) fn sync(&mut self) {
        self.durable = self.now.clone();
    }

    pub(super) fn after_crash(&self) -> InodeMetadata {
        InodeMetadata { now: self.durable.clone(), ..self.clone() }
    }
}
