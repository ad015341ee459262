//! Cached reads of the simulated host. Which ranges are resident, and which copies fail, is drawn from a seed.

use std::io;
use std::sync::Arc;

use super::file::SimFile;
use super::names::InodeId;
use super::shared::SharedMachine;
use crate::random::Random;
use crate::storage::backend::File;
use crate::storage::engine::PageCache;
use crate::storage::op::{FILE_SLOTS, FileSlot};
use crate::storage::pagecache::range::CachedRange;
use crate::storage::payload::GuestIovecs;

/// Page cache of a [`SimHost`](super::SimHost).
pub(super) struct SimPageCache {
    shared: SharedMachine,
    /// Registered files. They stay open and locked while they are registered.
    files: Vec<Option<(Arc<SimFile>, InodeId)>>,
    /// Random numbers for cached reads only, so that runs with and without cached reads are otherwise the same.
    random: Random,
}

impl SimPageCache {
    pub(super) fn new(shared: SharedMachine) -> SimPageCache {
        SimPageCache { shared, files: (0..FILE_SLOTS).map(|_| None).collect(), random: Random::new(1) }
    }
}

impl PageCache for SimPageCache {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)?;
        let (file, inode, _) = SimFile::of(file, &self.shared)?;
        *entry = Some((file, inode));
        Ok(())
    }

    fn unregister(&mut self, slot: FileSlot) {
        if let Some(entry) = self.files.get_mut(slot.as_usize()) {
            *entry = None;
        }
    }

    fn find(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        (self.shared.lock().cached_reads && self.random.chance(7, 8)).then(|| CachedRange::new(slot, offset, len))
    }

    fn copy(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let Some(Some((_, inode))) = self.files.get(found.slot().as_usize()) else { return false };
        let mut bytes = vec![0; found.len()];
        let resident = self.shared.lock().read_mapped(*inode, &mut bytes, found.offset()).is_ok();
        let whole = resident && self.random.chance(7, 8);
        if !whole {
            // An incomplete copy overwrites a part of the destination, here half of it.
            bytes.truncate(found.len() / 2);
            bytes.fill(0xA5);
        }
        into.copy_from(at, &bytes);
        whole
    }

    fn end_batch(&mut self) {}

    fn query_residency(&mut self) {}
}
