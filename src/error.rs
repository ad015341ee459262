//! The one error type: a kind to match, a sentence to read, the file and offset it is about, and what caused it.
//!
//! Callers branch on [`ErrorKind`]; people read the rest. A message says what failed, on which file, at which
//! offset, why, and, where there is something to do, what.

use std::path::{Path, PathBuf};
use std::{error, fmt, io};

/// What callers may want to tell apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// The host failed a read, a write or a sync.
    Io,
    /// The host has no room left.
    NoSpace,
    /// The bytes of an image break a rule of the format.
    Invalid,
    /// A policy says no: a parent outside the allowed folders, a sealed image, too deep a chain.
    Refused,
    /// A file or a parent is not there.
    NotFound,
    /// Somebody else holds the image.
    Busy,
    /// Nothing is wrong, but this cannot be done here.
    Unsupported,
    /// An earlier failed sync made the image unsafe to write until it is opened again.
    Poisoned,
}

/// A failure, with its context. Small on the good path: one pointer.
pub struct Error(Box<Body>);

struct Body {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure described by one sentence without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Error {
        Error(Box::new(Body { kind, message: what.into(), path: None, offset: None, source: None }))
    }

    /// A failed call to the host; the kind follows from the code it returned.
    pub fn io(what: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Error::new(kind, what).caused_by(source)
    }

    /// Names the file. The innermost name stays.
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Error {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Says `to` where it named `from`: for a file that is made under another name first.
    pub fn replace_path(mut self, from: &Path, to: &Path) -> Error {
        if self.path() == Some(from) {
            self.0.path = Some(to.to_path_buf());
        }
        self
    }

    /// Names the byte offset in the file. The innermost offset stays.
    pub fn at_offset(mut self, offset: u64) -> Error {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Removes the offset: for a number from the command line, which stands at no byte of the file.
    #[must_use]
    pub fn without_offset(mut self) -> Error {
        self.0.offset = None;
        self
    }

    /// Attaches the cause.
    pub fn caused_by(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// What callers branch on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file it is about.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset in that file.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The code of the host's error at the bottom, if it came from there.
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

    /// Whether the host does not let this user do it, or cannot do it on this file system at all.
    pub fn is_denied(&self) -> bool {
        matches!(self.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP))
    }

    /// The whole story on one line: what failed, path, offset, and the chain of causes.
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

/// `None` for what does not exist.
///
/// # Errors
/// All others.
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
    fn a_line_tells_what_where_and_why() {
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
