//! The disks of the daemon, by name.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rpc_error::RpcError;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind};
use crate::vhost::ServerStatus;

/// A disk of the daemon.
pub struct ServedDisk {
    /// Name of the disk: its id, or else its file name.
    pub name: String,
    /// The disk.
    pub disk: Arc<Disk>,
    /// Socket, queues and front-end of the disk.
    pub server: Arc<ServerStatus>,
}

/// The disks that are served, in the order in which they were added.
#[derive(Default)]
pub struct DiskRegistry(Mutex<Vec<Arc<ServedDisk>>>);

impl DiskRegistry {
    /// Adds a disk. The caller has checked that no other disk has its name.
    pub fn add(&self, disk: ServedDisk) {
        self.lock().push(Arc::new(disk));
    }

    /// Removes a disk, for example because it was closed.
    pub fn remove(&self, name: &str) {
        self.lock().retain(|disk| disk.name != name);
    }

    /// Returns all disks.
    pub(super) fn all(&self) -> Vec<Arc<ServedDisk>> {
        self.lock().clone()
    }

    /// Returns the disk with this name.
    ///
    /// # Errors
    /// `NotFound` if no disk has the name.
    pub(super) fn find(&self, name: &str) -> Result<Arc<ServedDisk>, RpcError> {
        let disks = self.lock();
        disks.iter().find(|disk| disk.name == name).cloned().ok_or_else(|| {
            let names: Vec<String> = disks.iter().map(|disk| format!("{:?}", disk.name)).collect();
            let missing = Error::new(ErrorKind::NotFound, format!("no disk has the name {name:?}"));
            RpcError::from(missing).with_hint(format!("the disks are {}", names.join(", ")))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<ServedDisk>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
