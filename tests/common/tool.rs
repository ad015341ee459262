//! Runs programs under a time limit and returns their output. [`lock_spawns`] keeps other threads from starting
//! programs with [`start`].

use std::ffi::OsStr;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Path of the image tool.
pub(crate) const DIFFDISK: &str = env!("CARGO_BIN_EXE_diffdisk");
/// Path of the daemon.
pub(crate) const DIFFDISKD: &str = env!("CARGO_BIN_EXE_diffdiskd");

/// The outcome of a finished program.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The exit code; `None` if a signal ended the program.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: Vec<u8>,
    /// Standard error.
    pub(crate) stderr: String,
    /// Wall time.
    pub(crate) elapsed: Duration,
    /// Whether the program was killed at the time limit.
    pub(crate) killed: bool,
}

impl Finished {
    /// Panics unless the exit code is 0.
    #[track_caller]
    pub(crate) fn ok(self) -> Finished {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// Parses standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("{e}: {:?}", String::from_utf8_lossy(&self.stdout)))
    }
}

/// Runs `diffdisk` with `args`.
pub(crate) fn diffdisk<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Finished {
    run(Command::new(DIFFDISK).args(args), Duration::from_secs(60))
}

/// Runs `command` to its end, or kills it after `limit`.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Finished {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = start(command).unwrap_or_else(|e| panic!("{}: {e}", command.get_program().display()));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let (code, killed) = wait(&mut child, started + limit);
    Finished {
        code,
        stdout: stdout.join().expect("the reader of stdout ends"),
        stderr: String::from_utf8_lossy(&stderr.join().expect("the reader of stderr ends")).into_owned(),
        elapsed: started.elapsed(),
        killed,
    }
}

/// Starts a program. Waits while another thread holds the guard of [`lock_spawns`].
pub(crate) fn start(command: &mut Command) -> std::io::Result<Child> {
    let _lock = lock_spawns();
    command.spawn()
}

/// Keeps other threads from starting programs with [`start`], and from taking this lock, until the returned guard is
/// dropped. A test that opens images in its own process holds the guard: between fork and exec a child process shares
/// all open files of this process, with their locks.
pub(crate) fn lock_spawns() -> MutexGuard<'static, ()> {
    static SPAWN_LOCK: Mutex<()> = Mutex::new(());
    SPAWN_LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a program and kills it at `deadline`. Returns the exit code, and whether the program was killed.
pub(crate) fn wait(child: &mut Child, deadline: Instant) -> (Option<i32>, bool) {
    loop {
        if let Some(status) = child.try_wait().expect("the program can be waited for") {
            return (status.code(), false);
        }
        if Instant::now() >= deadline {
            child.kill().expect("the program can be killed");
            return (child.wait().expect("a killed program ends").code(), true);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Returns whether a folder of PATH has a file `name`.
pub(crate) fn on_path(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// Panics unless every program of `names` is installed.
#[track_caller]
pub(crate) fn require(names: &[&str]) {
    let missing: Vec<_> = names.iter().filter(|name| !on_path(name)).collect();
    assert!(missing.is_empty(), "not installed: {missing:?}; `make test` installs what the tests need");
}

/// Creates a socket file on which no process listens. `path` may be longer than a socket's address: the socket is bound
/// through the descriptor of its folder.
pub(crate) fn leave_socket(path: &Path) {
    let folder = std::fs::File::open(path.parent().expect("a folder")).expect("the folder opens");
    let name = path.file_name().expect("a name").display();
    let short = format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&folder));
    drop(std::os::unix::net::UnixListener::bind(short).expect("a socket"));
}

fn drain(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    let mut from = from.expect("the stream is piped");
    thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).expect("the program's output is readable");
        all
    })
}
