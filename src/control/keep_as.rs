//! The path `keep_as` of a snapshot: placeholders, the folder of a relative path, and the checks of the name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image::folder_of;
use crate::ops::info::rfc3339;

/// Replaces the placeholders of `pattern`: `{name}` by the name of the disk, and `{time}` by the time `unix`, in
/// seconds, in UTC, such as `20261130T235959Z`.
///
/// # Errors
/// `Invalid` for any other text that begins with `{`, if the name of the disk is no file name, and if the path does
/// not end in a file name.
pub(super) fn expand(pattern: &str, disk: &str, unix: u64) -> Result<String> {
    let (mut path, mut rest) = (String::new(), pattern);
    while let Some((before, after)) = rest.split_once('{') {
        path.push_str(before);
        let placeholder = after.split_once('}');
        rest = placeholder.map_or("", |(_, rest)| rest);
        match placeholder.map(|(name, _)| name) {
            Some("name") if disk.contains('/') => {
                return Err(invalid(pattern, &format!("{{name}} cannot stand for {disk:?}, which contains a slash")));
            }
            Some("name") => path.push_str(disk),
            Some("time") => path.extend(rfc3339(unix).chars().filter(|c| !"-:".contains(*c))),
            Some(other) => {
                return Err(invalid(
                    pattern,
                    &format!("{{{other}}} is no placeholder; there are {{name}} and {{time}}"),
                ));
            }
            None => return Err(invalid(pattern, "a { without a }")),
        }
    }
    path.push_str(rest);
    if path.contains('\0') {
        return Err(invalid(pattern, "a path contains no zero byte"));
    }
    match path.rsplit('/').next() {
        None | Some("" | "." | "..") => Err(invalid(pattern, "the path does not end in a file name")),
        Some(_) => Ok(path),
    }
}

/// Returns the absolute path, without symbolic links in its folder. A relative path counts from the folder of the image
/// `active`, which takes the writes of the disk.
///
/// # Errors
/// `NotFound` or `Io` if the folder cannot be resolved, for example because it does not exist.
pub(super) fn resolve(path: &str, active: &Path) -> Result<PathBuf> {
    let canonical =
        |path: &Path| fs::canonicalize(path).map_err(|e| Error::io("cannot resolve the path", e).at_path(path));
    let path = match Path::new(path) {
        path if path.is_absolute() => path.to_path_buf(),
        path => folder_of(&canonical(active)?).join(path),
    };
    let name = path.file_name().ok_or_else(|| invalid(&path.to_string_lossy(), "the path has no file name"))?;
    Ok(canonical(folder_of(&path))?.join(name))
}

fn invalid(pattern: &str, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("keep_as {pattern:?}: {why}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn placeholders_are_replaced_once() {
        // 2026-11-30T23:59:59Z
        let unix = 1_796_083_199;
        for (pattern, expected) in [
            ("before.vhd", "before.vhd"),
            ("/x/{name}-{time}.vhd", "/x/a{time}b-20261130T235959Z.vhd"),
            ("{time}{time}", "20261130T235959Z20261130T235959Z"),
            ("a}.vhd", "a}.vhd"),
            ("../x/a", "../x/a"),
        ] {
            assert_eq!(expand(pattern, "a{time}b", unix).unwrap(), expected, "{pattern}");
        }
    }

    #[test]
    fn other_patterns_are_invalid() {
        for (pattern, why) in [
            ("{uuid}.vhd", "{uuid} is no placeholder"),
            ("{}", "{} is no placeholder"),
            ("{Name}", "{Name} is no placeholder"),
            ("{{name}}", "is no placeholder"),
            ("a{name", "a { without a }"),
            ("", "does not end in a file name"),
            ("/x/", "does not end in a file name"),
            ("/x/.", "does not end in a file name"),
            ("..", "does not end in a file name"),
            ("a\0b", "zero byte"),
        ] {
            let e = expand(pattern, "a", 0).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Invalid, "{pattern}");
            assert!(e.message().contains(why), "{pattern}: {}", e.message());
        }
        assert!(expand("{name}", "a/b", 0).unwrap_err().message().contains("slash"));
        assert_eq!(expand("b", "a/b", 0).unwrap(), "b");
    }

    #[test]
    fn relative_paths_count_from_the_folder_of_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir(root.join("images")).unwrap();
        fs::write(root.join("images/a.vhd"), "").unwrap();
        symlink("images", root.join("link")).unwrap();
        symlink("images/a.vhd", root.join("a.vhd")).unwrap();
        for active in ["images/a.vhd", "link/a.vhd", "a.vhd"] {
            assert_eq!(resolve("b", &root.join(active)).unwrap(), root.join("images/b"), "{active}");
            assert_eq!(resolve("../b", &root.join(active)).unwrap(), root.join("b"), "{active}");
        }
        let absolute = root.join("link/b");
        assert_eq!(resolve(absolute.to_str().unwrap(), Path::new("a")).unwrap(), root.join("images/b"));
        let missing = root.join("none/b");
        let e = resolve(missing.to_str().unwrap(), Path::new("a")).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::NotFound, Some(root.join("none").as_path())));
        assert_eq!(resolve("b", &root.join("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
