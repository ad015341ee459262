//! Flags, retries and error texts that all calls on files of the host share.

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, ErrorKind};
use crate::storage::types::Access;

/// Flags with which every file is opened: not inherited by child processes, no waiting for the other end of a FIFO, no
/// controlling terminal.
pub(super) const OPEN_FLAGS: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Returns the open flags of an access mode.
pub(super) fn access_flags(access: Access) -> OFlags {
    match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    }
}

/// Repeats a call while a signal interrupts it.
pub(super) fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Converts an error of opening a file: to `Refused` if the error shows that the path does not lead to a regular file,
/// else as [`Error::io`] does. The open itself fails for a socket (ENXIO), for a device without a driver (ENXIO or
/// ENODEV), and for a folder that is opened for writing (EISDIR). Other files that are not regular are opened, and
/// `HostFile::new` refuses them.
pub(super) fn open_error(e: Errno) -> Error {
    match e {
        Errno::NXIO | Errno::ISDIR | Errno::NODEV => {
            Error::new(ErrorKind::Refused, "not a regular file").caused_by(std::io::Error::from(e))
        }
        e => Error::io("cannot open the file", e.into()),
    }
}
