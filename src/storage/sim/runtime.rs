//! The runtime folder of a simulated host: memory that the next process finds, with locks that end with a process.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::Shared;
use super::env::absolute;
use super::world::{Step, code};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::live::Live;

/// A folder. Every path is one, and in memory.
#[derive(Clone, Debug)]
pub struct SimRuntime {
    shared: Shared,
    path: PathBuf,
}

/// Words, locked until this is dropped.
#[derive(Debug)]
pub struct SimLive {
    words: Arc<[AtomicU64]>,
    shared: Shared,
    name: PathBuf,
}

impl Deref for SimLive {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        &self.words
    }
}

impl Drop for SimLive {
    fn drop(&mut self) {
        self.shared.world().live_locks.remove(&self.name);
    }
}

impl SimRuntime {
    pub(super) fn new(shared: &Shared, path: &Path) -> SimRuntime {
        SimRuntime { shared: shared.clone(), path: absolute(path) }
    }

    pub(in crate::storage) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::storage) fn create(&self, name: &str, words: usize) -> Result<Live> {
        let name = self.path.join(name);
        let mut world = self.shared.world();
        world.step(Step::Name).map_err(|e| Error::io("cannot make", e).at_path(&name))?;
        if world.live.contains_key(&name) {
            return Err(Error::io("cannot name", code(libc::EEXIST)).at_path(&name));
        }
        let made: Arc<[AtomicU64]> = std::iter::repeat_with(|| AtomicU64::new(0)).take(words).collect();
        world.live.insert(name.clone(), made.clone());
        world.live_locks.insert(name.clone());
        Ok(Live::sim(SimLive { words: made, shared: self.shared.clone(), name }))
    }

    pub(in crate::storage) fn open(&self, name: &str, words: usize) -> Result<Live> {
        let name = self.path.join(name);
        let mut world = self.shared.world();
        world.alive().map_err(|e| Error::io("cannot open", e).at_path(&name))?;
        let Some(found) = world.live.get(&name).cloned() else {
            return Err(Error::io("cannot open", code(libc::ENOENT)).at_path(&name));
        };
        if found.len() != words {
            return Err(Error::new(ErrorKind::Refused, "it has another size").at_path(&name));
        }
        if !world.live_locks.insert(name.clone()) && !mutant::is(Mutant::NoJournalLock) {
            return Err(Error::new(ErrorKind::Busy, "another simulated process has it open").at_path(&name));
        }
        Ok(Live::sim(SimLive { words: found, shared: self.shared.clone(), name }))
    }

    pub(in crate::storage) fn remove(&self, name: &str) -> Result<()> {
        let name = self.path.join(name);
        let mut world = self.shared.world();
        world.step(Step::Name).map_err(|e| Error::io("cannot remove", e).at_path(&name))?;
        world.live.remove(&name);
        Ok(())
    }

    pub(in crate::storage) fn list(&self) -> Result<Vec<String>> {
        let world = self.shared.world();
        world.alive().map_err(|e| Error::io("cannot list the folder", e).at_path(&self.path))?;
        let inside = world.live.keys().filter(|name| name.parent() == Some(&self.path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_str()?.to_owned())).collect())
    }

    pub(in crate::storage) fn second(&self) -> u64 {
        u64::try_from(self.shared.world().clock).unwrap_or(0)
    }

    pub(in crate::storage) fn random(&self) -> Uuid {
        self.shared.world().uuid()
    }
}
