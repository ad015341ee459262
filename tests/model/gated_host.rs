//! A simulated host with a gate, at which a thread can be made to wait when it creates a blocking engine. A commit of
//! the control thread creates one.

use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use diffdisk::error::Result;
use diffdisk::storage::sim::SimHost;
use diffdisk::storage::{Access, Engine, EngineKind, Env, File, FilePresence, Folder, Origin, RuntimeFolder};
use uuid::Uuid;

#[derive(Clone, Copy, PartialEq, Eq)]
enum GateState {
    Open,
    /// The next thread that creates a blocking engine waits.
    Closed,
    /// A thread waits.
    Waiting,
}

/// The simulated host and its gate, which is open at first.
pub struct GatedHost {
    host: SimHost,
    state: Mutex<GateState>,
    changed: Condvar,
}

impl GatedHost {
    pub fn new(host: &SimHost) -> GatedHost {
        GatedHost { host: host.clone(), state: Mutex::new(GateState::Open), changed: Condvar::new() }
    }

    pub fn close_gate(&self) {
        self.set(GateState::Closed);
    }

    pub fn open_gate(&self) {
        self.set(GateState::Open);
    }

    /// Returns when a thread waits at the gate.
    pub fn await_arrival(&self) {
        self.wait_while(|state| state != GateState::Waiting);
    }

    fn set(&self, state: GateState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_all();
    }

    fn wait_while(&self, condition: impl Fn(GateState) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = Duration::from_secs(20);
        let waited = self.changed.wait_timeout_while(state, limit, |state| condition(*state));
        let (_state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.timed_out(), "no thread arrives at the gate, or it is never opened");
    }
}

impl Env for GatedHost {
    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        let is_closed = *self.state.lock().unwrap_or_else(PoisonError::into_inner) == GateState::Closed;
        if is_closed && kind == EngineKind::Blocking {
            self.set(GateState::Waiting);
            self.wait_while(|state| state == GateState::Waiting);
        }
        self.host.engine(kind, depth)
    }

    fn open(&self, path: &Path, access: Access) -> Result<File> {
        self.host.open(path, access)
    }

    fn folder(&self, path: &Path) -> Result<Folder> {
        self.host.folder(path)
    }

    fn file_presence(&self, path: &Path) -> FilePresence {
        self.host.file_presence(path)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.host.remove(path)
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        self.host.canonical(path)
    }

    fn exists(&self, path: &Path) -> bool {
        self.host.exists(path)
    }

    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        self.host.runtime_folder(folder)
    }

    fn origin(&self) -> Result<Origin> {
        self.host.origin()
    }

    fn now(&self) -> i64 {
        self.host.now()
    }

    fn monotonic_time(&self) -> Duration {
        self.host.monotonic_time()
    }

    fn uuid(&self) -> Uuid {
        self.host.uuid()
    }
}
