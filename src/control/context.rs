//! What the methods read and change: the daemon, as the command line started it.

use std::sync::Arc;
use std::time::Duration;

use super::event_hub::EventHub;
use super::registry::DiskRegistry;

/// A function that starts the end of the daemon and returns. If a time is given, the daemon exits after this time even
/// if its storage does not respond.
pub type ShutdownRequest = Box<dyn Fn(Option<Duration>) + Send + Sync>;

/// The daemon.
pub struct ControlContext {
    /// Version of the program.
    pub version: &'static str,
    /// The disks.
    pub disks: Arc<DiskRegistry>,
    /// The events of the disks.
    pub events: Arc<EventHub>,
    /// Ends the daemon.
    pub shutdown: ShutdownRequest,
}
