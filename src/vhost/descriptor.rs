//! Descriptors that a front-end passes: what they may be, found out without waiting for anybody.
//!
//! A descriptor of a FUSE file, a full pipe or a socket can hold a thread for as long as its owner likes, and not even SIGKILL
//! ends the wait for a FUSE server. So the first question about any descriptor is one that the kernel answers by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl, fstatfs, statx};

/// What `statfs` reports for hugetlbfs (linux/magic.h).
const HUGETLBFS: i64 = 0x9584_58F6;

fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Checks that a file is memory (a memfd, or a file on tmpfs or hugetlbfs), and returns the bytes of its pages.
///
/// # Errors
/// `InvalidInput` for any other file: its pages would come from a file system that may be slow, full, or hostile.
pub(super) fn memory_page(file: &File) -> io::Result<usize> {
    // Only files in memory have seals. The kernel answers this without asking a file system.
    fcntl_get_seals(file).map_err(|_| {
        refuse("it is not a file in memory (memfd, tmpfs, hugetlbfs): share the guest's memory by a memfd, in QEMU by \
                -object memory-backend-memfd,share=on")
    })?;
    let told = fstatfs(file)?;
    let page = if told.f_type == HUGETLBFS { usize::try_from(told.f_bsize).unwrap_or(0) } else { rustix::param::page_size() };
    if page.is_power_of_two() { Ok(page) } else { Err(refuse("its file system reports no page size")) }
}

/// Checks that a descriptor is an event counter (eventfd), and makes it non-blocking.
///
/// # Errors
/// `InvalidInput` for any other descriptor: a write to it could block the thread of a queue.
pub(super) fn event_counter(file: &File) -> io::Result<()> {
    // Descriptors without a file behind them (eventfd and its like) have no type. `DONT_SYNC`: FUSE answers from its cache.
    let told = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    let link = rustix::fs::readlinkat(rustix::fs::CWD, format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)), []);
    // Without /proc the type has to do: no other descriptor without a file takes writes that block.
    let is_counter = link.map_or(true, |name| name.as_bytes() == b"anon_inode:[eventfd]");
    if FileType::from_raw_mode(told.stx_mode.into()) != FileType::Unknown || !is_counter {
        return Err(refuse("it is no event counter (eventfd)"));
    }
    let flags = fcntl_getfl(file.as_fd())?;
    Ok(fcntl_setfl(file.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn only_memory_is_memory() {
        let memory = File::from(memfd_create("m", MemfdFlags::CLOEXEC).unwrap());
        assert_eq!(memory_page(&memory).unwrap(), rustix::param::page_size());
        assert!(memory_page(&tempfile::tempfile_in("/dev/shm").unwrap()).is_ok());
        let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for other in [disk, File::open("/dev/zero").unwrap(), File::open("/proc/self/status").unwrap()] {
            let why = memory_page(&other).unwrap_err().to_string();
            assert!(why.contains("memfd"), "{why}");
        }
    }

    #[test]
    fn only_event_counters_are_counters_and_they_do_not_block() {
        let mut counter = File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        event_counter(&counter).unwrap();
        counter.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        let full = counter.write(&1u64.to_ne_bytes()).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let (reader, writer) = io::pipe().unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let others = [reader.into(), writer.into(), a.into(), b.into(), memfd_create("m", MemfdFlags::CLOEXEC).unwrap()];
        for other in others.map(File::from).iter().chain([&File::open("/dev/null").unwrap()]) {
            assert!(event_counter(other).is_err(), "{other:?}");
        }
    }
}
