//! The in-flight region: made for the front-end, which keeps it and hands it back to whoever serves its rings next.
//!
//! Nothing of it is kept here beyond a connection. A front-end whose guest was reset throws its region away and asks
//! for a new one; to one that comes back after a kill the region is all that it has to say of the past.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, MmapRegion};

use super::passed_fd::{check_memory_file, no_sigbus_handler};
use crate::device::{InFlightRecord, InFlightRegion};
use crate::storage::sigbus::Guard;

use super::limits::{MAX_QUEUE_SIZE, MAX_QUEUES};

/// A region that a front-end has handed in, with room for so many queues of at most so many descriptors.
#[derive(Clone)]
pub(super) struct InflightRecords {
    map: Arc<InFlightRegion>,
    queues: u16,
    queue_size: u16,
}

fn refuse(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Bytes of a region: at most 64 queues of 32768 descriptors, 32 MiB. The disk may have fewer and expect smaller ones: a
/// front-end asks for the numbers that it was given by its user, and a refusal would cost the guest its disk.
fn region_len(shape: &VhostUserInflight) -> io::Result<usize> {
    let (queues, entries) = (shape.num_queues, shape.queue_size);
    if queues == 0 || queues > MAX_QUEUES || entries == 0 || entries > MAX_QUEUE_SIZE {
        return Err(refuse(format!(
            "an in-flight region for {queues} queues of {entries}: there are 1 to {MAX_QUEUES} of at most {MAX_QUEUE_SIZE}"
        )));
    }
    Ok(usize::from(queues) * InFlightRecord::len(entries))
}

/// Makes a region of the shape asked for: what to tell the front-end of it, and its file.
///
/// # Errors
/// Where it is for more than any disk has, or the host has no memory.
pub(super) fn create(shape: &VhostUserInflight) -> io::Result<(VhostUserInflight, File)> {
    let len = region_len(shape)? as u64;
    let file = File::from(memfd_create("diffdisk-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(len)?;
    // Whoever holds it cannot pull it from under the other: a load from a lost page would end the process.
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok((VhostUserInflight::new(len, 0, shape.num_queues, shape.queue_size), file))
}

impl InflightRecords {
    /// A region that a front-end hands in.
    ///
    /// # Errors
    /// Where the front-end's numbers do not fit any disk, each other, or the file, or the file may shrink.
    pub(super) fn map(told: &VhostUserInflight, file: File) -> io::Result<InflightRecords> {
        let len = region_len(told)?;
        let (size, offset) = (told.mmap_size, told.mmap_offset);
        if size != len as u64 {
            return Err(refuse(format!("an in-flight region of {size} bytes, where its queues take {len}")));
        }
        // Before any other question about the file: this one waits for no file system.
        let page = check_memory_file(&file)?;
        let there = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > there) {
            return Err(refuse(format!("an in-flight region at {offset} of {size} bytes, in a file of {there}")));
        }
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(refuse("an in-flight region in a file that may shrink".into()));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map_err(|e| io::Error::other(format!("the in-flight region cannot be mapped: {e}")))?;
        // SAFETY: a whole mapping of our own, for reading and writing, which begins at a page since the kernel chose the place and
        // took the offset. `InFlightRegion` drops the guard before it unmaps. The front-end changes these bytes at any time, so they
        // are reached as atomics only.
        let guard = unsafe { Guard::new(map.as_ptr(), map.size(), page) };
        let guard = guard.ok_or_else(no_sigbus_handler)?;
        Ok(InflightRecords {
            map: Arc::new(InFlightRegion::new(map, Some(guard))),
            queues: told.num_queues,
            queue_size: told.queue_size,
        })
    }

    /// Whether a page of it could not be had.
    pub(super) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// The record of a queue; none where the region is for fewer queues.
    pub(super) fn record(&self, index: usize) -> Option<InFlightRecord> {
        let at = index * InFlightRecord::len(self.queue_size);
        (index < usize::from(self.queues)).then(|| InFlightRecord::new(self.map.clone(), at, self.queue_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(queues: u16, entries: u16) -> VhostUserInflight {
        VhostUserInflight::new(0, 0, queues, entries)
    }

    #[test]
    fn a_region_goes_out_and_comes_back() {
        let (told, file) = create(&shape(3, 128)).unwrap();
        let (size, offset, queues, entries) = (told.mmap_size, told.mmap_offset, told.num_queues, told.queue_size);
        assert_eq!((size, offset, queues, entries), (3 * 2112, 0, 3, 128), "16 + 128 * 16, and up to 64");
        assert!(file.set_len(size - 1).is_err() && file.set_len(size + 1).is_err(), "sealed");
        let mut first = InflightRecords::map(&told, file.try_clone().unwrap()).unwrap();
        assert!(first.record(3).is_none());
        let mut record = first.record(2).unwrap();
        assert_eq!(record.resume(128, 7).unwrap(), [0u16; 0]);
        record.record_taken(9);
        record.record_taken(5);
        first = InflightRecords::map(&told, file).unwrap();
        assert_eq!(first.record(2).unwrap().resume(128, 7).unwrap(), [9, 5], "memory, not a copy");
        assert_eq!(first.record(1).unwrap().resume(128, 7).unwrap(), [0u16; 0]);
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        for (queues, entries) in [(0, 128), (65, 128), (1, 0), (1, 32769), (u16::MAX, u16::MAX)] {
            assert!(create(&shape(queues, entries)).is_err(), "{queues} {entries}");
        }
        let (_, file) = create(&shape(2, 128)).unwrap();
        let map = |size, offset, queues, entries| {
            let told = VhostUserInflight::new(size, offset, queues, entries);
            InflightRecords::map(&told, file.try_clone().unwrap()).is_ok()
        };
        assert!(map(4224, 0, 2, 128));
        assert!(map(2112, 0, 1, 128), "less of it");
        for (size, offset, queues, entries) in [
            (4223, 0, 2, 128),
            (4225, 0, 2, 128),
            (u64::MAX, 0, 2, 128),
            (6336, 0, 3, 128),
            (4224, 1, 2, 128),
            (2112, 64, 1, 128),
            (4224, 4096, 2, 128),
            (4224, u64::MAX, 2, 128),
            (65 * 2112, 0, 65, 128),
            (0, 0, 0, 128),
            (128, 0, 2, 0),
        ] {
            assert!(!map(size, offset, queues, entries), "{size} {offset} {queues} {entries}");
        }
    }

    #[test]
    fn files_that_may_shrink_are_refused() {
        let told = VhostUserInflight::new(2112, 0, 1, 128);
        let soft = File::from(memfd_create("soft", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        soft.set_len(4096).unwrap();
        assert!(InflightRecords::map(&told, soft.try_clone().unwrap()).is_err());
        fcntl_add_seals(&soft, SealFlags::SHRINK).unwrap();
        assert!(InflightRecords::map(&told, soft).is_ok());
        assert!(InflightRecords::map(&told, tempfile::tempfile().unwrap()).is_err());
        assert!(InflightRecords::map(&told, File::open("/dev/zero").unwrap()).is_err());
    }
}
