//! The guest's memory as the front-end describes it: regions checked, mapped, and found by either kind of address.
//!
//! A table is never changed: each message makes a new one that shares the mappings that stay. A mapping goes when the
//! last table and the last request that use it are gone.

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

/// Regions one table may have; what QEMU calls memory slots, and as many as KVM itself has (crash-safety 4.4).
pub(super) const MAX_REGIONS: usize = 509;

/// A guest's memory. Cloning is cheap.
#[derive(Clone, Default)]
pub(super) struct MemoryTable {
    /// Ascending by guest address; none overlap.
    regions: Vec<MappedRegion>,
}

#[derive(Clone)]
struct MappedRegion {
    guest: u64,
    size: u64,
    /// Where the front-end has it mapped: ring addresses come in these terms.
    user: u64,
    // Before the mapping: a guard goes before what it guards is unmapped.
    guard: Arc<Guard>,
    mapping: Arc<GuestRegionMmap<()>>,
}

fn refuse(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

impl MemoryTable {
    /// A table of these regions and no others; `files[i]` backs `regions[i]`.
    ///
    /// # Errors
    /// Where a region breaks a rule of crash-safety 4.4, or the host refuses to map it.
    pub(super) fn from_regions(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<MemoryTable> {
        if regions.len() != files.len() {
            return Err(refuse(format!("{} regions with {} files", regions.len(), files.len())));
        }
        let pairs = regions.iter().zip(files);
        pairs.into_iter().try_fold(MemoryTable::default(), |table, (region, file)| table.with_region(region, file))
    }

    /// This table and one region more.
    ///
    /// # Errors
    /// As `from_regions`.
    pub(super) fn with_region(&self, region: &VhostUserMemoryRegion, file: File) -> io::Result<MemoryTable> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let offset = region.mmap_offset;
        let shown = format!("the region of {size:#x} bytes at guest address {guest:#x}");
        if self.regions.len() >= MAX_REGIONS {
            return Err(refuse(format!("{shown} is one more than {MAX_REGIONS}")));
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
        // Before any other question about the file: this one waits for no file system.
        let page = check_memory_file(&file).map_err(|e| refuse(format!("{shown}: {e}")))?;
        let stat = fstat(&file)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0).next_multiple_of(page as u64);
        if file_end > length {
            return Err(refuse(format!("{shown} ends at byte {file_end:#x} of a file of {length:#x}")));
        }
        let mapping =
            region.mmap_region(file).map_err(|e| io::Error::other(format!("{shown} cannot be mapped: {e}")))?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| refuse(format!("{shown} ends beyond 2^64")))?;
        let mapping = Arc::new(mapping);
        let (start, len) = (mapping.get_mmap().as_ptr(), mapping.get_mmap().size());
        // SAFETY: a whole mapping of our own, for reading and writing, which begins at a page since the kernel chose the place and
        // took the offset. Who holds the guard holds the mapping, too, and drops the guard first: this function, `Region` and
        // `SharedMemory`. The guest changes these bytes at any time, so they are reached by raw pointers and atomics only.
        let guard = unsafe { Guard::new(start, len, page) };
        let guard = Arc::new(guard.ok_or_else(no_sigbus_handler)?);
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.guest < guest);
        regions.insert(at, MappedRegion { guest, size, user, guard, mapping });
        Ok(MemoryTable { regions })
    }

    /// This table less one region, named as it was when it came.
    ///
    /// # Errors
    /// Where there is none of that place and size.
    pub(super) fn without_region(&self, region: &VhostUserMemoryRegion) -> io::Result<MemoryTable> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let same = |r: &MappedRegion| (r.guest, r.size, r.user) == (guest, size, user);
        let mut regions = self.regions.clone();
        let at = regions.iter().position(same);
        let at = at.ok_or_else(|| refuse(format!("no region of {size:#x} bytes at guest address {guest:#x}")))?;
        regions.remove(at);
        Ok(MemoryTable { regions })
    }

    /// Whether the front-end has shared nothing yet.
    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The guest address of `len` bytes at the front-end's address `user`; `None` unless one region holds them all.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| user >= r.user && user - r.user < r.size)?;
        let within = user - region.user;
        (len <= region.size - within).then(|| region.guest + within)
    }

    /// Whether a page of it could not be had.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.guard.is_lost())
    }

    /// The form in which rings and requests read and write it.
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
    fn addresses_of_the_front_end_become_guest_addresses() {
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
    fn regions_come_and_go_and_the_mappings_stay() {
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
    fn memory_that_is_taken_away_reads_as_zeros_and_is_noticed() {
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
    fn a_table_has_an_end() {
        let mut table = MemoryTable::default();
        let backing = file(0x1000);
        for i in 0..MAX_REGIONS as u64 {
            table = table.with_region(&region(i << 12, 0x1000, i << 12, 0), backing.try_clone().unwrap()).unwrap();
        }
        assert!(table.with_region(&region(1 << 40, 0x1000, 1 << 40, 0), backing).is_err());
    }
}
