//! The machine as its handles and engines share it.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::machine::SimMachine;
use super::names::absolute;
use crate::error::{Error, Result};

/// Shared reference to a machine.
#[derive(Clone, Debug)]
pub(super) struct SharedMachine(Arc<Mutex<SimMachine>>);

impl SharedMachine {
    pub(super) fn new(machine: SimMachine) -> SharedMachine {
        SharedMachine(Arc::new(Mutex::new(machine)))
    }

    /// Locks the machine, even if a test has panicked while it held the lock, so that no second panic hides the message
    /// of the first.
    pub(super) fn lock(&self) -> MutexGuard<'_, SimMachine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_same(&self, other: &SharedMachine) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Calls `call` with the locked machine and the absolute path. Errors contain `path`.
    pub(super) fn with_path<T>(
        &self,
        path: &Path,
        what: &str,
        call: impl FnOnce(&mut SimMachine, &Path) -> io::Result<T>,
    ) -> Result<T> {
        call(&mut self.lock(), &absolute(path)).map_err(|e| Error::io(what, e).at_path(path))
    }
}
