//! Events of a served disk, and the reporter by which all floors report them.
//!
//! An event is reported where it happens: by `image`, `disk`, `vhost`, or a method of `control`. Only `control` receives events. The reporter
//! is a function that `control` makes and [`DiskOptions`](crate::disk::DiskOptions) carries down, so no floor imports a
//! higher one.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

/// A change in the state of a served disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskEvent {
    /// A front-end connected or disconnected.
    FrontEnd {
        /// Whether a front-end is connected now.
        connected: bool,
        /// Process id of the front-end, if the kernel reports it.
        pid: Option<i32>,
        /// User of the front-end, if the kernel reports it.
        uid: Option<u32>,
    },
    /// The first write or commit waits, or the first write fails, because the file system of the image is full.
    DiskFull {
        /// The image.
        path: PathBuf,
    },
    /// The size of the disk has changed.
    Resized {
        /// The new size in bytes.
        size: u64,
    },
    /// No write or commit waits for space any more, and no lane's writes fail for lack of space.
    RoomAgain {
        /// The image.
        path: PathBuf,
    },
    /// The image was poisoned, for example because a sync failed. It takes no more writes.
    Poisoned {
        /// The image.
        path: PathBuf,
        /// The failure.
        reason: String,
    },
    /// A snapshot kept the contents of the disk. The guest's writes go to a new image.
    Snapshot {
        /// The image with the kept contents.
        kept: PathBuf,
        /// UUID of this image.
        uuid: Uuid,
        /// Time for which writes waited.
        pause: Duration,
    },
}

/// The function that receives the events of one disk.
type Receiver = Arc<dyn Fn(DiskEvent) + Send + Sync>;

/// Reports the events of one disk. The default discards them.
#[derive(Clone, Default)]
pub struct EventReporter(Option<Receiver>);

impl EventReporter {
    /// Creates a reporter that calls `receive` for each event.
    ///
    /// Threads that serve requests call `receive`, some of them while they hold a lock of the disk. So `receive` must
    /// return without waiting, and must not call the disk.
    pub fn new(receive: impl Fn(DiskEvent) + Send + Sync + 'static) -> EventReporter {
        EventReporter(Some(Arc::new(receive)))
    }

    /// Reports an event.
    pub fn report(&self, event: DiskEvent) {
        if let Some(receive) = &self.0 {
            receive(event);
        }
    }
}

impl fmt::Debug for EventReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "EventReporter(on)" } else { "EventReporter(off)" })
    }
}
