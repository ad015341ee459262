//! Runs one program on hostile input: under a time limit, with its peak memory from the kernel's own account.
#![allow(unsafe_code)]

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A hang is a defect; the promise is a second, this is where a busy machine's noise ends.
const KILL_AFTER: Duration = Duration::from_secs(5);
/// Peak resident memory a refusal may take.
const MEMORY_MIB: i64 = 64;

/// One run.
pub(crate) struct Run {
    /// Exit code, or the negative number of the signal that ended it.
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
    pub(crate) rss_kib: i64,
}

impl Run {
    /// What no input may cause, whatever the verdict on it: a signal (a panic, an abort, the time limit), a backtrace,
    /// memory by a number from the file.
    pub(crate) fn assert_sane(&self, what: &str) {
        self.assert_sane_within(what, MEMORY_MIB);
    }

    /// Like [`Run::assert_sane`], where the format allows more memory.
    pub(crate) fn assert_sane_within(&self, what: &str, memory_mib: i64) {
        assert!(self.took < KILL_AFTER, "{what}: still running after {:?}: {}", self.took, self.stderr);
        assert!(self.code >= 0, "{what}: ended by signal {}: {}", -self.code, self.stderr);
        assert!(self.code != 101 && !self.stderr.contains("panicked"), "{what}: panicked: {}", self.stderr);
        assert!(self.rss_kib <= memory_mib << 10, "{what}: took {} KiB of memory", self.rss_kib);
    }

    /// The one line that says what failed.
    pub(crate) fn error_line(&self, what: &str) -> &str {
        let mut said = self.stderr.lines().filter(|line| line.starts_with("diffdisk: "));
        let line = said.next().unwrap_or_else(|| panic!("{what}: no line of diffdisk on stderr: {:?}", self.stderr));
        assert_eq!(said.next(), None, "{what}: more than one error line");
        line
    }
}

/// Runs `command` to its end or to the time limit.
#[allow(clippy::zombie_processes, reason = "wait4 below reaps it; the standard library's wait tells no memory")]
pub(crate) fn run(command: &mut Command) -> Run {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let read_out = thread::spawn(move || {
        let mut all = Vec::new();
        // A disk that is shown by mistake may be endless; its start is enough to fail.
        out.by_ref().take(1 << 20).read_to_end(&mut all).expect("stdout is readable");
        all
    });
    let read_err = thread::spawn(move || {
        let mut all = Vec::new();
        err.read_to_end(&mut all).expect("stderr is readable");
        String::from_utf8_lossy(&all).into_owned()
    });
    let pid = libc::pid_t::try_from(child.id()).expect("a process id");
    let (mut status, mut usage) = (0, None);
    let mut killed = false;
    let took = loop {
        let mut now = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: both pointers are to live variables; the child is ours and was not waited for before.
        let waited = unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, now.as_mut_ptr()) };
        assert!(waited >= 0, "wait4: {}", std::io::Error::last_os_error());
        if waited == pid {
            // SAFETY: wait4 reaped the child and filled the structure, which is plain numbers.
            usage = Some(unsafe { now.assume_init() });
        }
        if usage.is_some() {
            break started.elapsed();
        }
        if !killed && started.elapsed() > KILL_AFTER {
            child.kill().expect("the program can be killed");
            killed = true;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) };
    Run {
        code,
        stdout: read_out.join().expect("the reader of stdout ends"),
        stderr: read_err.join().expect("the reader of stderr ends"),
        took,
        rss_kib: usage.map_or(i64::MAX, |u| u.ru_maxrss),
    }
}
