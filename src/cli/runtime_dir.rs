//! The runtime folder, in which the daemon keeps live journals and the tool finds them.
//!
//! If `--runtime-dir` is given, only this folder is used. Otherwise there are default folders in a fixed order: the
//! daemon creates journals in the first default folder with enough space, and both programs search all default folders
//! for existing journals. Each folder is opened once and stays open.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::host::Host;
use crate::storage::{Env, RuntimeFolder};

/// File system type of tmpfs in `statfs` (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// Opens the folders that may contain live journals: the folder `explicit` if it is given, otherwise the default
/// folders that can be used. Returns no folder if `explicit` does not exist or is not on tmpfs.
///
/// # Errors
/// - `Refused` if `explicit` belongs to another user, or other users may write to it
/// - `Io` if `explicit` cannot be opened
pub(super) fn existing_folders(explicit: Option<&Path>) -> Result<Vec<RuntimeFolder>> {
    let Some(folder) = explicit else {
        return Ok(candidates().iter().filter_map(|folder| Host.runtime_folder(folder).ok()).collect());
    };
    match Host.runtime_folder(folder) {
        Ok(folder) => Ok(vec![folder]),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {
            log::debug!("live journals are not searched for: {}", e.line());
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// Creates the folder for new live journals of `bytes` in total: the folder `explicit` if it is given, otherwise the
/// first default folder with enough space. Returns this folder first, and after it the other default folders that may
/// contain live journals. If no default folder has enough space, returns those that can be opened: some of the journals
/// may still fit. Returns no folder if none can be opened, or if `explicit` is not on tmpfs. Logs one warning if a
/// folder was passed over or no folder is returned.
///
/// # Errors
/// - `Refused` if the folder `explicit` belongs to another user, or other users may write to it
/// - `NotFound`, `NoSpace`, `Io` if the folder `explicit` cannot be created or opened
pub(super) fn prepare(explicit: Option<&Path>, bytes: u64) -> Result<Vec<RuntimeFolder>> {
    let Some(folder) = explicit else { return Ok(choose_folder(&candidates(), bytes)) };
    match create_and_open(folder) {
        Ok(folder) => Ok(vec![folder]),
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            log::warn!("no live journal: {}; each write is made durable before it is acknowledged", e.line());
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

fn choose_folder(candidates: &[PathBuf], bytes: u64) -> Vec<RuntimeFolder> {
    let (mut reasons, mut chosen, mut passed) = (Vec::new(), None, Vec::new());
    for folder in candidates {
        let opened = if chosen.is_none() { create_and_open(folder) } else { Host.runtime_folder(folder) };
        match opened {
            Ok(runtime) if chosen.is_some() => passed.push(runtime),
            Ok(runtime) if free_bytes(folder) < bytes => {
                reasons.push(format!(
                    "{}: {bytes} bytes are needed and {} are free",
                    folder.display(),
                    free_bytes(folder)
                ));
                // An earlier daemon may have left live journals in this folder.
                passed.push(runtime);
            }
            Ok(runtime) => chosen = Some(runtime),
            Err(e) if chosen.is_none() => reasons.push(e.line()),
            Err(_) => {}
        }
    }
    let without = "each write is made durable before it is acknowledged; see --runtime-dir";
    match (&chosen, reasons.join("; ")) {
        (Some(_), why) if why.is_empty() => {}
        (Some(folder), why) => log::warn!("{why}; live journals are kept in {}", folder.path().display()),
        (None, why) if why.is_empty() => log::warn!("no runtime folder: {without}"),
        (None, why) => log::warn!("no runtime folder: {why}; without a live journal {without}"),
    }
    chosen.into_iter().chain(passed).collect()
}

/// Returns the default folders that are on tmpfs: first `/run/diffdisk` for root, or `$XDG_RUNTIME_DIR/diffdisk` for
/// other users, then a folder in `/dev/shm`.
fn candidates() -> Vec<PathBuf> {
    let uid = rustix::process::geteuid();
    let own =
        if uid.is_root() { Some(PathBuf::from("/run")) } else { std::env::var_os("XDG_RUNTIME_DIR").map(Into::into) };
    let shared = ("/dev/shm".into(), format!("diffdisk-{}", uid.as_raw()));
    let all = own.map(|folder| (folder, "diffdisk".to_owned())).into_iter().chain([shared]);
    all.filter(|(folder, _)| is_on_tmpfs(folder)).map(|(folder, name)| folder.join(name)).collect()
}

fn is_on_tmpfs(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|s| s.f_type == TMPFS)
}

/// Returns the number of free bytes in the file system of a folder. Returns `u64::MAX` if the number cannot be queried,
/// and for a tmpfs without a size limit, which reports zero blocks.
fn free_bytes(folder: &Path) -> u64 {
    match rustix::fs::statvfs(folder) {
        Ok(s) if s.f_blocks > 0 => s.f_bavail.saturating_mul(s.f_frsize),
        _ => u64::MAX,
    }
}

/// Creates the folder with mode 0700 if it does not exist, and opens it.
///
/// # Errors
/// - `NotFound`, `NoSpace`, `Io` if the folder cannot be created or opened
/// - `Refused` if the folder belongs to another user, or other users may write to it
/// - `Unsupported` if the folder is not on tmpfs
fn create_and_open(folder: &Path) -> Result<RuntimeFolder> {
    let failed = |e| Error::io("cannot create the runtime folder", e).at_path(folder);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    Host.runtime_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(folders: &[RuntimeFolder]) -> Vec<&Path> {
        folders.iter().map(RuntimeFolder::path).collect()
    }

    #[test]
    fn the_first_usable_folder_with_enough_space_is_chosen() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        let all = [path("file"), path("a"), path("b")];
        assert_eq!(paths(&choose_folder(&all, 1)), [path("a")]);
        assert!(!path("b").exists(), "a folder that is not needed is not created");
        std::fs::create_dir(path("b")).unwrap();
        assert_eq!(paths(&choose_folder(&all, 1)), [path("a"), path("b")], "an earlier daemon may have used it");
        assert_eq!(
            paths(&choose_folder(&all, u64::MAX - 1)),
            [path("a"), path("b")],
            "existing journals need no space"
        );
        assert!(choose_folder(&all[..1], 1).is_empty());
        assert!(prepare(Some(&path("file")), 1).is_err());
        assert_eq!(paths(&prepare(Some(&path("c")), u64::MAX).unwrap()), [path("c")]);
        assert!(
            existing_folders(Some(&path("none"))).unwrap().is_empty() && existing_folders(Some(&path("file"))).is_err()
        );
    }

    #[test]
    fn a_folder_of_another_user_is_not_used() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("a")).unwrap();
        std::os::unix::fs::chown(path("a"), Some(1234), None).unwrap();
        assert_eq!(paths(&choose_folder(&[path("a"), path("b")], 1)), [path("b")]);
        assert_eq!(prepare(Some(&path("a")), 1).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(existing_folders(Some(&path("a"))).unwrap_err().kind(), ErrorKind::Refused);
    }
}
