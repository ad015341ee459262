//! Ownership of the file descriptors that this process inherited.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_setfd};

/// Descriptor numbers that are probed if /proc is not available: enough for the sockets of systemd, of which
/// `systemd.rs` accepts at most 4096, and for as many other descriptors.
const PROBED_FDS: std::ops::RangeInclusive<RawFd> = libc::STDERR_FILENO + 1..=8191;

/// The inherited descriptors that nothing in this process owns yet.
#[derive(Debug)]
pub struct InheritedFds(BTreeSet<RawFd>);

impl InheritedFds {
    /// Collects all open descriptors except the standard streams.
    ///
    /// # Safety
    /// No value in this process may own one of these descriptors, now or later, unless the value came from this set.
    /// The caller ensures this by calling `new` once, before any code of the process opens a descriptor.
    pub unsafe fn new() -> InheritedFds {
        let numbers = match std::fs::read_dir("/proc/self/fd") {
            Ok(entries) => entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect::<Vec<_>>(),
            Err(_) => PROBED_FDS.collect(),
        };
        // Removes the descriptor of the listing of /proc/self/fd itself, which is closed by now.
        InheritedFds(numbers.into_iter().filter(|fd| *fd > libc::STDERR_FILENO && is_open(*fd)).collect())
    }

    /// Creates an empty set.
    pub fn empty() -> InheritedFds {
        InheritedFds(BTreeSet::new())
    }

    /// Removes the descriptor `fd` from the set and returns it with its ownership. The descriptor is closed on exec(2).
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
        // SAFETY: `from_raw_fd` requires an open descriptor without another owner. `new` has checked that `fd` was
        // open, and the caller of `new` ensures that nothing else in this process owned `fd`. Since then `fd` was in
        // the set and had no owner, so no safe code can have closed it, and `fd` is still the inherited descriptor.
        // `fd` was removed from the set above, so no second call can take it, and `owned` becomes the only owner.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
        Ok(owned)
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no pointer and changes no state, so the call has no requirement on `fd`. If `fd` is not
    // open, the call fails with EBADF.
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
