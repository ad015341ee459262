//! The runtime folder of the simulated host: shared memory that the next process finds, with locks that end with a
//! process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::machine::{StepKind, errno};
use super::names::absolute;
use super::shared::SharedMachine;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::runtime_folder::RuntimeFolderBackend;
use crate::storage::shm::Shm;

/// Runtime folder of a [`SimHost`](super::SimHost). Every path of the simulated machine can be opened as a runtime
/// folder.
#[derive(Debug)]
pub(super) struct SimRuntimeFolder {
    shared: SharedMachine,
    path: PathBuf,
}

/// Lock on shared memory, which ends when it is dropped.
struct SimShmLock {
    shared: SharedMachine,
    name: PathBuf,
}

impl Drop for SimShmLock {
    fn drop(&mut self) {
        self.shared.lock().shm_locks.remove(&self.name);
    }
}

impl SimRuntimeFolder {
    pub(super) fn new(shared: &SharedMachine, path: &Path) -> SimRuntimeFolder {
        SimRuntimeFolder { shared: shared.clone(), path: absolute(path) }
    }

    fn locked(&self, words: Arc<[AtomicU64]>, name: PathBuf) -> Shm {
        Shm::heap(words, SimShmLock { shared: self.shared.clone(), name })
    }
}

impl RuntimeFolderBackend for SimRuntimeFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn create(&self, name: &str, words: usize) -> Result<Shm> {
        let name = self.path.join(name);
        let mut machine = self.shared.lock();
        machine.step(StepKind::Name).map_err(|e| Error::io("cannot create a live journal", e).at_path(&name))?;
        if machine.shm.contains_key(&name) {
            return Err(Error::io("cannot give the live journal its name", errno(libc::EEXIST)).at_path(&name));
        }
        let words: Arc<[AtomicU64]> = std::iter::repeat_with(|| AtomicU64::new(0)).take(words).collect();
        machine.shm.insert(name.clone(), words.clone());
        machine.shm_locks.insert(name.clone());
        Ok(self.locked(words, name))
    }

    fn check_space(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    fn open(&self, name: &str, words: usize) -> Result<Shm> {
        let name = self.path.join(name);
        let mut machine = self.shared.lock();
        machine.check_alive().map_err(|e| Error::io("cannot open the live journal", e).at_path(&name))?;
        let Some(found) = machine.shm.get(&name).cloned() else {
            return Err(Error::io("cannot open the live journal", errno(libc::ENOENT)).at_path(&name));
        };
        if found.len() != words {
            return Err(Error::new(ErrorKind::Refused, "the live journal has another size").at_path(&name));
        }
        if !machine.shm_locks.insert(name.clone()) && !mutant::enabled(Mutant::NoJournalLock) {
            let what = "another simulated process has the live journal open";
            return Err(Error::new(ErrorKind::Busy, what).at_path(&name));
        }
        Ok(self.locked(found, name))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let name = self.path.join(name);
        let mut machine = self.shared.lock();
        machine.step(StepKind::Name).map_err(|e| Error::io("cannot remove the live journal", e).at_path(&name))?;
        machine.shm.remove(&name);
        Ok(())
    }

    fn list(&self) -> Result<Vec<String>> {
        let machine = self.shared.lock();
        machine.check_alive().map_err(|e| Error::io("cannot list the folder", e).at_path(&self.path))?;
        let inside = machine.shm.keys().filter(|name| name.parent() == Some(&self.path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_str()?.to_owned())).collect())
    }

    fn coarse_seconds(&self) -> u64 {
        u64::try_from(self.shared.lock().clock).unwrap_or(0)
    }

    fn random_id(&self) -> Uuid {
        self.shared.lock().uuid()
    }
}
