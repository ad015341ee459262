//! The table of guest memory regions. Checks and maps the regions that a front-end shares, and translates the
//! front-end's addresses.
//!
//! A table is immutable. Each message that changes the memory creates a new table, which shares the mappings that
//! remain. A region is unmapped when the last table and the last request that use the region are dropped.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::fstat;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::passed_fd::{check_memory_file, no_sigbus_handler};
use crate::device::{MemoryRegions, SharedMemory};
use crate::storage::sigbus::Guard;

/// Maximum number of regions, the same as in KVM (QEMU calls them memory slots).
pub(super) const MAX_REGIONS: usize = 509;

/// The regions of a guest's memory. Cloning is cheap.
#[derive(Clone, Default)]
pub(super) struct MemoryTable {
    /// The regions, ascending by guest address, without overlap.
    regions: Vec<MappedRegion>,
}

#[derive(Clone)]
struct MappedRegion {
    guest: u64,
    size: u64,
    /// Address of the region in the front-end's address space. Front-ends send ring addresses in this address space.
    user: u64,
    // Declared before the mapping, so that the guard is dropped before the memory is unmapped.
    guard: Arc<Guard>,
    mapping: Arc<GuestRegionMmap<()>>,
}

fn refuse(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

impl MemoryTable {
    /// Creates a table of `regions`. `files[i]` backs `regions[i]`.
    ///
    /// # Errors
    /// * `InvalidInput` if a region breaks a rule of docs/virtio.md, section 5, or the numbers of regions and files
    ///   differ.
    /// * Any error of mapping a file.
    pub(super) fn from_regions(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<MemoryTable> {
        if regions.len() != files.len() {
            return Err(refuse(format!("{} regions with {} files", regions.len(), files.len())));
        }
        let pairs = regions.iter().zip(files);
        pairs.into_iter().try_fold(MemoryTable::default(), |table, (region, file)| table.with_region(region, file))
    }

    /// Returns a table with one more region.
    ///
    /// # Errors
    /// * `InvalidInput` if the region breaks a rule of docs/virtio.md, section 5.
    /// * Any error of mapping the file.
    pub(super) fn with_region(&self, region: &VhostUserMemoryRegion, file: File) -> io::Result<MemoryTable> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let offset = region.mmap_offset;
        let shown = format!("the region of {size:#x} bytes at guest address {guest:#x}");
        if self.regions.len() >= MAX_REGIONS {
            return Err(refuse(format!("{shown} exceeds the maximum of {MAX_REGIONS} regions")));
        }
        let (Some(guest_end), Some(_), Some(file_end)) =
            (guest.checked_add(size), user.checked_add(size), offset.checked_add(size))
        else {
            return Err(refuse(format!("{shown} ends beyond 2^64")));
        };
        if size == 0 {
            return Err(refuse(format!("{shown} is empty")));
        }
        if let Some(other) = self.regions.iter().find(|r| guest < r.guest + r.size && r.guest < guest_end) {
            return Err(refuse(format!("{shown} overlaps the one at {:#x}", other.guest)));
        }
        // The kind of file is checked first, since the file system of any other kind of file could block the thread in
        // a later call.
        let page = check_memory_file(&file).map_err(|e| refuse(format!("{shown}: {e}")))?;
        let stat = fstat(&file)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0).next_multiple_of(page as u64);
        if file_end > length {
            return Err(refuse(format!("{shown} ends at byte {file_end:#x} of a file of {length:#x} bytes")));
        }
        let mapping = region.mmap_region(file).map_err(|e| io::Error::other(format!("cannot map {shown}: {e}")))?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| refuse(format!("{shown} ends beyond 2^64")))?;
        let mapping = Arc::new(mapping);
        let (start, len) = (mapping.get_mmap().as_ptr(), mapping.get_mmap().size());
        // SAFETY: the range is exactly the mapping `mapping`, which this function created readable and writable. Its
        // start is page-aligned, since the kernel chose it. Each owner of the guard also owns the mapping and drops the
        // guard first: this function, `MappedRegion` and `SharedMemory`. The guest may change these bytes at any time;
        // all accesses are by raw pointers and atomics, and no Rust reference to the bytes exists.
        let guard = unsafe { Guard::new(start, len, page) };
        let guard = Arc::new(guard.ok_or_else(no_sigbus_handler)?);
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.guest < guest);
        regions.insert(at, MappedRegion { guest, size, user, guard, mapping });
        Ok(MemoryTable { regions })
    }

    /// Returns a table without the region that has the addresses and the size of `region`.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such region.
    pub(super) fn without_region(&self, region: &VhostUserMemoryRegion) -> io::Result<MemoryTable> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let same = |r: &MappedRegion| (r.guest, r.size, r.user) == (guest, size, user);
        let mut regions = self.regions.clone();
        let at = regions.iter().position(same);
        let at = at.ok_or_else(|| refuse(format!("no region of {size:#x} bytes at guest address {guest:#x}")))?;
        regions.remove(at);
        Ok(MemoryTable { regions })
    }

    /// Returns whether the table has no regions.
    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Translates the range of `len` bytes at the front-end's address `user` to a guest address. Returns `None` unless
    /// one region contains the whole range.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| user >= r.user && user - r.user < r.size)?;
        let within = user - region.user;
        (len <= region.size - within).then(|| region.guest + within)
    }

    /// Returns whether an access to the memory failed, so that a page of it is lost.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.guard.is_lost())
    }

    /// Returns the memory in the form that rings and requests use.
    pub(super) fn shared_memory(&self) -> Arc<SharedMemory> {
        let mappings: Vec<_> = self.regions.iter().map(|r| r.mapping.clone()).collect();
        let memory = match mappings.is_empty() {
            true => MemoryRegions::new(),
            false => {
                MemoryRegions::from_arc_regions(mappings).expect("the regions of a table ascend and do not overlap")
            }
        };
        let guards = self.regions.iter().map(|region| region.guard.clone()).collect();
        Arc::new(SharedMemory::new(memory, guards))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn file(len: u64) -> File {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        file
    }

    fn region(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, size, user, offset)
    }

    #[test]
    fn front_end_addresses_are_translated_to_guest_addresses() {
        let regions = [region(0x10_0000, 0x2000, 0x7000_0000, 0x1000), region(0, 0x1000, 0x9000_0000, 0)];
        let table = MemoryTable::from_regions(&regions, vec![file(0x3000), file(0x1000)]).unwrap();
        assert_eq!(table.guest_address(0x7000_1ff0, 16), Some(0x10_1ff0));
        assert_eq!(table.guest_address(0x7000_1ff0, 17), None, "beyond its region");
        assert_eq!(table.guest_address(0x6fff_ffff, 1), None, "before it");
        assert_eq!(table.guest_address(0x9000_0000, u64::MAX), None);
        let memory = table.shared_memory();
        let memory = memory.regions();
        memory.write_slice(b"x", GuestAddress(0x10_1fff)).unwrap();
        assert_eq!(memory.num_regions(), 2);
    }

    #[test]
    fn adding_and_removing_regions_keeps_the_other_mappings() {
        let a = region(0, 0x1000, 0x1000, 0);
        let b = region(0x1000, 0x1000, 0x2000, 0);
        let table = MemoryTable::default().with_region(&a, file(0x1000)).unwrap();
        table.shared_memory().regions().write_slice(b"kept", GuestAddress(8)).unwrap();
        let both = table.with_region(&b, file(0x1000)).unwrap();
        let back = both.without_region(&b).unwrap();
        let mut seen = [0; 4];
        back.shared_memory().regions().read_slice(&mut seen, GuestAddress(8)).unwrap();
        assert_eq!(&seen, b"kept");
        assert!(back.without_region(&b).is_err());
        assert!(back.without_region(&a).unwrap().is_empty());
    }

    #[test]
    fn regions_that_break_a_rule_are_refused() {
        let whole = MemoryTable::default().with_region(&region(0x4000, 0x2000, 0, 0), file(0x2000)).unwrap();
        let cases = [
            ("no size", region(0, 0, 0, 0)),
            ("overlaps at its end", region(0x3000, 0x1001, 0x9000, 0)),
            ("overlaps inside", region(0x5000, 0x1000, 0x9000, 0)),
            ("guest address overflows", region(u64::MAX - 0xfff, 0x2000, 0x9000, 0)),
            ("front-end's address overflows", region(0x8000, 0x2000, u64::MAX, 0)),
            ("offset overflows", region(0x8000, 0x1000, 0, u64::MAX - 0xfff)),
            ("ends beyond the file", region(0x8000, 0x2000, 0, 0x1000)),
            ("offset that is no page", region(0x8000, 0x1000, 0, 0x10)),
        ];
        for (why, bad) in cases {
            assert!(whole.with_region(&bad, file(0x2000)).is_err(), "{why}");
        }
        assert!(whole.with_region(&region(0x8000, 0x1000, 0, 0), File::open("/dev/zero").unwrap()).is_err());
        assert!(whole.with_region(&region(0x6000, 0x2000, 0x9000, 0), file(0x2000)).is_ok(), "next to it");
        assert!(MemoryTable::from_regions(&[region(0, 0x1000, 0, 0)], vec![]).is_err());
    }

    #[test]
    fn truncated_memory_reads_as_zeros_and_is_reported_as_lost() {
        let (kept, cut) = (file(0x1000), file(0x2000));
        let table = MemoryTable::default().with_region(&region(0, 0x1000, 0, 0), kept).unwrap();
        let both = table.with_region(&region(0x4000, 0x2000, 0x4000, 0), cut.try_clone().unwrap()).unwrap();
        let memory = both.shared_memory();
        memory.regions().write_slice(&[7; 0x2000], GuestAddress(0x4000)).unwrap();
        cut.set_len(0x1000).unwrap();
        let mut seen = [1; 0x2000];
        memory.regions().read_slice(&mut seen, GuestAddress(0x4000)).unwrap();
        assert!(seen[..0x1000] == [7; 0x1000] && seen[0x1000..] == [0; 0x1000]);
        assert!(both.is_lost() && memory.is_lost() && !table.is_lost() && !table.shared_memory().is_lost());
    }

    #[test]
    fn the_number_of_regions_is_limited() {
        let mut table = MemoryTable::default();
        let backing = file(0x1000);
        for i in 0..MAX_REGIONS as u64 {
            table = table.with_region(&region(i << 12, 0x1000, i << 12, 0), backing.try_clone().unwrap()).unwrap();
        }
        assert!(table.with_region(&region(1 << 40, 0x1000, 1 << 40, 0), backing).is_err());
    }
}
