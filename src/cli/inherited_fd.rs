//! File descriptors that this process inherited, by number.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_setfd};

/// Numbers that are probed if /proc is not available. LISTEN_FDS has at most 4096 descriptors.
const PROBED_FDS: std::ops::RangeInclusive<RawFd> = libc::STDERR_FILENO + 1..=8191;

/// The inherited descriptors that nothing in this process owns yet.
#[derive(Debug)]
pub struct InheritedFds(BTreeSet<RawFd>);

impl InheritedFds {
    /// Collects all open descriptors except the standard streams.
    ///
    /// # Safety
    /// Nothing in this process may own any of these descriptors: the caller has opened none so far, and calls this once.
    pub unsafe fn new() -> InheritedFds {
        let numbers = match std::fs::read_dir("/proc/self/fd") {
            Ok(entries) => entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect::<Vec<_>>(),
            Err(_) => PROBED_FDS.collect(),
        };
        // Drops the descriptor of the listing itself, which is closed by now.
        InheritedFds(numbers.into_iter().filter(|fd| *fd > libc::STDERR_FILENO && is_open(*fd)).collect())
    }

    /// Creates an empty set.
    pub fn empty() -> InheritedFds {
        InheritedFds(BTreeSet::new())
    }

    /// Takes the descriptor of this number out of the set, as an owned one.
    ///
    /// # Errors
    /// * `InvalidInput`: the number is one of the standard streams, was not open when the process started, or was taken
    ///   before.
    /// * Any error of fcntl(2).
    pub(super) fn take(&mut self, fd: RawFd) -> io::Result<OwnedFd> {
        if (0..=libc::STDERR_FILENO).contains(&fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a standard stream"));
        }
        if !self.0.remove(&fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it was not handed over, or is given twice"));
        }
        // SAFETY: `fd` was open and without an owner when the set was created, as the caller of `new` promised. It has had
        // no owner since, because the set contains it, so nothing may have closed it and it still is the inherited
        // descriptor. It was removed from the set above, so `owned` becomes its only owner.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
        Ok(owned)
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no pointer and changes nothing. If `fd` is not open, the call fails with EBADF.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_number_has_one_owner() {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        // The test has given up ownership of this number only.
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
