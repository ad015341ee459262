//! Descriptors that a front-end passes: what they may be, found out without waiting for anybody.
//!
//! A descriptor of a FUSE file, a full pipe or a socket can hold a thread for as long as its owner likes, and not even SIGKILL
//! ends the wait for a FUSE server. So the first question about any descriptor is one that the kernel answers by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl, fstatfs, readlinkat, statx,
};
use rustix::param::page_size;

/// What `statfs` reports for hugetlbfs (linux/magic.h).
const HUGETLBFS: i64 = 0x9584_58F6;

fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// The refusal of memory that could not be guarded.
pub(super) fn no_sigbus_handler() -> io::Error {
    io::Error::other("SIGBUS cannot be caught, and without that a page that is taken back would end the daemon")
}

/// Checks that a file is memory (a memfd, or a file on tmpfs or hugetlbfs), and returns the bytes of its pages.
///
/// # Errors
/// `InvalidInput` for any other file: its pages would come from a file system that may be slow, full, or hostile.
pub(super) fn check_memory_file(file: &File) -> io::Result<usize> {
    // Only files in memory have seals. The kernel answers this without asking a file system.
    fcntl_get_seals(file).map_err(|_| {
        refuse(
            "it is not a file in memory (memfd, tmpfs, hugetlbfs). Share the guest's memory by a memfd (QEMU: -object \
             memory-backend-memfd,share=on; libvirt: <source type='memfd'/>), or by a file on tmpfs or hugetlbfs \
             (memory-backend-file,share=on,mem-path=/dev/shm; libvirt: memory_backing_dir in qemu.conf)",
        )
    })?;
    let file_system = fstatfs(file)?;
    let page = match file_system.f_type {
        HUGETLBFS => usize::try_from(file_system.f_bsize).unwrap_or(0),
        _ => page_size(),
    };
    if page.is_power_of_two() { Ok(page) } else { Err(refuse("its file system reports no page size")) }
}

/// Checks that a descriptor is an event counter (eventfd).
///
/// # Errors
/// `InvalidInput` for any other descriptor: its answers may depend on others.
pub(super) fn check_eventfd(file: &File) -> io::Result<()> {
    // The name of an open file comes from the kernel alone. Without /proc the type has to do: a file without a type has no
    // file system that could block.
    let is_counter = match readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), []) {
        Ok(name) => name.as_bytes() == b"anon_inode:[eventfd]",
        Err(_) => {
            // `DONT_SYNC`: FUSE answers from its cache.
            let told = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
            FileType::from_raw_mode(told.stx_mode.into()) == FileType::Unknown
        }
    };
    if is_counter { Ok(()) } else { Err(refuse("it is not an event counter (eventfd)")) }
}

/// The same for a counter that the daemon writes. It becomes non-blocking, for the front-end, too: a write to a counter at its
/// limit would otherwise wait for the front-end to read it.
///
/// # Errors
/// As [`event_counter`].
pub(super) fn check_writable_eventfd(file: &File) -> io::Result<()> {
    check_eventfd(file)?;
    Ok(fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn only_memory_is_memory() {
        let memory = File::from(memfd_create("m", MemfdFlags::CLOEXEC).unwrap());
        assert_eq!(check_memory_file(&memory).unwrap(), page_size());
        assert!(check_memory_file(&tempfile::tempfile_in("/dev/shm").unwrap()).is_ok());
        let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for other in [disk, File::open("/dev/zero").unwrap(), File::open("/proc/self/status").unwrap()] {
            let why = check_memory_file(&other).unwrap_err().to_string();
            assert!(why.contains("memfd"), "{why}");
        }
    }

    #[test]
    fn only_event_counters_are_counters_and_they_do_not_block() {
        let mut counter = File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        check_writable_eventfd(&counter).unwrap();
        counter.write_all((u64::MAX - 1).as_bytes()).unwrap();
        let full = counter.write(1u64.as_bytes()).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let (reader, writer) = io::pipe().unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let others =
            [reader.into(), writer.into(), a.into(), b.into(), memfd_create("m", MemfdFlags::CLOEXEC).unwrap()];
        for other in others.map(File::from).iter().chain([&File::open("/dev/null").unwrap()]) {
            assert!(check_writable_eventfd(other).is_err(), "{other:?}");
        }
    }
}
