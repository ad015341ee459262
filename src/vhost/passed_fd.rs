//! Checks of descriptors that a front-end passes, by system calls that cannot block.
//!
//! A system call on a FUSE file, a full pipe or a socket can block a thread for as long as the peer likes, and not even
//! SIGKILL interrupts the wait for a FUSE server. So the first system call on a passed descriptor is one that the
//! kernel completes without the peer.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl, fstatfs, readlinkat, statx,
};
use rustix::param::page_size;

/// File system type of hugetlbfs in `statfs` (linux/magic.h).
const HUGETLBFS: i64 = 0x9584_58F6;

fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Returns the error for memory that cannot be guarded against SIGBUS.
pub(super) fn no_sigbus_handler() -> io::Error {
    io::Error::other("cannot catch SIGBUS, so a front-end that truncates its memory file could kill the daemon")
}

/// Checks that a file is memory (a memfd, or a file on tmpfs or hugetlbfs), and returns its page size.
///
/// # Errors
/// * `InvalidInput` if the file is not memory, since its file system may be slow, full or hostile.
/// * Any error of fstatfs(2).
pub(super) fn check_memory_file(file: &File) -> io::Result<usize> {
    // Only files in memory have seals. The kernel completes F_GET_SEALS without calling the file system.
    fcntl_get_seals(file).map_err(|_| {
        refuse(
            "not a file in memory (memfd, tmpfs or hugetlbfs). Share the guest's memory by a memfd (QEMU: -object \
             memory-backend-memfd,share=on; libvirt: <source type='memfd'/>), or by a file on tmpfs or hugetlbfs \
             (memory-backend-file,share=on,mem-path=/dev/shm; libvirt: memory_backing_dir in qemu.conf)",
        )
    })?;
    let file_system = fstatfs(file)?;
    let page = match file_system.f_type {
        HUGETLBFS => usize::try_from(file_system.f_bsize).unwrap_or(0),
        _ => page_size(),
    };
    if page.is_power_of_two() { Ok(page) } else { Err(refuse("the file system reports no page size")) }
}

/// Checks that a descriptor is an eventfd.
///
/// # Errors
/// * `InvalidInput` if the descriptor is not an eventfd, since a call on it may block.
/// * Any error of statx(2), which is called if /proc is not available.
pub(super) fn check_eventfd(file: &File) -> io::Result<()> {
    // The kernel returns this link without a call to the file system of the open file. Without /proc, the file type is
    // the best evidence: only anonymous inodes have no type.
    let is_counter = match readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), []) {
        Ok(name) => name.as_bytes() == b"anon_inode:[eventfd]",
        Err(_) => {
            // With DONT_SYNC, FUSE returns cached attributes and does not wait for its server.
            let stat = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
            FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Unknown
        }
    };
    if is_counter { Ok(()) } else { Err(refuse("not an eventfd")) }
}

/// Checks that a descriptor is an eventfd, and makes it non-blocking for the daemon and the front-end. Otherwise a
/// write to an eventfd whose counter is at its limit would block until the front-end reads the eventfd.
///
/// # Errors
/// * `InvalidInput` if the descriptor is not an eventfd, since a call on it may block.
/// * Any error of statx(2), which is called if /proc is not available, or of fcntl(2).
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
    fn only_files_in_memory_are_accepted() {
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
    fn only_eventfds_are_accepted_and_become_non_blocking() {
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
