//! Locks on open file descriptions (F_OFD_SETLK): one byte for diffdisk, and the bytes that QEMU uses.
//!
//! QEMU (`block/file-posix.c`) takes *read* locks only: byte 100+p means "this process uses permission p", byte 200+p
//! means "this process does not share p" (0 consistent read, 1 write, 3 resize). After locking its bytes, a process
//! checks that no other open file description holds the opposite byte of any of them.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::types::{FileId, Lock};

/// Byte of diffdisk: a write lock for [`Lock::Exclusive`], a read lock for [`Lock::Shared`]. QEMU ignores it.
const OWN_BYTE: i64 = 1000;

/// QEMU's bytes for a writer: uses read, write, resize; does not share write and resize.
const WRITER_BYTES: &[i64] = &[100, 101, 103, 201, 203];
/// QEMU's bytes for a reader: uses read; does not share write and resize.
const READER_BYTES: &[i64] = &[100, 201, 203];

/// Bytes by which a file is recognized as in use: the byte of diffdisk, and those bytes of QEMU that concern reads,
/// writes and the length.
pub(super) const IN_USE_BYTES: [i64; 7] = [OWN_BYTE, 100, 101, 103, 200, 201, 203];

/// Maximum number of descriptors that are examined to find the holder of a lock.
const MAX_DESCRIPTORS: usize = 20_000;

fn bytes_of(lock: Option<Lock>) -> &'static [i64] {
    match lock {
        Some(Lock::Exclusive) => WRITER_BYTES,
        Some(Lock::Shared) => READER_BYTES,
        None => &[],
    }
}

fn own_lock_type(lock: Option<Lock>) -> i32 {
    match lock {
        Some(Lock::Exclusive) => libc::F_WRLCK,
        Some(Lock::Shared) => libc::F_RDLCK,
        None => libc::F_UNLCK,
    }
}

/// Returns the byte that conflicts with `byte` if another open file description holds it.
fn conflicting_byte(byte: i64) -> i64 {
    if byte >= 200 { byte - 100 } else { byte + 100 }
}

fn describe_byte(byte: i64) -> &'static str {
    match byte {
        101 => "is writing to it",
        103 => "may change its length",
        200 => "has it open and does not allow others to read it",
        201 => "has it open and does not allow others to write to it",
        203 => "has it open and does not allow others to change its length",
        _ => "has a lock on it",
    }
}

/// Returns whether `/proc` shows a live process that has a lock on one of [`IN_USE_BYTES`] of the file `id` by another
/// descriptor than `fd`. If not, the lock is taken to belong to a process that has ended or is being killed. Such a
/// lock ends with the last I/O of that process.
pub(super) fn is_held_by_live_process(fd: BorrowedFd<'_>, id: FileId) -> bool {
    let theirs = |d: &LockDescriptor| d.pid != std::process::id() || d.number != fd.as_raw_fd();
    descriptors_with_lock(|line| IN_USE_BYTES.iter().any(|&byte| lock_line_covers(line, id.ino, byte)))
        .any(|d| theirs(&d) && d.refers_to(id) && !is_dying(d.pid))
}

/// Changes the open file description's lock from `held` to `wanted`. After an error the open file description still
/// holds `held`.
pub(super) fn change(fd: BorrowedFd<'_>, id: FileId, held: Option<Lock>, wanted: Lock) -> Result<()> {
    let (old, new) = (bytes_of(held), bytes_of(Some(wanted)));
    let taken = acquire(fd, id, new, wanted);
    let (release, keep) = if taken.is_ok() { (old, new) } else { (new, old) };
    for &byte in release.iter().filter(|b| !keep.contains(b)) {
        set(fd, libc::F_UNLCK, byte).map_err(failed)?;
    }
    if taken.is_err() {
        set(fd, own_lock_type(held), OWN_BYTE).map_err(failed)?;
    }
    taken
}

fn acquire(fd: BorrowedFd<'_>, id: FileId, bytes: &[i64], wanted: Lock) -> Result<()> {
    lock_byte(fd, id, own_lock_type(Some(wanted)), OWN_BYTE, "has it open with diffdisk")?;
    for &byte in bytes {
        lock_byte(fd, id, libc::F_RDLCK, byte, describe_byte(byte))?;
    }
    for byte in bytes.iter().map(|&b| conflicting_byte(b)) {
        if let Some(pid) = other_lock(fd, byte).map_err(failed)? {
            return Err(busy(id, byte, Some(pid), describe_byte(byte)));
        }
    }
    Ok(())
}

fn lock_byte(fd: BorrowedFd<'_>, id: FileId, kind: i32, byte: i64, does: &str) -> Result<()> {
    match set(fd, kind, byte) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(busy(id, byte, other_lock(fd, byte).ok().flatten(), does))
        }
        Err(e) => Err(failed(e)),
    }
}

fn failed(e: io::Error) -> Error {
    Error::io("cannot lock the file", e)
}

fn busy(id: FileId, byte: i64, pid: Option<i32>, does: &str) -> Error {
    let reported = pid.and_then(|p| u32::try_from(p).ok()).filter(|p| *p > 0);
    let holder = match reported.or_else(|| holder_pid(id, byte)) {
        Some(pid) if pid == std::process::id() => "this process".to_string(),
        Some(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("{} (process {pid})", name.trim_end()),
            Err(_) => format!("process {pid}"),
        },
        None => "another process".to_string(),
    };
    Error::new(ErrorKind::Busy, format!("{holder} {does}"))
}

#[allow(clippy::cast_possible_truncation, reason = "the constants are 0, 1, 2")]
fn range(kind: i32, byte: i64) -> libc::flock {
    // SAFETY: flock is a struct of integers, for which all-zero bytes are a valid value.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    l.l_start = byte;
    l.l_len = 1;
    l
}

fn set(fd: BorrowedFd<'_>, kind: i32, byte: i64) -> io::Result<()> {
    let l = range(kind, byte);
    // SAFETY: the descriptor is open as long as `fd`, and F_OFD_SETLK reads one flock from the pointer.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &l) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Returns whether another open file description than that of `fd` holds a lock of diffdisk or QEMU on the file.
pub(super) fn is_locked(fd: BorrowedFd<'_>) -> Result<bool> {
    for byte in IN_USE_BYTES {
        if other_lock(fd, byte).map_err(failed)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the process id of the lock that another open file description holds on a byte, or -1 if the kernel does not
/// report the id. Returns `None` if there is no such lock.
fn other_lock(fd: BorrowedFd<'_>, byte: i64) -> io::Result<Option<i32>> {
    let mut l = range(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open as long as `fd`, and F_OFD_GETLK reads and writes one flock at the pointer.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut l) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok((i32::from(l.l_type) != libc::F_UNLCK).then_some(l.l_pid))
}

/// Returns a process that has a descriptor with a lock on the byte, if `/proc` shows one. Prefers another process over
/// this one, since the open file description of the caller may have a lock on the byte itself. The search is needed
/// because a lock belongs to an open file description, so the kernel reports no process id for it.
fn holder_pid(id: FileId, byte: i64) -> Option<u32> {
    let mut own = None;
    for d in descriptors_with_lock(|line| lock_line_covers(line, id.ino, byte)).filter(|d| d.refers_to(id)) {
        if d.pid != std::process::id() {
            return Some(d.pid);
        }
        own = Some(d.pid);
    }
    own
}

/// Descriptor of a process whose open file description holds a lock.
pub(super) struct LockDescriptor {
    pub(super) pid: u32,
    number: i32,
}

impl LockDescriptor {
    /// Returns whether the descriptor refers to the file `id`. The lock's line is not sufficient: inode numbers are
    /// unique only within a file system, and on btrfs the line contains another device number than stat.
    pub(super) fn refers_to(&self, id: FileId) -> bool {
        fs::metadata(format!("/proc/{}/fd/{}", self.pid, self.number))
            .is_ok_and(|m| FileId { dev: m.dev(), ino: m.ino() } == id)
    }
}

/// Returns the descriptors of all processes whose fdinfo contains a `lock:` line that `is_wanted` accepts. Examines at
/// most [`MAX_DESCRIPTORS`].
pub(super) fn descriptors_with_lock(is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = LockDescriptor> {
    let number = |entry: &fs::DirEntry| entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = processes.filter_map(move |entry| Some((number(&entry)?, entry.path().join("fdinfo"))));
    let all = all.flat_map(move |(pid, folder)| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(move |entry| Some((pid, i32::try_from(number(&entry)?).ok()?, entry.path())))
    });
    all.take(MAX_DESCRIPTORS).filter_map(move |(pid, number, path)| {
        let text = fs::read_to_string(path).ok()?;
        text.lines().filter_map(|l| l.strip_prefix("lock:")).any(&is_wanted).then_some(LockDescriptor { pid, number })
    })
}

/// Returns whether a process has ended (also a zombie), or has been sent SIGKILL.
fn is_dying(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| is_dying_status(&status))
}

/// Parses the status of a process (proc_pid_status(5)). Returns whether it has ended, or has a pending SIGKILL.
fn is_dying_status(status: &str) -> bool {
    let kill = 1 << (libc::SIGKILL - 1);
    status.lines().any(|line| match line.split_once(":\t") {
        Some(("State", state)) => state.starts_with(['Z', 'X']),
        Some(("SigPnd" | "ShdPnd", set)) => u64::from_str_radix(set, 16).is_ok_and(|set| set & kill != 0),
        _ => false,
    })
}

/// Returns whether a `lock:` line in fdinfo (`1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101`) is about this inode
/// number and byte.
pub(super) fn lock_line_covers(line: &str, ino: u64, byte: i64) -> bool {
    let mut words = line.split_whitespace().rev();
    let (Some(last), Some(first), Some(inode)) = (words.next(), words.next(), words.next()) else { return false };
    let first = first.parse::<i64>().unwrap_or(i64::MAX);
    let last = if last == "EOF" { i64::MAX } else { last.parse::<i64>().unwrap_or(-1) };
    inode.rsplit(':').next().and_then(|n| n.parse().ok()) == Some(ino) && (first..=last).contains(&byte)
}

#[cfg(test)]
#[path = "lock_tests.rs"]
pub(super) mod tests;
