//! File descriptors that the starting process left open for this one, by number.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_setfd};

/// The first number that is looked at without /proc, and the last: LISTEN_FDS has at most 4096.
const PROBED_FDS: std::ops::RangeInclusive<RawFd> = libc::STDERR_FILENO + 1..=8191;

/// The descriptors that this process inherited and that nothing in it owns yet.
#[derive(Debug)]
pub struct InheritedFds(BTreeSet<RawFd>);

impl InheritedFds {
    /// All descriptors that are open now, but the standard streams.
    ///
    /// # Safety
    /// Nothing in this process owns any of them: it has opened none so far, and this is called once.
    pub unsafe fn new() -> InheritedFds {
        let numbers = match std::fs::read_dir("/proc/self/fd") {
            Ok(entries) => entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect::<Vec<_>>(),
            Err(_) => PROBED_FDS.collect(),
        };
        // The listing has a descriptor of its own, which is closed by now.
        InheritedFds(numbers.into_iter().filter(|fd| *fd > libc::STDERR_FILENO && is_open(*fd)).collect())
    }

    /// No descriptors.
    pub fn empty() -> InheritedFds {
        InheritedFds(BTreeSet::new())
    }

    /// Gives the descriptor of this number away.
    ///
    /// # Errors
    /// If the number is standard input, output or error, was not open when the process started, or is named twice.
    pub(super) fn take(&mut self, fd: RawFd) -> io::Result<OwnedFd> {
        if (0..=libc::STDERR_FILENO).contains(&fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is one of the standard streams"));
        }
        if !self.0.remove(&fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it was not handed over, or is named twice"));
        }
        // SAFETY: the number was open when the process started, and nothing owned it then (`new`). Nothing closed it since, as
        // only an owner may, so no descriptor of our own has its number. It leaves the set, so it gets one owner.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
        Ok(owned)
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no pointer and changes nothing; on a number that is not open it fails with EBADF.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_number_has_one_owner() {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        // Only what the test itself has given up.
        let mut inherited = InheritedFds(BTreeSet::from([number]));
        for other in [0, 2, -1, 1 << 20] {
            assert!(inherited.take(other).is_err(), "{other}");
        }
        let first = inherited.take(number).unwrap();
        assert!(inherited.take(number).is_err());
        assert!(InheritedFds::empty().take(number).is_err());
        drop(first);
    }
}
