//! One run of a program: time and peak memory.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Measurements of one run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub seconds: f64,
    /// Processor time in seconds, user and system.
    pub cpu: f64,
    /// Peak resident memory in MiB. (Linux includes the memory that the bench had at fork(2), so the bench must stay
    /// small.)
    pub mebibytes: f64,
    /// Number of bytes that the run processed, or 0 if the run has no speed.
    pub bytes: u64,
}

/// Runs a program and waits for its end.
///
/// # Panics
/// If the program cannot be run or fails.
#[allow(clippy::zombie_processes, reason = "wait4 below waits for it, and tells its memory")]
pub fn run(command: &mut Command) -> Run {
    let started = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let child = child.unwrap_or_else(|e| panic!("{}: {e}; run `make bench`", command.get_program().display()));
    let pid = i32::try_from(child.id()).expect("a process number");
    let mut status = 0;
    // SAFETY: `rusage` consists of integers only, for which all zeros are valid.
    let mut used: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: wait4(2) writes through both pointers during the call only. They point to local variables of the
        // types that the call requires, and nothing else uses the variables during the call.
        let ended = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut used) };
        if ended == pid {
            break;
        }
        let e = io::Error::last_os_error();
        assert_eq!(e.kind(), io::ErrorKind::Interrupted, "cannot wait for {command:?}: {e}");
    }
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(status, 0, "{command:?} ended with the wait status {status:#x}");
    let time = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    Run { seconds, cpu: time(used.ru_utime) + time(used.ru_stime), mebibytes: used.ru_maxrss as f64 / 1024.0, bytes: 0 }
}

/// Returns the command of a program with its arguments.
pub fn program<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(name);
    command.args(arguments);
    command
}

/// Returns the command `diffdisk VERB`, isolated from the daemons of this machine.
pub fn diffdisk(verb: &str, paths: &[&Path], options: &[&str]) -> Command {
    let runtime = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-runtime-folder");
    let mut command = program(env!("CARGO_BIN_EXE_diffdisk"), [verb, "--quiet", "--runtime-dir"]);
    command.arg(runtime).args(paths).args(options);
    command
}

/// Returns the command of a durable copy with `dd`.
pub fn dd(from: &Path, to: &Path) -> Command {
    let operand = |name: &str, path: &Path| [OsStr::new(name), path.as_os_str()].join(OsStr::new("="));
    let mut command = Command::new("dd");
    command.args([operand("if", from), operand("of", to)]).args(["bs=1M", "conv=fsync", "status=none"]);
    command
}

/// Returns the command of a durable `qemu-img convert`.
pub fn qemu_convert(from: (&str, &Path), to: (&str, &Path), options: &[&str]) -> Command {
    let mut command = program("qemu-img", ["convert", "-t", "writeback", "-f", from.0, "-O", to.0]);
    for option in options {
        command.args(["-o", option]);
    }
    command.args([from.1, to.1]);
    command
}
