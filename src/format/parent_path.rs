//! Paths to a parent: decoded from the texts in an image to paths of this system, and encoded again.
//!
//! The image may be hostile. A path from [`normalise`] is untrusted: the chain opens it only below allowed folders.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Maximum length of a locator text that is read (O11), in bytes.
pub const MAX_TEXT_BYTES: u32 = 4096;
/// Maximum length of a parent's name in the header, in UTF-16 units: one less than fits in the field.
const NAME_UNITS: usize = 255;

/// A path in the notation of this system, without `.` components.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ParentPath {
    /// Relative to the child's folder.
    Relative(PathBuf),
    /// From the root of the file system.
    Absolute(PathBuf),
}

impl ParentPath {
    /// Returns the path.
    pub fn as_path(&self) -> &Path {
        match self {
            ParentPath::Relative(path) | ParentPath::Absolute(path) => path,
        }
    }
}

/// Converts a text of a locator or of the header to a path of this system. It accepts backslashes, drive letters and
/// file URLs.
///
/// # Errors
/// The reason, as text, if the text is longer than 4096 bytes, has a zero byte, or names no file on this system: a path
/// on another host, a URL that is not a file URL, or a path without a file name.
pub fn normalise(text: &[u8]) -> std::result::Result<ParentPath, &'static str> {
    if text.len() > MAX_TEXT_BYTES as usize {
        return Err("longer than 4096 bytes");
    }
    if text.contains(&0) {
        return Err("it holds a zero byte");
    }
    let text: Vec<u8> = text.iter().map(|&byte| if byte == b'\\' { b'/' } else { byte }).collect();
    let mut rest = text.as_slice();
    if let Some(url) = strip_prefix_ignoring_case(rest, b"file://") {
        // By the standard the first component is a host, but vhd-util and others begin the path there.
        rest = strip_prefix_ignoring_case(url, b"localhost").filter(|path| path.starts_with(b"/")).unwrap_or(url);
        if let Some(path) = rest.strip_prefix(b"/").filter(|path| without_drive(path).is_some()) {
            rest = path;
        }
    } else if is_url(rest) {
        return Err("a URL");
    }
    if let Some(path) = rest.strip_prefix(b"//?/") {
        rest = path;
        if strip_prefix_ignoring_case(rest, b"unc/").is_some() {
            return Err("on another host");
        }
    } else if rest.starts_with(b"//") {
        return Err("on another host");
    }
    rest = without_drive(rest).unwrap_or(rest);
    let parts = || rest.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    match parts().next_back() {
        None | Some(b"..") => return Err("no file name"),
        Some(_) => {}
    }
    let path: PathBuf = parts().map(OsStr::from_bytes).collect();
    Ok(if rest.starts_with(b"/") {
        ParentPath::Absolute(Path::new("/").join(path))
    } else {
        ParentPath::Relative(path)
    })
}

/// Returns the file name at the end of a path on another host (`\\server\share\name`), if the text is such a path.
pub fn name_on_share(text: &[u8]) -> Option<OsString> {
    if text.len() > MAX_TEXT_BYTES as usize || text.contains(&0) {
        return None;
    }
    let text: Vec<u8> = text.iter().map(|&byte| if byte == b'\\' { b'/' } else { byte }).collect();
    let rest = strip_prefix_ignoring_case(&text, b"file://").unwrap_or(&text).strip_prefix(b"//")?;
    let rest = strip_prefix_ignoring_case(rest, b"?/unc/").unwrap_or(rest);
    let parts: Vec<&[u8]> = rest.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        // `\\.\` and `\\?\` begin names of devices and of drives.
        [b"." | b"?", ..] => None,
        [_server, _share, .., name] if ![&b"."[..], b".."].contains(name) => Some(OsStr::from_bytes(name).into()),
        _ => None,
    }
}

/// Removes a prefix, regardless of ASCII case.
fn strip_prefix_ignoring_case<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = text.split_at_checked(word.len())?;
    start.eq_ignore_ascii_case(word).then_some(rest)
}

fn without_drive(text: &[u8]) -> Option<&[u8]> {
    match text {
        [letter, b':', rest @ ..] if letter.is_ascii_alphabetic() => Some(rest),
        _ => None,
    }
}

fn is_url(text: &[u8]) -> bool {
    let scheme = text.windows(3).position(|window| window == b"://").map(|at| &text[..at]);
    scheme.is_some_and(|s| s.len() > 1 && s.iter().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)))
}

/// Encodes the text of a `W2ru` locator: `.\name`, `.\..\folder\name` (as vhd-util writes it).
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a path that is not relative or cannot be encoded.
pub fn encode_w2ru(path: &Path) -> Result<Vec<u8>> {
    let text = format!(".\\{}", join_parts(path, false, "\\")?);
    check_length(path, utf16_little_endian(&text))
}

/// Encodes the text of a `W2ku` locator: `\folder\name`, without a drive letter. libvhd and this crate find the file,
/// and Windows searches its current drive.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a path that is not absolute or cannot be encoded.
pub fn encode_w2ku(path: &Path) -> Result<Vec<u8>> {
    let text = format!("\\{}", join_parts(path, true, "\\")?);
    check_length(path, utf16_little_endian(&text))
}

/// Encodes the text of a `MacX` locator: `file:///folder/name` or `file://./name`, percent-encoded. There is no
/// `localhost`, since libvhd takes everything after the two slashes as the path.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a path that cannot be encoded.
pub fn encode_macx(path: &Path) -> Result<Vec<u8>> {
    let mut text = if path.is_absolute() { b"file://".to_vec() } else { b"file://.".to_vec() };
    for part in parts(path, path.is_absolute())? {
        text.push(b'/');
        for &byte in part {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                text.push(byte);
            } else {
                text.extend_from_slice(format!("%{byte:02X}").as_bytes());
            }
        }
    }
    check_length(path, text)
}

/// Encodes the parent's name for the header: the file name, or the relative path (with `/`, as Xen Orchestra reads it)
/// if the parent is in another folder.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a path that is not relative, cannot be encoded, or is longer than 255 UTF-16 units.
pub fn encode_parent_name(path: &Path) -> Result<[u8; 512]> {
    let mut text = join_parts(path, false, "/")?;
    if normalise(text.as_bytes()).ok().as_ref().map(ParentPath::as_path) != Some(Path::new(&text)) {
        // Without `./` the text would be decoded to another path, for example because it begins like a drive letter.
        text.insert_str(0, "./");
    }
    let units: Vec<u16> = text.encode_utf16().collect();
    if units.len() > NAME_UNITS {
        return Err(unwritable(path, "it is longer than 255 UTF-16 units"));
    }
    let mut name = [0; 512];
    for (to, unit) in name.as_chunks_mut::<2>().0.iter_mut().zip(units) {
        *to = unit.to_be_bytes();
    }
    Ok(name)
}

/// Returns the components of a path. Fails if the path has no file name, has a backslash, or is not absolute or
/// relative as `absolute` requires.
fn parts(path: &Path, absolute: bool) -> Result<Vec<&[u8]>> {
    if path.is_absolute() != absolute {
        return Err(unwritable(path, if absolute { "it is not absolute" } else { "it is not relative" }));
    }
    if path.file_name().is_none() {
        return Err(unwritable(path, "it has no file name"));
    }
    let kept = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    let parts: Vec<&[u8]> = kept.map(|part| part.as_os_str().as_bytes()).collect();
    if parts.iter().any(|part| part.contains(&b'\\')) {
        return Err(unwritable(path, "it has a backslash, which separates folders there"));
    }
    Ok(parts)
}

fn join_parts(path: &Path, absolute: bool, separator: &str) -> Result<String> {
    let parts = parts(path, absolute)?.join(separator.as_bytes());
    String::from_utf8(parts).map_err(|_| unwritable(path, "it is not UTF-8"))
}

fn utf16_little_endian(text: &str) -> Vec<u8> {
    text.encode_utf16().map(u16::to_be_bytes).flat_map(|[high, low]| [low, high]).collect()
}

fn check_length(path: &Path, text: Vec<u8>) -> Result<Vec<u8>> {
    if text.len() > MAX_TEXT_BYTES as usize {
        return Err(unwritable(path, "it is longer than 4096 bytes there"));
    }
    Ok(text)
}

fn unwritable(path: &Path, why: &str) -> Error {
    let what = format!("the parent's path {} cannot be recorded in a child: {why}", path.display());
    Error::new(ErrorKind::Unsupported, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::locator::{Platform, decode_texts, header_name};

    #[test]
    fn texts_of_other_programs_become_paths() {
        let table = [
            (".\\base.vhd", "base.vhd"),
            (".\\..\\parents\\p\\base.vhd", "../parents/p/base.vhd"),
            ("base.vhd", "base.vhd"),
            ("C:\\VMs\\corpus\\base.vhd", "/VMs/corpus/base.vhd"),
            ("c:base.vhd", "base.vhd"),
            ("\\\\?\\D:\\a.vhd", "/a.vhd"),
            ("/srv/a.vhd", "/srv/a.vhd"),
            ("file://./base.vhd", "base.vhd"),
            ("file://../parents/p/base.vhd", "../parents/p/base.vhd"),
            ("file://localhost/dir/p.vhd", "/dir/p.vhd"),
            ("FILE:///dir/p.vhd", "/dir/p.vhd"),
            ("file:///C:/dir/p.vhd", "/dir/p.vhd"),
            ("file://base.vhd", "base.vhd"),
            ("localhost/x", "localhost/x"),
            ("a/./b//c.vhd/", "a/b/c.vhd"),
        ];
        for (text, path) in table {
            let expected = if path.starts_with('/') {
                ParentPath::Absolute(path.into())
            } else {
                ParentPath::Relative(path.into())
            };
            assert_eq!(normalise(text.as_bytes()), Ok(expected), "{text}");
        }
        assert_eq!(normalise(b"\xFF.vhd").unwrap().as_path().as_os_str().as_bytes(), b"\xFF.vhd");
    }

    #[test]
    fn texts_that_name_no_file_here_are_refused() {
        for text in [
            "",
            ".",
            "..",
            "a\\..",
            "\\",
            "C:",
            "C:\\",
            "a\0b",
            "http://host/a.vhd",
            "nbd+unix://x",
            "\\\\server\\share\\a",
            "//server/a",
            "\\\\?\\UNC\\server\\a",
            "file:////server/a",
            "\\\\.\\pipe",
            "file://",
            "file://localhost/",
        ] {
            assert!(normalise(text.as_bytes()).is_err(), "{text:?}: {:?}", normalise(text.as_bytes()));
        }
        assert!(normalise(&[b'a'; 4095]).is_ok() && normalise(&[b'a'; 4096]).is_ok());
        assert!(normalise(&[b'a'; 4097]).is_err());
    }

    #[test]
    fn file_names_on_other_hosts() {
        let name = |text: &str| name_on_share(text.as_bytes()).map(|name| name.into_string().unwrap());
        for text in [
            "\\\\server\\share\\a b.vhd",
            "//s/x/y/z/a b.vhd",
            "\\\\?\\UNC\\server\\share\\a b.vhd",
            "file:////s/x/a b.vhd",
        ] {
            assert_eq!(name(text).as_deref(), Some("a b.vhd"), "{text}");
        }
        for text in [
            "a.vhd",
            "C:\\x\\y\\a.vhd",
            "\\\\server\\share",
            "\\\\s\\x\\..",
            "\\\\.\\x\\y\\a",
            "\\\\?\\C:\\x\\a.vhd",
            "http://s/x/a",
            "",
        ] {
            assert_eq!(name(text), None, "{text}");
        }
    }

    #[test]
    fn encoded_paths_decode_to_themselves() {
        for path in ["base.vhd", "../p/base.vhd", "a b/100%41.vhd", "\u{e4}\u{1F4BE}.vhd", "c:x.vhd", "file:/x"] {
            let expected = ParentPath::Relative(path.into());
            let read = |platform, data: Vec<u8>| normalise(&decode_texts(platform, &data)[0]);
            assert_eq!(read(Platform::W2ru, encode_w2ru(Path::new(path)).unwrap()), Ok(expected.clone()));
            assert_eq!(read(Platform::MacX, encode_macx(Path::new(path)).unwrap()), Ok(expected.clone()));
            let name = header_name(&encode_parent_name(Path::new(path)).unwrap());
            assert_eq!(normalise(&name), Ok(expected));
            let absolute = format!("/srv/{path}");
            let expected = ParentPath::Absolute(absolute.as_str().into());
            assert_eq!(read(Platform::W2ku, encode_w2ku(Path::new(&absolute)).unwrap()), Ok(expected.clone()));
            assert_eq!(read(Platform::MacX, encode_macx(Path::new(&absolute)).unwrap()), Ok(expected));
        }
    }

    #[test]
    fn encoded_bytes_are_those_that_other_programs_expect() {
        assert_eq!(encode_w2ru(Path::new("./b.v")).unwrap(), b".\0\\\0b\0.\0v\0");
        assert_eq!(encode_w2ku(Path::new("/d/b")).unwrap(), b"\\\0d\0\\\0b\0");
        assert_eq!(encode_macx(Path::new("/d d/b")).unwrap(), b"file:///d%20d/b");
        assert_eq!(encode_macx(Path::new("../b")).unwrap(), b"file://./../b");
        assert_eq!(encode_parent_name(Path::new("../b")).unwrap()[..9], *b"\0.\0.\0/\0b\0");
    }

    #[test]
    fn paths_that_cannot_be_encoded_are_refused() {
        let raw = Path::new(OsStr::from_bytes(b"\xFF"));
        assert!(encode_w2ru(raw).is_err() && encode_parent_name(raw).is_err());
        assert_eq!(encode_macx(raw).unwrap(), b"file://./%FF");
        for path in ["a\\b", "", "..", "a/.."] {
            assert_eq!(encode_w2ru(Path::new(path)).unwrap_err().kind(), ErrorKind::Unsupported, "{path}");
        }
        assert!(encode_w2ru(Path::new("/a")).is_err() && encode_w2ku(Path::new("a")).is_err());
        let long = |units: usize| "x".repeat(units);
        assert!(encode_parent_name(Path::new(&long(254))).is_ok());
        assert_eq!(encode_parent_name(Path::new(&long(255))).unwrap()[508..], [0, b'x', 0, 0]);
        assert!(encode_parent_name(Path::new(&long(256))).is_err());
        assert_eq!(encode_w2ru(Path::new(&long(2046))).unwrap().len(), 4096);
        assert!(encode_w2ru(Path::new(&long(2047))).is_err());
    }
}
