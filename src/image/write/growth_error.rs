//! The errors of a step of growth: no space, too large, or another failure.

use std::io;
use std::path::Path;

use crate::error::{Error, ErrorKind};

/// Converts `source`, the failure of a step of growth of the image at `path`.
pub(super) fn growth_error(path: &Path, source: io::Error) -> Error {
    let error = if is_too_large(&source) {
        let what = "the file cannot grow beyond the size limit of the process (ulimit -f) or of the file system";
        Error::io(what, source)
    } else if is_no_space(&source) {
        let what = "no space for another block; free some space on the file system";
        Error::new(ErrorKind::NoSpace, what).caused_by(source)
    } else {
        Error::io("cannot grow", source)
    };
    error.at_path(path)
}

/// Whether the file system or the quota is full.
pub(super) fn is_no_space(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether the file would exceed a size limit. Unlike with a full file system, waiting does not help.
pub(super) fn is_too_large(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::FileTooLarge
}
