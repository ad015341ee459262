//! Checks whether a file exists without opening it: for paths that an image contains and that must not be opened.
//!
//! Each component is looked up separately, as the last component of its path, with `O_PATH`. So the kernel follows no
//! symbolic link and triggers no automount, and nothing of the file is read. Kernel file systems (proc, sysfs, ...) are
//! not entered.

use std::path::{Component, Path};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::call::retry;
use crate::storage::types::FilePresence;

/// Folders in the root folder below which no path is looked up.
const KERNEL_FOLDERS: [&str; 3] = ["proc", "sys", "dev"];

/// `f_type` of kernel file systems, in which a lookup may have effects (linux/magic.h): proc, sysfs, devpts, debugfs,
/// tracefs, cgroup, cgroup2, securityfs, bpf.
const KERNEL_MAGIC: [i64; 9] =
    [0x9FA0, 0x6265_6572, 0x1CD1, 0x6462_6720, 0x7472_6163, 0x0027_E0EB, 0x6367_7270, 0x7363_6673, 0xCAFE_4A11];
/// `f_type` of autofs.
const AUTOFS_MAGIC: i64 = 0x0187;

/// Implements [`Env::file_presence`](crate::storage::Env::file_presence).
pub(super) fn file_presence(path: &Path) -> FilePresence {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::RootDir => {}
            Component::Normal(name) => parts.push(name),
            _ => return FilePresence::Absent,
        }
    }
    let Some((last, above)) = parts.split_last() else { return FilePresence::Absent };
    if KERNEL_FOLDERS.iter().any(|kernel| parts[0] == *kernel) {
        return FilePresence::Absent;
    }
    let mut at = match retry(|| rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())) {
        Ok(fd) => fd,
        Err(e) => return failed(e),
    };
    for name in above.iter().map(Some).chain([None]) {
        match rustix::fs::fstatfs(&at).map(|found| found.f_type) {
            Ok(AUTOFS_MAGIC) => return FilePresence::Unknown("the path contains an automount point"),
            Ok(kernel) if KERNEL_MAGIC.contains(&kernel) => return FilePresence::Absent,
            Ok(_) => {}
            Err(e) => return failed(e),
        }
        let Some(name) = name else { break };
        let (flags, rules) = (OFlags::PATH | OFlags::CLOEXEC, ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS);
        at = match retry(|| rustix::fs::openat2(&at, *name, flags, Mode::empty(), rules)) {
            Ok(fd) => fd,
            Err(e) => return failed(e),
        };
    }
    match rustix::fs::statat(&at, *last, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
        Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FilePresence::Present,
            FileType::Symlink => failed(Errno::LOOP),
            _ => FilePresence::Absent,
        },
        Err(e) => failed(e),
    }
}

fn failed(e: Errno) -> FilePresence {
    match e {
        Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => FilePresence::Absent,
        Errno::LOOP => FilePresence::Unknown("the path contains a symbolic link"),
        Errno::ACCESS => FilePresence::Unknown("this user has no permission to search the folder"),
        _ => FilePresence::Unknown("the kernel reports an error"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_are_found_and_links_are_not_followed() {
        let d = tempfile::tempdir().unwrap();
        let d = d.path().canonicalize().unwrap();
        fs::create_dir(d.join("sub")).unwrap();
        fs::write(d.join("sub/f"), "x").unwrap();
        symlink("sub", d.join("way")).unwrap();
        symlink("sub/f", d.join("link")).unwrap();
        let at = |name: &str| file_presence(&d.join(name));
        assert_eq!(at("sub/f"), FilePresence::Present);
        for none in ["f", "sub/g", "sub/f/g", "sub", "none/f", &"n".repeat(300)] {
            assert_eq!(at(none), FilePresence::Absent, "{none}");
        }
        for unknown in ["link", "way/f", "way/none"] {
            assert!(matches!(at(unknown), FilePresence::Unknown(why) if why.contains("link")), "{unknown}");
        }
        for kernel in ["/", "/proc/self/exe", "/proc/version", "/sys/kernel/uevent_seqnum", "/dev/zero", "/dev/shm/x"] {
            assert_eq!(file_presence(Path::new(kernel)), FilePresence::Absent, "{kernel}");
        }
    }
}
