//! Tests of `runtime_folder.rs`: hostile folders and files, and files that are truncated while they are mapped.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::Ordering;

use tempfile::TempDir;

use super::*;
use crate::storage::runtime_folder::RuntimeFolder;

fn folder() -> (TempDir, RuntimeFolder) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let runtime = RuntimeFolder::new(HostRuntimeFolder::open_folder(folder.path()).unwrap());
    (folder, runtime)
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.map_or_else(|e| e.kind(), |_| panic!("this must fail"))
}

#[test]
fn stored_words_are_found_again_by_one_process_at_a_time() {
    let (_folder, runtime) = folder();
    let first = runtime.create("a", 1024).unwrap();
    first[1023].store(7, Ordering::Release);
    assert_eq!(kind(runtime.open("a", 1024)), ErrorKind::Busy);
    assert!(runtime.create("a", 1024).is_err(), "the name exists");
    drop(first);
    assert_eq!(runtime.open("a", 1024).unwrap()[1023].load(Ordering::Acquire), 7);
    assert_eq!(kind(runtime.open("a", 512)), ErrorKind::Refused);
    assert_eq!(kind(runtime.open("b", 1024)), ErrorKind::NotFound);
    assert_eq!(runtime.list().unwrap().iter().filter(|name| !name.starts_with('.')).count(), 1);
    runtime.remove("a").unwrap();
    runtime.remove("a").unwrap();
    assert_eq!(kind(runtime.open("a", 1024)), ErrorKind::NotFound);
}

#[test]
fn folders_of_other_users_and_writable_ones_are_refused() {
    let (folder, _) = folder();
    let open = |path: &Path| HostRuntimeFolder::open_folder(path);
    for mode in [0o777, 0o720, 0o702, 0o775] {
        fs::set_permissions(folder.path(), Permissions::from_mode(mode)).unwrap();
        let e = open(folder.path()).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains(&format!("{mode:o}")), "{e}");
    }
    for mode in [0o755, 0o710, 0o701, 0o700] {
        fs::set_permissions(folder.path(), Permissions::from_mode(mode)).unwrap();
        open(folder.path()).unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700, "closed to others");
    }
    let link = folder.path().join("link");
    symlink(folder.path(), &link).unwrap();
    assert_eq!(kind(open(&link)), ErrorKind::Refused);
    assert_eq!(kind(open(&folder.path().join("none"))), ErrorKind::NotFound);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(folder.path(), Some(65534), None).unwrap();
        let e = open(folder.path()).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("65534"), "{e}");
    }
    let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    assert_eq!(kind(open(disk.path())), ErrorKind::Unsupported, "not in memory");
}

#[test]
fn hostile_journals_are_refused() {
    let (folder, runtime) = folder();
    let path = folder.path().join("a");
    drop(runtime.create("a", 64).unwrap());
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(kind(runtime.open("a", 64)), ErrorKind::Refused);
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&path, folder.path().join("b")).unwrap();
    assert_eq!(kind(runtime.open("a", 64)), ErrorKind::Refused, "two names");
    fs::remove_file(folder.path().join("b")).unwrap();
    drop(runtime.open("a", 64).unwrap());
    symlink("a", folder.path().join("link")).unwrap();
    assert_eq!(kind(runtime.open("link", 64)), ErrorKind::Refused);
    fs::create_dir(folder.path().join("dir")).unwrap();
    assert_eq!(kind(runtime.open("dir", 64)), ErrorKind::Refused);
    rustix::fs::mknodat(CWD, folder.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert_eq!(kind(runtime.open("fifo", 64)), ErrorKind::Refused);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        assert_eq!(kind(runtime.open("a", 64)), ErrorKind::Refused, "another user's");
    }
}

#[test]
fn truncating_a_mapped_file_is_detected_and_harmless() {
    let (folder, runtime) = folder();
    let live = runtime.create("a", 4096).unwrap();
    live[4095].store(9, Ordering::Release);
    assert!(!live.is_lost());
    fs::OpenOptions::new().write(true).open(folder.path().join("a")).unwrap().set_len(4096).unwrap();
    live[0].store(1, Ordering::Release);
    live[4095].store(2, Ordering::Release);
    assert!(live.is_lost(), "the store hit a page that no longer exists");
    assert_eq!(live[4095].load(Ordering::Acquire), 2, "the store goes to private memory");
    let other = runtime.create("b", 4096).unwrap();
    assert!(!other.is_lost());
}
