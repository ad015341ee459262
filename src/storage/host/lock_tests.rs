//! Tests of `lock.rs`.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::storage::backend::File;
use crate::storage::env::Env;
use crate::storage::host::Host;
use crate::storage::host::file::HostFile;
use crate::storage::types::Access;

fn open(path: &Path, access: Access) -> File {
    Host.open(path, access).unwrap()
}

/// Serializes the tests of locks: between fork and exec a child process holds all open file descriptions, with their
/// locks.
pub(in crate::storage::host) fn serialize() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, vec![0; 1 << 16]).unwrap();
    (folder, path)
}

#[test]
fn two_descriptions_exclude_each_other() {
    let _alone = serialize();
    let (_folder, path) = image();
    let (a, b) = (open(&path, Access::Write), open(&path, Access::Write));
    a.lock(Lock::Exclusive).unwrap();
    a.clone().lock(Lock::Exclusive).unwrap();
    for wanted in [Lock::Exclusive, Lock::Shared] {
        let e = b.lock(wanted).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Busy);
        assert!(e.line().contains("this process has it open with diffdisk"), "{e}");
    }
    // A top becomes a parent.
    a.lock(Lock::Shared).unwrap();
    b.lock(Lock::Shared).unwrap();
    assert_eq!(a.lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Busy);
    // The refused change left the shared lock in place.
    assert_eq!(open(&path, Access::Write).lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Busy);
    drop(b);
    a.lock(Lock::Exclusive).unwrap();
    drop(a);
    open(&path, Access::Read).lock(Lock::Shared).unwrap();
    let e = open(&path, Access::Read).lock(Lock::Exclusive).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
}

#[test]
fn locks_on_the_bytes_of_qemu_are_respected() {
    let _alone = serialize();
    // Bytes on which another open file description holds read locks, and whether a shared and an exclusive lock are
    // then possible.
    let cases: &[(&[i64], bool, bool)] = &[
        (&[100], true, true),
        (&[100, 201], true, false),
        (&[100, 203], true, false),
        (&[101], false, false),
        (&[103], false, false),
        (&[200], false, false),
        (&[102, 202], true, true),
    ];
    let (_folder, path) = image();
    for &(held, reads, writes) in cases {
        let other = fs::File::open(&path).unwrap();
        for &byte in held {
            set(std::os::fd::AsFd::as_fd(&other), libc::F_RDLCK, byte).unwrap();
        }
        for (wanted, may) in [(Lock::Shared, reads), (Lock::Exclusive, writes)] {
            let result = open(&path, Access::Write).lock(wanted);
            assert_eq!(result.is_ok(), may, "{held:?} {wanted:?} {result:?}");
        }
    }
}

#[test]
fn qemu_and_diffdisk_exclude_each_other() {
    let _alone = serialize();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    // The image has a format with metadata, since QEMU allows other processes to write to a raw image that it reads.
    if Command::new("qemu-img").args(["create", "-q", "-f", "vpc"]).arg(&path).arg("8M").status().is_err() {
        eprintln!("skipped: no qemu-img here");
        return;
    }
    let qemu_io = |options: &[&str], command: &str| {
        let mut qemu = Command::new("qemu-io");
        qemu.args(options).args(["-f", "vpc", "-c", command]).arg(&path).output().unwrap().status.success()
    };
    assert!(qemu_io(&[], "write 0 512"));
    let ours = open(&path, Access::Write);
    ours.lock(Lock::Exclusive).unwrap();
    assert!(!qemu_io(&["-r"], "read 0 512"));
    ours.lock(Lock::Shared).unwrap();
    assert!(qemu_io(&["-r"], "read 0 512"));
    assert!(!qemu_io(&[], "write 0 512"));
    drop(ours);

    // QEMU opens the image first, and keeps it open until its standard input is closed.
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "vpc"])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0];
    std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let e = open(&path, Access::Write).lock(Lock::Exclusive).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy);
    assert!(e.line().contains(&format!("qemu-io (process {})", qemu.id())), "{e}");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    open(&path, Access::Write).lock(Lock::Exclusive).unwrap();
}

/// Tests the fence: the process that holds the lock is being killed.
#[test]
fn the_fence_waits_only_for_dying_processes() {
    let _alone = serialize();
    let (_folder, path) = image();
    let held = open(&path, Access::Write);
    held.lock(Lock::Exclusive).unwrap();
    let ours = open(&path, Access::Write);
    let f: &HostFile = ours.as_backend().unwrap();
    assert!(is_held_by_live_process(f.as_fd(), f.id()));
    assert_eq!(ours.lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Busy);
    drop(held);
    ours.lock(Lock::Exclusive).unwrap();
    assert!(!is_held_by_live_process(f.as_fd(), f.id()), "its own lock does not count");
    assert!(is_dying_status("Name:\tx\nState:\tZ (zombie)\n"));
    assert!(is_dying_status("State:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
    assert!(!is_dying_status("State:\tS (sleeping)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\n"));
}

#[test]
fn lock_lines_of_fdinfo_are_parsed() {
    let line = "\t1: OFDLCK  ADVISORY  READ  -1 fe:00:1234 100 101";
    assert!(lock_line_covers(line, 1234, 100) && lock_line_covers(line, 1234, 101));
    assert!(!lock_line_covers(line, 1234, 102) && !lock_line_covers(line, 123, 100));
    assert!(lock_line_covers("1: POSIX  ADVISORY  WRITE 77 00:1a:9 0 EOF", 9, 1000));
    assert!(!lock_line_covers("nonsense", 0, 0) && !lock_line_covers("", 0, 0) && !lock_line_covers("a b c", 0, 0));
}
