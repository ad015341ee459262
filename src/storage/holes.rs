//! Finds the ranges of a file that contain data, and tests whether bytes in memory are zero.

use std::ops::Range;

use super::File;
use crate::error::{Error, Result};

/// Returns the first part of `range` that is not a hole; `None` if there is none. If the file system cannot report
/// holes, the whole range up to the end of the file counts as data.
///
/// # Errors
/// `Io`.
pub fn next_data(file: &File, range: Range<u64>) -> Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    match file.next_data(range.start) {
        Ok(Some((start, len))) => {
            let found = start..(start + len).min(range.end);
            Ok((!found.is_empty()).then_some(found))
        }
        Ok(None) => Ok(None),
        Err(e) if is_seek_unsupported(&e) => {
            let found = range.start..range.end.min(file.stat()?.len);
            Ok((!found.is_empty()).then_some(found))
        }
        Err(e) => Err(e),
    }
}

/// Returns whether an error means that the file system cannot report holes.
pub fn is_seek_unsupported(e: &Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// Returns whether all bytes are zero. Compares 64 bytes at a time, so that the compiler uses vector instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::storage::Env;
    use crate::storage::sim::SimHost;

    #[test]
    fn data_is_found_between_holes_and_not_beyond_the_range() {
        let host = SimHost::new(1);
        let file = host.folder(Path::new("/d")).unwrap().create("f".as_ref()).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_at(&[1; 1024], 4096).unwrap();
        let found = |range| next_data(&file, range).unwrap();
        assert_eq!((found(0..1 << 20), found(4608..1 << 20)), (Some(4096..5120), Some(4608..5120)));
        assert_eq!((found(0..4200), found(0..4096), found(5120..1 << 20)), (Some(4096..4200), None, None));
        assert_eq!(found(Range { start: 9, end: 3 }), None);
        assert!(is_zero(&[0; 100]) && !is_zero(&[&[0; 99][..], &[1]].concat()) && is_zero(&[]));
    }
}
