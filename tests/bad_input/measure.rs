//! Runs one program on hostile input with a time limit, and reads its peak memory from the kernel's resource usage.
//!
//! The program is run through GNU time. A child's peak memory includes that of the process that forked it, and the
//! memory of the test process grows during the test.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Time limit of a run. The requirement is one second; the rest allows for a busy machine.
const KILL_AFTER: Duration = Duration::from_secs(5);
/// Limit of the peak resident memory of a refusal.
const MEMORY_MIB: i64 = 64;

/// The result of one run.
pub(crate) struct Run {
    /// Exit code, or the negative number of the signal that ended the program.
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) elapsed: Duration,
    pub(crate) rss_kib: i64,
}

impl Run {
    /// Panics unless the conditions that hold for every input are met: no signal (abort, time limit), no panic, and at
    /// most [`MEMORY_MIB`] of memory, whatever numbers the file contains.
    pub(crate) fn assert_sane(&self, what: &str) {
        self.assert_sane_within(what, MEMORY_MIB);
    }

    /// Checks the same conditions as [`Run::assert_sane`], with another limit of memory.
    pub(crate) fn assert_sane_within(&self, what: &str, memory_mib: i64) {
        assert!(self.elapsed < KILL_AFTER, "{what}: still running after {:?}: {}", self.elapsed, self.stderr);
        assert!(self.code >= 0, "{what}: ended by signal {}: {}", -self.code, self.stderr);
        assert!(self.code != 101 && !self.stderr.contains("panicked"), "{what}: panicked: {}", self.stderr);
        assert!(self.rss_kib <= memory_mib << 10, "{what}: took {} KiB of memory", self.rss_kib);
    }

    /// Returns the error line. Panics unless there is exactly one.
    pub(crate) fn error_line(&self, what: &str) -> &str {
        let mut lines = self.stderr.lines().filter(|line| line.starts_with("diffdisk: "));
        let line = lines.next().unwrap_or_else(|| panic!("{what}: no line of diffdisk on stderr: {:?}", self.stderr));
        assert_eq!(lines.next(), None, "{what}: more than one error line");
        line
    }
}

/// Runs `command` to its end or to the time limit.
pub(crate) fn run(command: &mut Command) -> Run {
    let account = tempfile::NamedTempFile::new().expect("a file for the account");
    let mut timed = Command::new("/usr/bin/time");
    timed.args(["--quiet", "--format=%M", "--output"]).arg(account.path());
    timed.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(name, value),
            None => timed.env_remove(name),
        };
    }
    // GNU time and the program get a process group of their own, so that the time limit kills both.
    timed.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = timed.spawn().unwrap_or_else(|e| panic!("{timed:?}: {e}; `make test` installs it"));
    let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let read_out = thread::spawn(move || {
        let mut all = Vec::new();
        // A disk printed by mistake may be very long. Its first bytes suffice to fail the test.
        out.by_ref().take(1 << 20).read_to_end(&mut all).expect("stdout is readable");
        all
    });
    let read_err = thread::spawn(move || {
        let mut all = Vec::new();
        err.read_to_end(&mut all).expect("stderr is readable");
        String::from_utf8_lossy(&all).into_owned()
    });
    let mut killed = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("the program can be waited for") {
            break status;
        }
        if !killed && started.elapsed() > KILL_AFTER {
            kill_process_group(Pid::from_child(&child), Signal::KILL).expect("the group can be killed");
            killed = true;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let took = started.elapsed();
    // Like a shell, GNU time reports a signal as an exit code above 128.
    let code = status.code().map_or_else(
        || -status.signal().expect("no code: a signal"),
        |code| match code {
            128.. => 128 - code,
            code => code,
        },
    );
    let rss_kib = std::fs::read_to_string(account.path()).expect("the account is text");
    Run {
        code,
        stdout: read_out.join().expect("the reader of stdout ends"),
        stderr: read_err.join().expect("the reader of stderr ends"),
        elapsed: took,
        rss_kib: rss_kib.trim().parse().unwrap_or(i64::MAX),
    }
}

#[test]
fn peak_memory_excludes_the_test_process() {
    let ours = vec![1u8; 100 << 20];
    let little = run(&mut Command::new("true"));
    assert!(ours.iter().all(|b| *b == 1) && little.rss_kib < 20 << 10, "true counts {} KiB", little.rss_kib);
    // The command fills a shell variable of 40 MB.
    let much = run(Command::new("bash").args(["-c", "x=$(head -c 40000000 /dev/zero | tr '\\0' x)"]));
    assert!(much.rss_kib > 40 << 10, "40 MB count {} KiB", much.rss_kib);
    assert_eq!(run(Command::new("bash").args(["-c", "exit 3"])).code, 3);
    assert_eq!(run(Command::new("bash").args(["-c", "kill -9 $$"])).code, -9);
}
