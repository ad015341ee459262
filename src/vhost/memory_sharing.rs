//! Detects guest memory that is not shared with the daemon.
//!
//! If a front-end maps the guest's memory privately (QEMU without `share=on`), the daemon maps the same file but sees
//! none of the guest's stores: kicks arrive, the rings stay blank, and the guest waits without an error. One blank ring
//! proves nothing, since a front-end may kick empty rings. But if all rings of a connection are still blank seconds
//! after a kick, the daemon does not see the request for which the guest sent the kick.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Time from a kick to the warning. It contains several ticks of the workers, each of which may find that memory is
/// shared.
const WARN_AFTER: Duration = Duration::from_secs(3);

/// Advice for the user.
pub(super) const SHARE_HINT: &str = "Share it by share=on of the memory backend in QEMU, shared=on of --memory in \
     cloud-hypervisor, <access mode='shared'/> in libvirt";

/// The check of one connection. Its rings share it: a clone refers to the same state.
#[derive(Clone, Debug, Default)]
pub(super) struct SharingCheck(Arc<SharingState>);

#[derive(Debug, Default)]
struct SharingState {
    /// Whether the check is complete: a ring was not blank, so memory is shared, or the warning was logged.
    settled: AtomicBool,
}

impl SharingCheck {
    /// Records the state of a ring at `now`: the time of its first kick, and whether the ring is blank. Returns true at
    /// most once per connection, if the guest's memory does not seem to be shared.
    pub(super) fn should_warn(&self, kicked: Option<Instant>, now: Instant, is_blank: impl FnOnce() -> bool) -> bool {
        if self.0.settled.load(Ordering::Relaxed) {
            return false;
        }
        if !is_blank() {
            self.0.settled.store(true, Ordering::Relaxed);
            return false;
        }
        let overdue = kicked.is_some_and(|kicked| now.saturating_duration_since(kicked) >= WARN_AFTER);
        overdue && !self.0.settled.swap(true, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_rings_cause_one_warning_some_time_after_a_kick() {
        let (sharing, start) = (SharingCheck::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(!sharing.should_warn(None, later(100), || true), "a guest that does not kick yet");
        assert!(!sharing.should_warn(Some(later(100)), later(102), || true));
        assert!(sharing.should_warn(Some(later(100)), later(103), || true));
        assert!(!sharing.clone().should_warn(Some(later(100)), later(104), || true), "one warning for all rings");
    }

    #[test]
    fn a_ring_that_is_not_blank_suppresses_the_warning() {
        let (sharing, start) = (SharingCheck::default(), Instant::now());
        assert!(!sharing.clone().should_warn(None, start, || false));
        assert!(!sharing.should_warn(Some(start), start + WARN_AFTER * 2, || true), "an idle ring that was kicked");
    }
}
