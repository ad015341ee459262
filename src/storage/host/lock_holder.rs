//! Finds the processes that hold locks on files, in `/proc`.
//!
//! A lock belongs to an open file description, not to a process. The kernel lists the locks of an open file description
//! in the fdinfo of each descriptor that refers to it. One pass over these files finds the holders of any number of
//! files.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use super::file::HostFile;
use super::lock;
use crate::storage::backend::FileBackend;
use crate::storage::types::{FileId, LockHolder};

/// Returns the lock holder of each file.
pub(super) fn lock_holders(files: &[Option<&HostFile>]) -> Vec<Option<LockHolder>> {
    let mut pending: Vec<Option<FileId>> =
        files.iter().map(|file| file.filter(|f| is_locked(f)).map(HostFile::id)).collect();
    let mut holders: Vec<_> = pending.iter().map(|id| id.map(|_| LockHolder::Hidden)).collect();
    if pending.iter().all(Option::is_none) {
        return holders;
    }
    let inodes: Vec<u64> = pending.iter().flatten().map(|id| id.ino).collect();
    let concerns = |line: &str| {
        inodes.iter().any(|&ino| lock::IN_USE_BYTES.iter().any(|&byte| lock::lock_line_covers(line, ino, byte)))
    };
    for descriptor in lock::descriptors_with_lock(concerns) {
        for (id, holder) in pending.iter_mut().zip(&mut holders) {
            if id.is_some_and(|id| descriptor.refers_to(id)) {
                *holder = process(descriptor.pid).or(holder.take());
                *id = None;
            }
        }
        if pending.iter().all(Option::is_none) {
            break;
        }
    }
    holders
}

fn is_locked(file: &HostFile) -> bool {
    lock::is_locked(file.as_fd()).unwrap_or_else(|e| {
        log::debug!("{}: {}", file.path().display(), e.line());
        false
    })
}

/// Describes a process. Returns `None` if it has ended.
fn process(pid: u32) -> Option<LockHolder> {
    let folder = Path::new("/proc").join(pid.to_string());
    let program = fs::read_to_string(folder.join("comm")).ok()?.trim_end().to_owned();
    let ticks = fs::read_to_string(folder.join("stat")).ok().and_then(|stat| start_ticks(&stat));
    let boot = fs::read_to_string("/proc/stat").ok().and_then(|stat| boot_time(&stat));
    let since = ticks.zip(boot).and_then(|(ticks, boot)| {
        let seconds = ticks / rustix::param::clock_ticks_per_second().max(1);
        boot.checked_add(i64::try_from(seconds).ok()?)
    });
    Some(LockHolder::Process { pid, program, since })
}

/// Returns the start time of a process in clock ticks since boot: field 22 of its stat file (proc_pid_stat(5)). The
/// second field is the program's name in parentheses, which may contain any characters.
fn start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Returns the boot time in Unix seconds (proc_stat(5)).
fn boot_time(stat: &str) -> Option<i64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::env::Env;
    use crate::storage::host::Host;
    use crate::storage::types::{Access, Lock};

    #[test]
    fn times_are_parsed_after_any_program_name() {
        let rest = "S 1 7 7 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 4321 5000 6";
        assert_eq!(start_ticks(&format!("7 (a) b (c)) {rest}")), Some(4321));
        assert_eq!((start_ticks("7 a S 1"), start_ticks("7 (a) S 1")), (None, None));
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\nprocesses 5\n"), Some(1_700_000_000));
        assert_eq!(boot_time("cpu 1 2\n"), None);
    }

    #[test]
    fn the_process_that_holds_a_lock_is_found() {
        let _serial = lock::tests::serialize();
        let folder = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| folder.path().join(name));
        paths.iter().for_each(|path| fs::write(path, "x").unwrap());
        let held = Host.open(&paths[0], Access::Write).unwrap();
        let files = paths.each_ref().map(|path| Host.open(path, Access::Read).unwrap());
        let look = || Host.lock_holders(&[&files[0], &files[1]]);
        assert_eq!(look(), [None, None]);
        for lock in [Lock::Exclusive, Lock::Shared] {
            held.lock(lock).unwrap();
            let [Some(LockHolder::Process { pid, since, .. }), None] = look()[..] else {
                panic!("{lock:?}: {:?}", look())
            };
            assert_eq!(pid, std::process::id());
            let age = Host.now() - since.expect("a time");
            assert!((-5..3600).contains(&age), "started {age} s ago");
        }
        drop(held);
        assert_eq!(look(), [None, None]);
    }
}
