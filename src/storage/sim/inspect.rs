//! Observation of a simulated machine: single completions, copies before each change, and contents, which are read
//! without counting a step.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use super::crash::survivors;
use super::host::SimHost;
use super::names::absolute;
use super::types::DurableUnit;
use crate::random::Random;

impl SimHost {
    /// Limits the number of operations that engines return from `reap` from now on. With a limit of one at a time, a
    /// test sees the machine between any two completions. `None` removes the limit. The limit does not apply to `wait`.
    pub fn limit_completions(&self, count: Option<u64>) {
        self.0.lock().completion_limit = count;
    }

    /// Replaces the seed.
    pub fn set_seed(&self, seed: u64) {
        self.0.lock().random = Random::new(seed);
    }

    /// Starts to keep a copy of the machine before each step that is not a read, for
    /// [`take_recording`](Self::take_recording).
    pub fn start_recording(&self) {
        self.0.lock().recording = Some(Vec::new());
    }

    /// Ends the recording. Returns the machine before each step that is not a read, since
    /// [`start_recording`](Self::start_recording).
    pub fn take_recording(&self) -> Vec<SimHost> {
        let recorded = self.0.lock().recording.take().unwrap_or_default();
        recorded.into_iter().map(SimHost::from).collect()
    }

    /// Returns a digest of a file's current contents. Does not count as a step.
    pub fn digest(&self, path: &Path) -> Option<u64> {
        let machine = self.0.lock();
        Some(machine.inodes[&machine.names.get(&absolute(path))?].digest())
    }

    /// Returns a hash of the names and contents of all files. Does not count as a step.
    pub fn digest_of_all(&self) -> u64 {
        let machine = self.0.lock();
        let mut hasher = DefaultHasher::new();
        for (name, inode) in machine.names.all() {
            (name, inode, machine.inodes[&inode].digest()).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Returns the allocated bytes of all files. Does not count as a step.
    pub fn allocated_bytes(&self) -> u64 {
        self.0.lock().allocated_bytes()
    }

    /// Returns all names of files. Does not count as a step.
    pub fn names(&self) -> Vec<PathBuf> {
        self.0.lock().names.all().map(|(name, _)| name.to_path_buf()).collect()
    }

    /// Returns the current bytes of a file. Does not count as a step.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let machine = self.0.lock();
        let inode = &machine.inodes[&machine.names.get(&absolute(path))?];
        let mut bytes = vec![0; usize::try_from(inode.len()).expect("a test reads what fits in memory")];
        inode.read(&mut bytes, 0);
        Some(bytes)
    }

    /// Returns the changes of [`unsynced`](SimHost::unsynced) with the number of the effect that made each change.
    /// Units of one write have the same number.
    pub fn unsynced_steps(&self) -> Vec<(u64, DurableUnit)> {
        let mut units = Vec::new();
        survivors(&self.0.lock(), &mut |_, _| None, &mut |step, unit| {
            units.push((step, unit()));
            false
        });
        units
    }
}
