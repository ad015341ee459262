//! The versions that a lane uses: the current one, and older ones whose operations are still in flight.

use std::sync::Arc;

use super::served_version::ServedVersion;

/// The versions that a lane uses. A request plans with the current version, and completes with the version of its plan.
pub(super) struct LaneVersions {
    current: Arc<ServedVersion>,
    /// Older versions, oldest first. Usually there are none.
    old: Vec<Arc<ServedVersion>>,
    /// The current version, and the oldest one in use, as the lane reported them last.
    reported: (u32, u32),
}

impl LaneVersions {
    pub(super) fn new(current: Arc<ServedVersion>) -> LaneVersions {
        let reported = (current.epoch(), current.epoch());
        LaneVersions { current, old: Vec::new(), reported }
    }

    /// The version with which new requests are planned.
    #[inline]
    pub(super) fn current(&self) -> &ServedVersion {
        &self.current
    }

    /// The version with the number `epoch`, which the lane has adopted and which a task or job still uses.
    #[inline]
    pub(super) fn of(&self, epoch: u32) -> &ServedVersion {
        if epoch == self.current.epoch() {
            return &self.current;
        }
        self.old.iter().find(|v| v.epoch() == epoch).expect("a version is kept while operations use it")
    }

    /// Plans with another version from now on. The version before it is kept until [`LaneVersions::drop_before`].
    pub(super) fn adopt(&mut self, new: Arc<ServedVersion>) {
        debug_assert!(new.epoch() >= self.current.epoch(), "versions are published in order");
        if new.epoch() != self.current.epoch() {
            self.old.push(std::mem::replace(&mut self.current, new));
        }
    }

    /// Whether older versions are kept.
    #[inline]
    pub(super) fn has_old(&self) -> bool {
        !self.old.is_empty()
    }

    /// Records a report of the current version and the oldest one in use. Returns whether the report differs from the
    /// last one.
    pub(super) fn note_report(&mut self, oldest: u32) -> bool {
        let report = (self.current.epoch(), oldest);
        std::mem::replace(&mut self.reported, report) != report
    }

    /// Drops the versions that are older than `oldest`. No operation in flight uses them.
    pub(super) fn drop_before(&mut self, oldest: u32) {
        self.old.retain(|version| version.epoch() >= oldest);
    }
}
