//! File descriptors that whoever started us left open for us, by number.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers taken over already: a number has one owner.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes over the open file descriptor of this number. To be called before the process opens files of its own.
///
/// # Errors
/// Where the number is standard input, output or error, is not open, or was taken over before.
pub(super) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is one of the standard streams"));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: F_SETFD takes no pointer; on a number that is not open it fails with EBADF and changes nothing.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if !taken.insert(fd) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is named twice"));
    }
    // SAFETY: the number is open (F_SETFD succeeded), and nobody in this process owns it: it came from outside, by
    // the word of the caller's user, this is called before the process opens files of its own, and a number is
    // handed out once, which `TAKEN` sees to.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_number_has_one_owner() {
        assert!(adopt(0).is_err() && adopt(2).is_err() && adopt(-1).is_err());
        assert!(adopt(1 << 20).is_err(), "not open");
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let first = adopt(number).unwrap();
        assert!(adopt(number).is_err());
        drop(first);
    }
}
