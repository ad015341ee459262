//! Locks on open descriptions: a byte of our own, and the bytes by which QEMU's processes warn each other.
//!
//! QEMU (`block/file-posix.c`) holds *read* locks only: byte 100+p says "I use permission p", byte 200+p "I do not let
//! others use p" (0 consistent read, 1 write, 3 resize). After locking, everybody looks whether a stranger holds the
//! opposite byte of each of his own.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::env::{FileId, Lock};

/// Ours: a write lock for [`Lock::Exclusive`], a read lock for [`Lock::Shared`]. QEMU does not look at it.
const OURS: i64 = 1000;

/// Bytes of QEMU that a writer holds: uses read, write, resize; shares neither write nor resize.
const WRITER: &[i64] = &[100, 101, 103, 201, 203];
/// A reader: uses read; shares neither write nor resize.
const READER: &[i64] = &[100, 201, 203];

/// All bytes by which a process says that it has a file in use: ours, and those of QEMU's permissions.
pub(super) const IN_USE_BYTES: [i64; 7] = [OURS, 100, 101, 103, 200, 201, 203];

/// Descriptors looked at, at most, to name who holds a lock.
const LOOKS: usize = 20_000;

fn bytes_of(lock: Option<Lock>) -> &'static [i64] {
    match lock {
        Some(Lock::Exclusive) => WRITER,
        Some(Lock::Shared) => READER,
        None => &[],
    }
}

fn ours_of(lock: Option<Lock>) -> i32 {
    match lock {
        Some(Lock::Exclusive) => libc::F_WRLCK,
        Some(Lock::Shared) => libc::F_RDLCK,
        None => libc::F_UNLCK,
    }
}

/// The byte that, held by a stranger, speaks against our holding `byte`.
fn opposite(byte: i64) -> i64 {
    if byte >= 200 { byte - 100 } else { byte + 100 }
}

fn meaning(byte: i64) -> &'static str {
    match byte {
        101 => "is writing to it",
        103 => "may change its length",
        200 => "has it open and lets nobody read it",
        201 => "has it open and lets nobody write to it",
        203 => "has it open and lets nobody change its length",
        _ => "has a lock on it",
    }
}

/// Whether a process that goes on holds a lock that may be against ours, by another description than `fd`. If not, the
/// lock is that of a process that has ended, or is about to, and of its I/O on the way: it goes when that is over.
pub(super) fn is_held_by_live_process(fd: BorrowedFd<'_>, id: FileId) -> bool {
    let theirs = |d: &LockDescriptor| d.pid != std::process::id() || d.number != fd.as_raw_fd();
    descriptors_with_lock(|line| IN_USE_BYTES.iter().any(|&byte| lock_line_covers(line, id.ino, byte)))
        .any(|d| theirs(&d) && d.refers_to(id) && !is_dying(d.pid))
}

/// Goes from the lock `held` by the description to `wanted`; after an error `held` is still held.
pub(super) fn change(fd: BorrowedFd<'_>, id: FileId, held: Option<Lock>, wanted: Lock) -> Result<()> {
    let (old, new) = (bytes_of(held), bytes_of(Some(wanted)));
    let taken = take(fd, id, new, wanted);
    let (drop, against) = if taken.is_ok() { (old, new) } else { (new, old) };
    for &byte in drop.iter().filter(|b| !against.contains(b)) {
        set(fd, libc::F_UNLCK, byte).map_err(failed)?;
    }
    if taken.is_err() {
        set(fd, ours_of(held), OURS).map_err(failed)?;
    }
    taken
}

fn take(fd: BorrowedFd<'_>, id: FileId, bytes: &[i64], wanted: Lock) -> Result<()> {
    lock_byte(fd, id, ours_of(Some(wanted)), OURS, "has it open with diffdisk")?;
    for &byte in bytes {
        lock_byte(fd, id, libc::F_RDLCK, byte, meaning(byte))?;
    }
    for byte in bytes.iter().map(|&b| opposite(b)) {
        if let Some(pid) = stranger(fd, byte).map_err(failed)? {
            return Err(busy(id, byte, Some(pid), meaning(byte)));
        }
    }
    Ok(())
}

fn lock_byte(fd: BorrowedFd<'_>, id: FileId, kind: i32, byte: i64, does: &str) -> Result<()> {
    match set(fd, kind, byte) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(busy(id, byte, stranger(fd, byte).ok().flatten(), does))
        }
        Err(e) => Err(failed(e)),
    }
}

fn failed(e: io::Error) -> Error {
    Error::io("cannot lock the file", e)
}

fn busy(id: FileId, byte: i64, pid: Option<i32>, does: &str) -> Error {
    let told = pid.and_then(|p| u32::try_from(p).ok()).filter(|p| *p > 0);
    let who = match told.or_else(|| holder(id, byte)) {
        Some(pid) if pid == std::process::id() => "this process".to_string(),
        Some(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("{} (process {pid})", name.trim_end()),
            Err(_) => format!("process {pid}"),
        },
        None => "another process".to_string(),
    };
    Error::new(ErrorKind::Busy, format!("{who} {does}"))
}

#[allow(clippy::cast_possible_truncation, reason = "the constants are 0, 1, 2")]
fn range(kind: i32, byte: i64) -> libc::flock {
    // SAFETY: flock is plain integers, for which zero is a value.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    l.l_start = byte;
    l.l_len = 1;
    l
}

fn set(fd: BorrowedFd<'_>, kind: i32, byte: i64) -> io::Result<()> {
    let l = range(kind, byte);
    // SAFETY: the fd is open, and F_OFD_SETLK reads one flock.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &l) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether another description than `fd` holds a lock by which a process of ours or of QEMU has the file in use.
pub(super) fn is_locked(fd: BorrowedFd<'_>) -> Result<bool> {
    for byte in IN_USE_BYTES {
        if stranger(fd, byte).map_err(failed)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether another description holds any lock on a byte, and the process if the kernel says (else -1).
fn stranger(fd: BorrowedFd<'_>, byte: i64) -> io::Result<Option<i32>> {
    let mut l = range(libc::F_WRLCK, byte);
    // SAFETY: the fd is open, and F_OFD_GETLK reads and writes one flock.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut l) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok((i32::from(l.l_type) != libc::F_UNLCK).then_some(l.l_pid))
}

/// A process that has a descriptor with a lock over that byte, as far as `/proc` shows others to us; another one than
/// this where there is one, since the description that asks holds some of the bytes itself. A description belongs to no
/// process, so this is the only trace.
fn holder(id: FileId, byte: i64) -> Option<u32> {
    let mut own = None;
    for d in descriptors_with_lock(|line| lock_line_covers(line, id.ino, byte)).filter(|d| d.refers_to(id)) {
        if d.pid != std::process::id() {
            return Some(d.pid);
        }
        own = Some(d.pid);
    }
    own
}

/// A descriptor of a process.
pub(super) struct LockDescriptor {
    pub(super) pid: u32,
    number: i32,
}

impl LockDescriptor {
    /// Whether it is of that file. A lock's line does not tell for sure: inode numbers are not unique among file systems,
    /// and the device in it is, on btrfs, not the one of stat.
    pub(super) fn refers_to(&self, id: FileId) -> bool {
        fs::metadata(format!("/proc/{}/fd/{}", self.pid, self.number))
            .is_ok_and(|m| FileId { dev: m.dev(), ino: m.ino() } == id)
    }
}

/// The descriptors of all processes with a lock whose line in fdinfo `is_wanted`.
pub(super) fn descriptors_with_lock(is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = LockDescriptor> {
    let number = |entry: &fs::DirEntry| entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = processes.filter_map(move |entry| Some((number(&entry)?, entry.path().join("fdinfo"))));
    let all = all.flat_map(move |(pid, folder)| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(move |entry| Some((pid, i32::try_from(number(&entry)?).ok()?, entry.path())))
    });
    all.take(LOOKS).filter_map(move |(pid, number, path)| {
        let text = fs::read_to_string(path).ok()?;
        text.lines().filter_map(|l| l.strip_prefix("lock:")).any(&is_wanted).then_some(LockDescriptor { pid, number })
    })
}

/// Whether a process is gone but for its entry, or has been sent SIGKILL.
fn is_dying(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| tells_of_death(&status))
}

/// The same, by the text of its status (proc_pid_status(5)).
fn tells_of_death(status: &str) -> bool {
    let kill = 1 << (libc::SIGKILL - 1);
    status.lines().any(|line| match line.split_once(":\t") {
        Some(("State", state)) => state.starts_with(['Z', 'X']),
        Some(("SigPnd" | "ShdPnd", set)) => u64::from_str_radix(set, 16).is_ok_and(|set| set & kill != 0),
        _ => false,
    })
}

/// Whether the text of a `lock:` line in fdinfo (`1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101`) speaks of such an inode
/// and byte.
pub(super) fn lock_line_covers(line: &str, ino: u64, byte: i64) -> bool {
    let mut words = line.split_whitespace().rev();
    let (Some(last), Some(first), Some(inode)) = (words.next(), words.next(), words.next()) else { return false };
    let first = first.parse::<i64>().unwrap_or(i64::MAX);
    let last = if last == "EOF" { i64::MAX } else { last.parse::<i64>().unwrap_or(-1) };
    inode.rsplit(':').next().and_then(|n| n.parse().ok()) == Some(ino) && (first..=last).contains(&byte)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use std::os::fd::AsFd;

    use crate::storage::engine::host_file;
    use crate::storage::env::{Access, Env, File};
    use crate::storage::host::Host;

    fn open(path: &Path, access: Access) -> File {
        Host.open(path, access).unwrap()
    }

    /// One test at a time: a child process holds all descriptions, with their locks, from fork to exec.
    pub(in crate::storage::host) fn serialize() -> std::sync::MutexGuard<'static, ()> {
        static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
    fn strangers_bytes_of_qemu_are_respected() {
        let _alone = serialize();
        // What a stranger holds as read locks, and whether a reader and a writer of ours may then lock.
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
            let stranger = fs::File::open(&path).unwrap();
            for &byte in held {
                set(std::os::fd::AsFd::as_fd(&stranger), libc::F_RDLCK, byte).unwrap();
            }
            for (wanted, may) in [(Lock::Shared, reads), (Lock::Exclusive, writes)] {
                let result = open(&path, Access::Write).lock(wanted);
                assert_eq!(result.is_ok(), may, "{held:?} {wanted:?} {result:?}");
            }
        }
    }

    #[test]
    fn qemu_and_we_refuse_each_other() {
        let _alone = serialize();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.vhd");
        // A format with metadata: readers of raw images do not mind writers.
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

        // QEMU first: it holds the image while its standard input is open.
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

    /// A fence: another process has the description with the lock, and is being killed.
    #[test]
    fn the_living_are_not_waited_for_and_the_dying_are() {
        let _alone = serialize();
        let (_folder, path) = image();
        let held = open(&path, Access::Write);
        held.lock(Lock::Exclusive).unwrap();
        let ours = open(&path, Access::Write);
        let f = host_file(&ours).unwrap();
        assert!(is_held_by_live_process(f.as_fd(), f.id()));
        assert_eq!(ours.lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Busy);
        drop(held);
        ours.lock(Lock::Exclusive).unwrap();
        assert!(!is_held_by_live_process(f.as_fd(), f.id()), "its own lock is none against it");
        assert!(tells_of_death("Name:\tx\nState:\tZ (zombie)\n"));
        assert!(tells_of_death("State:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(!tells_of_death("State:\tS (sleeping)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\n"));
    }

    #[test]
    fn lines_of_fdinfo_are_understood() {
        let line = "\t1: OFDLCK  ADVISORY  READ  -1 fe:00:1234 100 101";
        assert!(lock_line_covers(line, 1234, 100) && lock_line_covers(line, 1234, 101));
        assert!(!lock_line_covers(line, 1234, 102) && !lock_line_covers(line, 123, 100));
        assert!(lock_line_covers("1: POSIX  ADVISORY  WRITE 77 00:1a:9 0 EOF", 9, 1000));
        assert!(!lock_line_covers("nonsense", 0, 0) && !lock_line_covers("", 0, 0) && !lock_line_covers("a b c", 0, 0));
    }
}
