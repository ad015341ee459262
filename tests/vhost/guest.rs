//! A guest without a driver: the test writes rings and requests into pages of a memory file and can remove each page.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use zerocopy::IntoBytes;

use super::raw::*;
use super::setup::event;

/// Front-end address of the guest's memory, which begins at guest address 0.
pub(crate) const USER: u64 = 0x7000_0000;
pub(crate) const PAGE: u64 = 4096;
/// Number of descriptors in the ring.
const SIZE: u16 = 64;
/// Maximum number of requests in flight.
pub(crate) const SLOTS: u16 = 8;
/// DISCARD, WRITE_ZEROES, indirect descriptors.
const MORE_FEATURES: u64 = 1 << 13 | 1 << 14 | 1 << 28;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The parts of the guest's memory. Each has a page of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    Table,
    Avail,
    Used,
    Header,
    Status,
    Data,
    Indirect,
}

pub(crate) const PARTS: [Part; 7] =
    [Part::Table, Part::Avail, Part::Used, Part::Header, Part::Status, Part::Data, Part::Indirect];

/// The type of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum GuestRequest {
    Read,
    Write,
    GetId,
    WriteZeroes,
    /// A read described by a table of indirect descriptors.
    Indirect,
}

pub(crate) const GUEST_REQUESTS: [GuestRequest; 5] =
    [GuestRequest::Read, GuestRequest::Write, GuestRequest::GetId, GuestRequest::WriteZeroes, GuestRequest::Indirect];

#[derive(Debug)]
pub(crate) struct ManualGuest {
    pub(crate) ram: File,
    pub(crate) kick: File,
    pub(crate) call: File,
    /// The part in the last page.
    last: Part,
    /// Number of published requests.
    pub(crate) submitted: u16,
}

impl ManualGuest {
    /// Creates a guest with the part `last` in the last page of its memory.
    pub(crate) fn new(last: Part) -> ManualGuest {
        let ram = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        ram.set_len(PARTS.len() as u64 * PAGE).unwrap();
        // The seal prevents a write after a truncation from bringing the removed page back.
        fcntl_add_seals(&ram, SealFlags::GROW).unwrap();
        ManualGuest::with_memory(ram, last)
    }

    /// Creates a guest over a given file of at least 7 pages, with the part `last` in the last page.
    pub(crate) fn with_memory(ram: File, last: Part) -> ManualGuest {
        ManualGuest { ram, kick: event(), call: event(), last, submitted: 0 }
    }

    /// Returns the guest address of a part. Parts follow the order of [`PARTS`], but `self.last` and the last part are
    /// swapped.
    fn part_address(&self, part: Part) -> u64 {
        let place = |part: Part| PARTS.iter().position(|p| *p == part).unwrap() as u64;
        let last = PARTS.len() as u64 - 1;
        PAGE * match place(part) {
            _ if part == self.last => last,
            p if p == last => place(self.last),
            p => p,
        }
    }

    /// Writes into the page of a part, if the page still exists.
    fn put(&self, part: Part, offset: u64, bytes: &[u8]) {
        let _ = self.ram.write_all_at(bytes, self.part_address(part) + offset);
    }

    /// Describes memory and ring 0 to the daemon, without SET_VRING_ENABLE.
    pub(crate) fn attach(&self, front_end: &mut FrontEnd) {
        self.attach_to(front_end, 0);
    }

    /// Describes memory and the ring of a given queue to the daemon, without SET_VRING_ENABLE.
    pub(crate) fn attach_to(&self, front_end: &mut FrontEnd, queue: u32) {
        assert!(front_end.set(SET_FEATURES, (FEATURES | MORE_FEATURES).as_bytes(), &[]));
        let region = [0u64.as_bytes(), [0, PARTS.len() as u64 * PAGE, USER, 0].as_bytes()].concat();
        assert!(front_end.set(ADD_MEM_REG, &region, &[self.ram.as_fd()]));
        assert!(front_end.set(SET_VRING_NUM, [queue, u32::from(SIZE)].as_bytes(), &[]));
        let [table, avail, used] = [Part::Table, Part::Avail, Part::Used].map(|part| USER + self.part_address(part));
        let places = [table, used, avail, 0];
        assert!(front_end.set(SET_VRING_ADDR, &[[queue, 0].as_bytes(), places.as_bytes()].concat(), &[]));
        assert!(front_end.set(SET_VRING_BASE, [queue, 0].as_bytes(), &[]));
        assert!(front_end.set(SET_VRING_CALL, u64::from(queue).as_bytes(), &[self.call.as_fd()]));
        assert!(front_end.set(SET_VRING_KICK, u64::from(queue).as_bytes(), &[self.kick.as_fd()]));
    }

    pub(crate) fn enable(&self, front_end: &mut FrontEnd) -> bool {
        front_end.set(SET_VRING_ENABLE, [0u32, 1].as_bytes(), &[])
    }

    /// Writes a request into the avail ring, without publishing the index. Requests for a range are for sector 8.
    pub(crate) fn prepare(&self, ask: GuestRequest) {
        let slot = self.submitted % SLOTS;
        let offset = u64::from(slot);
        let (kind, sector): (u32, u64) = match ask {
            GuestRequest::Read | GuestRequest::Indirect => (0, 8),
            GuestRequest::Write => (1, 8),
            GuestRequest::GetId => (8, 0),
            GuestRequest::WriteZeroes => (13, 0),
        };
        self.put(Part::Header, 16 * offset, &[[kind, 0].as_bytes(), sector.as_bytes()].concat());
        let data = self.part_address(Part::Data) + 512 * offset;
        let (len, flags) = match ask {
            GuestRequest::Read | GuestRequest::Indirect => (512u32, WRITE),
            GuestRequest::Write => (512, 0),
            GuestRequest::GetId => (20, WRITE),
            GuestRequest::WriteZeroes => {
                self.put(Part::Data, 512 * offset, &[8u64.as_bytes(), [1u32, 0].as_bytes()].concat());
                (16, 0)
            }
        };
        let header = self.part_address(Part::Header) + 16 * offset;
        let status = self.part_address(Part::Status) + offset;
        let chain = [(header, 16, 0), (data, len, flags), (status, 1, WRITE)];
        let describe = |first: u16| {
            let one = |(n, (addr, len, flags)): (u16, (u64, u32, u16))| {
                let next = if n < 2 { NEXT } else { 0 };
                [addr.as_bytes(), len.as_bytes(), (flags | next).as_bytes(), (first + n + 1).as_bytes()].concat()
            };
            (0u16..).zip(chain).flat_map(one).collect::<Vec<u8>>()
        };
        let head = 3 * slot;
        if ask == GuestRequest::Indirect {
            self.put(Part::Indirect, 48 * offset, &describe(0));
            let table = self.part_address(Part::Indirect) + 48 * offset;
            let one = [table.as_bytes(), 48u32.as_bytes(), INDIRECT.as_bytes(), 0u16.as_bytes()].concat();
            self.put(Part::Table, 16 * u64::from(head), &one);
        } else {
            self.put(Part::Table, 16 * u64::from(head), &describe(head));
        }
        self.put(Part::Avail, 4 + 2 * u64::from(self.submitted % SIZE), head.as_bytes());
    }

    /// Publishes the index of the prepared request, and kicks.
    pub(crate) fn publish(&mut self) {
        self.submitted = self.submitted.wrapping_add(1);
        self.put(Part::Avail, 2, self.submitted.as_bytes());
        self.notify();
    }

    /// Writes to the kick eventfd.
    pub(crate) fn notify(&self) {
        rustix::io::write(&self.kick, 1u64.as_bytes()).unwrap();
    }

    /// Writes to every page except the last, so that a file with holes has its only hole there.
    pub(crate) fn allocate_pages(&self) {
        for part in PARTS.into_iter().filter(|part| *part != self.last) {
            self.put(part, PAGE - 1, &[1]);
        }
    }

    /// Returns the number of completed requests.
    pub(crate) fn completed(&self) -> u16 {
        let mut index = 0u16;
        // The index stays zero if the page was removed.
        let _ = self.ram.read_exact_at(index.as_mut_bytes(), self.part_address(Part::Used) + 2);
        index
    }

    /// Waits until all requests are completed. Returns false after 21 seconds.
    pub(crate) fn wait(&self) -> bool {
        let begun = std::time::Instant::now();
        while self.completed() != self.submitted {
            if begun.elapsed().as_secs() > 20 {
                return false;
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        true
    }

    /// Returns the status byte of the last published request.
    pub(crate) fn status(&self) -> u8 {
        let mut status = [0xff];
        let slot = u64::from(self.submitted.wrapping_sub(1) % SLOTS);
        self.ram.read_exact_at(&mut status, self.part_address(Part::Status) + slot).unwrap();
        status[0]
    }

    /// Removes the last page by truncating the memory file.
    pub(crate) fn truncate_last_page(&self) {
        self.ram.set_len((PARTS.len() as u64 - 1) * PAGE).unwrap();
    }
}
