//! The error type of the crate: a kind to match, a message, the file and offset that it concerns, and its cause.
//!
//! Callers branch on [`ErrorKind`]; users read the rest. A message states what failed, on which file, at which offset,
//! why, and, if the user can do something about it, what to do.

use std::path::{Path, PathBuf};
use std::{error, fmt, io};

/// Kinds of errors that callers distinguish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// A system call failed, for example a read, a write or a sync.
    Io,
    /// The file system is full, or a quota is used up.
    NoSpace,
    /// An image, or another input such as a configuration file, a merge record or a virtqueue, breaks a rule of its
    /// format.
    Invalid,
    /// A rule of diffdisk or an option forbids the operation (for example a parent outside the allowed folders, or a
    /// chain that is too deep), or the user interrupted it.
    Refused,
    /// A file or a parent does not exist.
    NotFound,
    /// A file, block device, socket or queue is in use, or a file changed while it was opened. A later attempt may
    /// succeed.
    Busy,
    /// The operation is not possible for this image, on this file system or with these arguments.
    Unsupported,
    /// An earlier sync failed, so the image must not be written until it is opened again.
    Poisoned,
}

/// An error with its context. An `Error` has the size of a pointer.
pub struct Error(Box<Body>);

struct Body {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    is_from_sync: bool,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

/// The result type of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Creates an error from a message, which is one sentence without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Error {
        let body = Body { kind, message: what.into(), path: None, offset: None, is_from_sync: false, source: None };
        Error(Box::new(body))
    }

    /// Creates an error for a failed system call. The kind follows from the error code.
    pub fn io(what: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Error::new(kind, what).caused_by(source)
    }

    /// Adds the file that the error concerns, unless the error has one already.
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Error {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Replaces the path `from` by `to`, for a file that is created under a temporary name.
    pub fn replace_path(mut self, from: &Path, to: &Path) -> Error {
        if self.path() == Some(from) {
            self.0.path = Some(to.to_path_buf());
        }
        self
    }

    /// Adds the byte offset in the file, unless the error has one already.
    pub fn at_offset(mut self, offset: u64) -> Error {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Removes the offset, for an error about a value that comes from the command line and not from a file.
    #[must_use]
    pub fn without_offset(mut self) -> Error {
        self.0.offset = None;
        self
    }

    /// Records that a sync of a file failed.
    #[must_use]
    pub fn from_sync(mut self) -> Error {
        self.0.is_from_sync = true;
        self
    }

    /// Returns whether a sync of a file failed: the kernel may have dropped what the sync should have made durable, and
    /// a later sync succeeds without it.
    pub fn is_from_sync(&self) -> bool {
        self.0.is_from_sync
    }

    /// Attaches the cause.
    pub fn caused_by(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the message without the path, the offset and the causes.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the file that the error concerns.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Returns the byte offset in the file that the error concerns.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// Returns the code of the first system call error in the chain of causes, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        let mut next: Option<&(dyn error::Error + 'static)> = Some(self);
        while let Some(e) = next {
            if let Some(code) = e.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                return Some(code);
            }
            next = e.source();
        }
        None
    }

    /// Returns whether a system call failed because the process lacks a permission, or because the kernel or file
    /// system does not support the call.
    pub fn is_denied(&self) -> bool {
        matches!(self.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP))
    }

    /// Formats the error on one line: path, message, offset, and the chain of causes.
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut next = error::Error::source(self);
        while let Some(e) = next {
            line.push_str(": ");
            line.push_str(&e.to_string());
            next = e.source();
        }
        line.replace(['\n', '\r'], " ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.0;
        match &b.path {
            Some(p) => write!(f, "{}: {}", p.display(), b.message)?,
            None => f.write_str(&b.message)?,
        }
        match b.offset {
            Some(at) => write!(f, " (at byte {at})"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.line())
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

/// Converts a [`NotFound`](ErrorKind::NotFound) error to `None`.
///
/// # Errors
/// Any error of `outcome` of another kind.
pub fn none_if_not_found<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_path_message_offset_and_cause() {
        let e = Error::io("cannot read the footer", io::Error::from_raw_os_error(libc::EIO)).at_offset(512);
        let e = e.at_path("/a/b.vhd").at_path("/other");
        assert_eq!(e.kind(), ErrorKind::Io);
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
        assert!(e.line().starts_with("/a/b.vhd: cannot read the footer (at byte 512): "), "{}", e.line());
        assert_eq!(e.replace_path(Path::new("/a/b.vhd"), Path::new("/c")).path(), Some(Path::new("/c")));
        let full = Error::io("cannot grow", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.kind(), ErrorKind::NoSpace);
    }
}
