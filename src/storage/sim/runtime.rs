//! The runtime folder of a simulated host: memory that the next process finds, with locks that end with a process.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::SharedMachine;
use super::env::absolute;
use super::machine::{StepKind, errno};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::shm::Shm;

/// A folder. Every path is one, and in memory.
#[derive(Clone, Debug)]
pub struct SimRuntimeFolder {
    shared: SharedMachine,
    path: PathBuf,
}

/// Words, locked until this is dropped.
#[derive(Debug)]
pub struct SimShm {
    words: Arc<[AtomicU64]>,
    shared: SharedMachine,
    name: PathBuf,
}

impl Deref for SimShm {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        &self.words
    }
}

impl Drop for SimShm {
    fn drop(&mut self) {
        self.shared.lock().shm_locks.remove(&self.name);
    }
}

impl SimRuntimeFolder {
    pub(super) fn new(shared: &SharedMachine, path: &Path) -> SimRuntimeFolder {
        SimRuntimeFolder { shared: shared.clone(), path: absolute(path) }
    }

    pub(in crate::storage) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::storage) fn create(&self, name: &str, words: usize) -> Result<Shm> {
        let name = self.path.join(name);
        let mut world = self.shared.lock();
        world.step(StepKind::Name).map_err(|e| Error::io("cannot make", e).at_path(&name))?;
        if world.shm.contains_key(&name) {
            return Err(Error::io("cannot name", errno(libc::EEXIST)).at_path(&name));
        }
        let made: Arc<[AtomicU64]> = std::iter::repeat_with(|| AtomicU64::new(0)).take(words).collect();
        world.shm.insert(name.clone(), made.clone());
        world.shm_locks.insert(name.clone());
        Ok(Shm::sim(SimShm { words: made, shared: self.shared.clone(), name }))
    }

    pub(in crate::storage) fn open(&self, name: &str, words: usize) -> Result<Shm> {
        let name = self.path.join(name);
        let mut world = self.shared.lock();
        world.check_alive().map_err(|e| Error::io("cannot open", e).at_path(&name))?;
        let Some(found) = world.shm.get(&name).cloned() else {
            return Err(Error::io("cannot open", errno(libc::ENOENT)).at_path(&name));
        };
        if found.len() != words {
            return Err(Error::new(ErrorKind::Refused, "it has another size").at_path(&name));
        }
        if !world.shm_locks.insert(name.clone()) && !mutant::enabled(Mutant::NoJournalLock) {
            return Err(Error::new(ErrorKind::Busy, "another simulated process has it open").at_path(&name));
        }
        Ok(Shm::sim(SimShm { words: found, shared: self.shared.clone(), name }))
    }

    pub(in crate::storage) fn remove(&self, name: &str) -> Result<()> {
        let name = self.path.join(name);
        let mut world = self.shared.lock();
        world.step(StepKind::Name).map_err(|e| Error::io("cannot remove", e).at_path(&name))?;
        world.shm.remove(&name);
        Ok(())
    }

    pub(in crate::storage) fn list(&self) -> Result<Vec<String>> {
        let world = self.shared.lock();
        world.check_alive().map_err(|e| Error::io("cannot list the folder", e).at_path(&self.path))?;
        let inside = world.shm.keys().filter(|name| name.parent() == Some(&self.path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_str()?.to_owned())).collect())
    }

    pub(in crate::storage) fn coarse_seconds(&self) -> u64 {
        u64::try_from(self.shared.lock().clock).unwrap_or(0)
    }

    pub(in crate::storage) fn random_id(&self) -> Uuid {
        self.shared.lock().uuid()
    }
}
