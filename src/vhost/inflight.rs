//! The in-flight region. The daemon creates it for the front-end, which keeps it and passes it to the next daemon that
//! serves its rings.
//!
//! The daemon keeps the region for one connection only. When the guest is reset, the front-end discards its region and
//! requests a new one. After a kill of the daemon, the region is the only record of the requests that were in flight.

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

/// The mapped in-flight region of a front-end: the records of `queues` queues of at most `queue_size` descriptors.
#[derive(Clone)]
pub(super) struct InflightRecords {
    map: Arc<InFlightRegion>,
    queues: u16,
    queue_size: u16,
}

fn refuse(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Returns the length of a region in bytes: 32 MiB and 4 KiB at most, for 64 queues of 32768 descriptors. The region
/// may have more or larger queues than the disk. A front-end sends the numbers that its user configured, and a refusal
/// would leave the guest without its disk.
///
/// # Errors
/// `InvalidInput` if the number or the size of the queues is out of range.
fn region_len(shape: &VhostUserInflight) -> io::Result<usize> {
    let (queues, entries) = (shape.num_queues, shape.queue_size);
    if queues == 0 || queues > MAX_QUEUES || entries == 0 || entries > MAX_QUEUE_SIZE {
        return Err(refuse(format!(
            "in-flight region for {queues} queues of {entries} entries; allowed are 1 to {MAX_QUEUES} queues of at most \
             {MAX_QUEUE_SIZE} entries"
        )));
    }
    Ok(usize::from(queues) * InFlightRecord::len(entries))
}

/// Creates a region for the number and size of queues in `shape`. Returns the description of the region for the
/// front-end, and its file.
///
/// # Errors
/// * `InvalidInput` if the number or the size of the queues is out of range.
/// * Any error of memfd_create(2), ftruncate(2) or sealing.
pub(super) fn create(shape: &VhostUserInflight) -> io::Result<(VhostUserInflight, File)> {
    let len = region_len(shape)? as u64;
    let file = File::from(memfd_create("diffdisk-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(len)?;
    // The seals prevent the front-end from truncating the file. After a truncation, an access would raise SIGBUS.
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok((VhostUserInflight::new(len, 0, shape.num_queues, shape.queue_size), file))
}

impl InflightRecords {
    /// Maps a region that a front-end passes.
    ///
    /// # Errors
    /// * `InvalidInput` if the number or the size of the queues is out of range, the length of the region does not
    ///   match these numbers, the region does not lie inside the file, or the file is not memory that is sealed against
    ///   shrinking.
    /// * Any error of mapping the file.
    pub(super) fn map(shape: &VhostUserInflight, file: File) -> io::Result<InflightRecords> {
        let len = region_len(shape)?;
        let (size, offset) = (shape.mmap_size, shape.mmap_offset);
        if size != len as u64 {
            return Err(refuse(format!("in-flight region of {size} bytes, but its queues need {len}")));
        }
        // The kind of file is checked first, since the file system of any other kind of file could block the thread in
        // a later call.
        let page = check_memory_file(&file)?;
        let file_len = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > file_len) {
            return Err(refuse(format!(
                "in-flight region of {size} bytes at offset {offset} of a file of {file_len} bytes"
            )));
        }
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(refuse("in-flight region in a file that is not sealed against shrinking".into()));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map_err(|e| io::Error::other(format!("cannot map the in-flight region: {e}")))?;
        // SAFETY: the range is exactly the mapping `map`, which this function created readable and writable and owns.
        // Its start is page-aligned, since the kernel chose it. Guard and mapping move into one `InFlightRegion`, which
        // drops the guard before it unmaps. The front-end may change these bytes at any time; all accesses are atomic,
        // and no Rust reference to the bytes exists.
        let guard = unsafe { Guard::new(map.as_ptr(), map.size(), page) };
        let guard = guard.ok_or_else(no_sigbus_handler)?;
        Ok(InflightRecords {
            map: Arc::new(InFlightRegion::new(map, Some(guard))),
            queues: shape.num_queues,
            queue_size: shape.queue_size,
        })
    }

    /// Returns whether an access to the region failed, so that a page of it is lost.
    pub(super) fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Returns the record of a queue, or `None` if the region has fewer queues.
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
    fn a_created_region_can_be_mapped_again() {
        let (description, file) = create(&shape(3, 128)).unwrap();
        let (size, offset, queues, entries) =
            (description.mmap_size, description.mmap_offset, description.num_queues, description.queue_size);
        assert_eq!((size, offset, queues, entries), (3 * 2112, 0, 3, 128), "16 + 128 * 16, and up to 64");
        assert!(file.set_len(size - 1).is_err() && file.set_len(size + 1).is_err(), "sealed");
        let mut first = InflightRecords::map(&description, file.try_clone().unwrap()).unwrap();
        assert!(first.record(3).is_none());
        let mut record = first.record(2).unwrap();
        assert_eq!(record.resume(128, 7).unwrap(), [0u16; 0]);
        record.record_taken(9);
        record.record_taken(5);
        first = InflightRecords::map(&description, file).unwrap();
        assert_eq!(first.record(2).unwrap().resume(128, 7).unwrap(), [9, 5], "memory, not a copy");
        assert_eq!(first.record(1).unwrap().resume(128, 7).unwrap(), [0u16; 0]);
    }

    #[test]
    fn numbers_that_are_out_of_range_or_inconsistent_are_refused() {
        for (queues, entries) in [(0, 128), (65, 128), (1, 0), (1, 32769), (u16::MAX, u16::MAX)] {
            assert!(create(&shape(queues, entries)).is_err(), "{queues} {entries}");
        }
        let (_, file) = create(&shape(2, 128)).unwrap();
        let map = |size, offset, queues, entries| {
            let description = VhostUserInflight::new(size, offset, queues, entries);
            InflightRecords::map(&description, file.try_clone().unwrap()).is_ok()
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
    fn files_without_a_shrink_seal_are_refused() {
        let description = VhostUserInflight::new(2112, 0, 1, 128);
        let soft = File::from(memfd_create("soft", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        soft.set_len(4096).unwrap();
        assert!(InflightRecords::map(&description, soft.try_clone().unwrap()).is_err());
        fcntl_add_seals(&soft, SealFlags::SHRINK).unwrap();
        assert!(InflightRecords::map(&description, soft).is_ok());
        assert!(InflightRecords::map(&description, tempfile::tempfile().unwrap()).is_err());
        assert!(InflightRecords::map(&description, File::open("/dev/zero").unwrap()).is_err());
    }
}
