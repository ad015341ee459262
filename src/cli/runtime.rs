//! The runtime folder: where live journals are, for the daemon that keeps them and the tool that looks for them.
//!
//! An explicit folder is used or refused. Without one there are candidates, tried in order; the daemon uses the first that
//! has room, and both programs look into all of them for journals that exist already.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, CWD};

use crate::error::{Error, ErrorKind, Result};

/// What `statfs` returns for tmpfs (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// The folders in which journals may lie: the explicit one, else the candidates that exist and belong to this user.
pub(super) fn folders(explicit: Option<&Path>) -> Vec<PathBuf> {
    match explicit {
        Some(folder) => vec![folder.to_path_buf()],
        None => candidates().into_iter().filter(|folder| check_owner(folder).is_ok()).collect(),
    }
}

/// Makes the folder for journals of `bytes` altogether. Returns it, and others in which journals may exist already. Warns
/// once if a candidate had to be passed over; returns none if no candidate can be used.
///
/// # Errors
/// If an explicit folder cannot be made, cannot be written to or belongs to another user.
pub(super) fn prepare(explicit: Option<&Path>, bytes: u64) -> Result<Vec<PathBuf>> {
    match explicit {
        Some(folder) => make(folder).map(|()| vec![folder.to_path_buf()]),
        None => Ok(choose(&candidates(), bytes)),
    }
}

fn choose(candidates: &[PathBuf], bytes: u64) -> Vec<PathBuf> {
    let mut reasons = Vec::new();
    let usable = |folder: &&PathBuf| match make(folder).map(|()| free(folder)) {
        Err(e) => {
            reasons.push(e.line());
            false
        }
        Ok(free) if free < bytes => {
            reasons.push(format!("{}: {bytes} bytes are needed and {free} are free", folder.display()));
            false
        }
        Ok(_) => true,
    };
    let chosen = candidates.iter().find(usable);
    let without = "each write is made durable before it is answered; see --runtime-dir";
    match (chosen, reasons.join("; ")) {
        (Some(_), why) if why.is_empty() => {}
        (Some(folder), why) => log::warn!("{why}; live journals are kept in {}", folder.display()),
        (None, why) if why.is_empty() => log::warn!("no runtime folder: {without}"),
        (None, why) => log::warn!("no runtime folder: {why}; without a live journal {without}"),
    }
    // A predecessor may have used another one.
    let others = candidates.iter().filter(|folder| Some(*folder) != chosen && check_owner(folder).is_ok());
    chosen.into_iter().chain(others).cloned().collect()
}

/// `/run/diffdisk` for root, else a folder in the user's own runtime folder; then one in `/dev/shm`. Only those in memory.
fn candidates() -> Vec<PathBuf> {
    let uid = rustix::process::geteuid();
    let own =
        if uid.is_root() { Some(PathBuf::from("/run")) } else { std::env::var_os("XDG_RUNTIME_DIR").map(Into::into) };
    let shared = ("/dev/shm".into(), format!("diffdisk-{}", uid.as_raw()));
    let all = own.map(|folder| (folder, "diffdisk".to_owned())).into_iter().chain([shared]);
    all.filter(|(folder, _)| in_memory(folder)).map(|(folder, name)| folder.join(name)).collect()
}

fn in_memory(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|s| s.f_type == TMPFS)
}

/// Bytes that are free on the file system of a folder. A tmpfs without a limit has no blocks at all.
fn free(folder: &Path) -> u64 {
    match rustix::fs::statvfs(folder) {
        Ok(s) if s.f_blocks > 0 => s.f_bavail.saturating_mul(s.f_frsize),
        _ => u64::MAX,
    }
}

/// Makes the folder if it does not exist, for its owner alone.
///
/// # Errors
/// `Io`; `Refused` if it belongs to another user, who could remove or forge what is kept in it.
fn make(folder: &Path) -> Result<()> {
    let failed = |e| Error::io("cannot make the runtime folder", e).at_path(folder);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    check_owner(folder)?;
    rustix::fs::accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, rustix::fs::AtFlags::EACCESS)
        .map_err(|e| Error::io("cannot write to the runtime folder", e.into()).at_path(folder))
}

fn check_owner(folder: &Path) -> Result<()> {
    let found = std::fs::symlink_metadata(folder).map_err(|e| Error::io("cannot stat", e).at_path(folder))?;
    let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why).at_path(folder));
    if !found.is_dir() {
        return refuse("the runtime folder is not a folder".into());
    }
    match found.uid() {
        owner if owner == rustix::process::geteuid().as_raw() => Ok(()),
        owner => refuse(format!("the runtime folder belongs to user {owner}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_can_be_used_and_has_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        let all = [path("file"), path("a"), path("b")];
        assert_eq!(choose(&all, 1), [path("a")]);
        assert!(!path("b").exists(), "what is not needed is not made");
        std::fs::create_dir(path("b")).unwrap();
        assert_eq!(choose(&all, 1), [path("a"), path("b")], "a predecessor may have used it");
        assert_eq!(choose(&all, u64::MAX - 1), [path("a"), path("b")], "journals that exist need no room");
        assert!(choose(&all[..1], 1).is_empty());
        assert!(prepare(Some(&path("file")), 1).is_err());
        assert_eq!(prepare(Some(&path("c")), u64::MAX).unwrap(), [path("c")]);
    }

    #[test]
    fn a_folder_of_another_user_is_not_used() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("a")).unwrap();
        std::os::unix::fs::chown(path("a"), Some(1234), None).unwrap();
        assert_eq!(choose(&[path("a"), path("b")], 1), [path("b")]);
        assert_eq!(prepare(Some(&path("a")), 1).unwrap_err().kind(), ErrorKind::Refused);
    }
}
