//! Operations on paths as text: removing `..`, making them relative or absolute, escaping bytes.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::error::Result;
use crate::image::{file_name, folder_of};
use crate::storage::Env;

/// Removes `.` and `..` from a path as text, without accessing the file system.
pub(super) fn lexically_normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(normal.pop()),
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

/// Returns the absolute path of a file that need not exist. Symbolic links are resolved in its folder, but not in its
/// name.
///
/// # Errors
/// - `Refused` if `path` does not end in a file name
/// - `NotFound`, `Io` if the folder cannot be resolved
pub fn absolute_path(env: &dyn Env, path: &Path) -> Result<PathBuf> {
    let name = file_name(path)?;
    Ok(env.canonical(folder_of(path))?.join(name))
}

/// Returns the path of a file relative to a folder. Both are absolute and have neither `..` nor symbolic links.
pub fn relative_path(folder: &Path, file: &Path) -> PathBuf {
    let common = folder.components().zip(file.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(common).map(|_| Component::ParentDir);
    up.chain(file.components().skip(common)).collect()
}

/// Encodes a path as printable ASCII: all other bytes, and `%`, become `%XX`.
pub(super) fn percent_encode(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => text.push(char::from(byte)),
            _ => write!(text, "%{byte:02X}").expect("writing to a string cannot fail"),
        }
    }
    text
}

/// Decodes the text of [`percent_encode`]; `None` for a malformed escape.
pub(super) fn percent_decode(text: &str) -> Option<PathBuf> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    Some(OsStr::from_bytes(&bytes).into())
}
