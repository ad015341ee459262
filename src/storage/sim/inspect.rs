//! Watching a simulated machine from outside: a completion at a time, and as it was before each change.

use std::path::{Path, PathBuf};

use super::{DurableUnit, Random, SimHost, absolute, survivors};

impl SimHost {
    /// Engines give back at most `count` operations from now on in `reap`, one after another; any number if `None`.
    /// Whoever grants one at a time sees the machine between any two completions. `wait` takes no grant.
    pub fn limit_completions(&self, count: Option<u64>) {
        self.0.lock().completion_limit = count;
    }

    /// Draws from another seed from now on.
    pub fn set_seed(&self, seed: u64) {
        self.0.lock().random = Random::new(seed);
    }

    /// Keeps the machine as it is before each change from now on, for `recorded`.
    pub fn start_recording(&self) {
        self.0.lock().recording = Some(Vec::new());
    }

    /// The machine before each change since `record`, to try fates from; recording is over.
    pub fn take_recording(&self) -> Vec<SimHost> {
        let recorded = self.0.lock().recording.take().unwrap_or_default();
        recorded.into_iter().map(SimHost::from).collect()
    }

    /// A number that tells the contents of a file, as readers see it, from others; no step.
    pub fn digest(&self, path: &Path) -> Option<u64> {
        let world = self.0.lock();
        Some(world.inodes[&world.names.get(&absolute(path))?].digest())
    }

    /// Bytes of room that all files take; no step.
    pub fn allocated_bytes(&self) -> u64 {
        self.0.lock().allocated_bytes()
    }

    /// All names of files.
    pub fn names(&self) -> Vec<PathBuf> {
        self.0.lock().names.all().map(|(name, _)| name.to_path_buf()).collect()
    }

    /// The bytes of a file as a reader sees them now; no step.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let world = self.0.lock();
        let inode = &world.inodes[&world.names.get(&absolute(path))?];
        let mut bytes = vec![0; usize::try_from(inode.len()).expect("a test reads what fits in memory")];
        inode.read(&mut bytes, 0);
        Some(bytes)
    }

    /// What is not durable now, as [`unsynced`](SimHost::unsynced) lists it, with the number of the step that changed
    /// each: units of one write have one number.
    pub fn unsynced_steps(&self) -> Vec<(u64, DurableUnit)> {
        let mut units = Vec::new();
        survivors(&self.0.lock(), &mut |_, _| None, &mut |step, unit| {
            units.push((step, unit()));
            false
        });
        units
    }
}
