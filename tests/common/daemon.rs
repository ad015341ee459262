//! A running `diffdiskd` that a test can stop, kill and restart.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

use super::client::Client;

/// Maximum wait for a daemon's socket, for a line in its log, and for its end.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A running daemon that serves one disk. Dropping this value kills the daemon.
pub struct Daemon {
    child: Child,
    arguments: Vec<OsString>,
    variables: Vec<(String, String)>,
    /// Identity of the socket that a killed predecessor left.
    old_socket: Option<SocketIdentity>,
    // This folder is in the system's temporary folder, since a socket's path must be short.
    socket_folder: TempDir,
}

impl Daemon {
    /// Starts a daemon on `image` and waits for its socket. `extra` are further command-line arguments.
    pub fn start(image: &Path, extra: &[&str]) -> Self {
        Self::start_with(image, extra, &[])
    }

    /// Starts a daemon as [`Daemon::start`] does, with variables in its environment.
    pub fn start_with(image: &Path, extra: &[&str], variables: &[(&str, &str)]) -> Self {
        let variables: Vec<_> = variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let rendezvous = tempfile::tempdir().expect("a temporary folder");
        let option = |name: &str, value: &Path| {
            let mut option = OsString::from(name);
            option.push(value);
            option
        };
        let mut arguments =
            vec![option("--socket-path=", &rendezvous.path().join("disk.sock")), option("--blk-file=", image)];
        arguments.extend(extra.iter().map(OsString::from));
        let child = spawn(&arguments, &variables, rendezvous.path());
        let mut daemon = Self { child, arguments, variables, old_socket: None, socket_folder: rendezvous };
        daemon.wait_for_socket(None);
        daemon
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> PathBuf {
        self.socket_folder.path().join("disk.sock")
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the log of the daemon and its predecessors.
    pub fn log(&self) -> String {
        fs::read_to_string(self.socket_folder.path().join("log")).unwrap_or_default()
    }

    /// Connects a guest. The daemon resets a new connection while the previous guest's connection is open, and a
    /// program that another thread starts may hold a copy of that connection for a moment. A reset connection is tried
    /// again, as QEMU does.
    #[track_caller]
    pub fn connect(&self) -> Client {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match Client::connect(&self.socket()) {
                Ok(client) => return client,
                Err(e) if e.kind() == ErrorKind::ConnectionReset && Instant::now() < deadline => {
                    sleep(Duration::from_millis(10));
                }
                Err(e) => panic!("cannot connect: {e}; {}", self.log()),
            }
        }
    }

    /// Sends SIGKILL and waits for the exit.
    pub fn kill(mut self) {
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("a killed daemon ends");
    }

    /// Sends SIGKILL without waiting for the exit.
    pub fn send_sigkill(&self) {
        kill_process(Pid::from_child(&self.child), Signal::KILL).expect("the daemon can be killed");
    }

    /// Sends SIGTERM and waits for the exit. Panics if the exit status is not 0.
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("the daemon can be signalled");
        let status = self.wait_for_end();
        assert!(status.success(), "the daemon ended with {status} after SIGTERM; its log:\n{}", self.log());
    }

    /// Waits until the daemon ends by itself.
    pub fn wait_for_exit(mut self) -> ExitStatus {
        self.wait_for_end()
    }

    /// Sends SIGKILL and starts the daemon again with the same command line.
    pub fn kill_and_restart(&mut self) {
        self.kill_running();
        self.restart();
        self.wait_until_listening();
    }

    /// Sends SIGKILL and waits for the exit. Panics if the daemon has already ended.
    pub fn kill_running(&mut self) {
        let running = self.child.try_wait().expect("the daemon can be asked");
        assert!(running.is_none(), "the daemon ended by itself: {running:?}; its log:\n{}", self.log());
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("the daemon can be waited for");
    }

    /// Whether the daemon has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the daemon can be asked").is_some()
    }

    /// Sends SIGKILL, unless the daemon has ended, and waits for the exit.
    pub fn kill_if_running(&mut self) {
        if !self.has_ended() {
            self.kill_running();
        }
    }

    /// Starts an ended daemon again with the same command line.
    pub fn restart(&mut self) {
        self.old_socket = identity(&self.socket());
        self.child = spawn(&self.arguments, &self.variables, self.socket_folder.path());
    }

    /// Starts an ended daemon again with the same command line. The daemon kills itself at a failpoint.
    pub fn restart_killed_at(&mut self, failpoint: &str) {
        self.variables = vec![("DIFFDISK_KILL_AT".to_owned(), failpoint.to_owned())];
        self.restart();
        self.variables.clear();
    }

    /// Waits until the daemon has killed itself.
    pub fn wait_until_killed(&mut self) {
        let status = self.wait_for_end();
        assert_eq!(status.signal(), Some(9), "the daemon ended with {status}; its log:\n{}", self.log());
    }

    /// Waits for the end of a daemon that kills itself, and starts it again with the same command line, without the
    /// variables.
    pub fn restart_without_variables(&mut self) {
        self.wait_for_end();
        self.variables.clear();
        self.restart();
        self.wait_until_listening();
    }

    /// Waits until the daemon listens on a socket that is not its predecessor's.
    pub fn wait_until_listening(&mut self) {
        let old = self.old_socket;
        self.wait_for_socket(old);
    }

    /// Waits until the log of the daemon and its predecessors contains `words` at least `times` times.
    pub fn wait_for_log(&self, words: &str, times: usize) {
        let started = Instant::now();
        while self.log().matches(words).count() < times {
            assert!(started.elapsed() < TIMEOUT, "{words:?} is missing from the log:\n{}", self.log());
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the daemon listens on a socket other than `old`. A socket exists for a moment before it listens.
    fn wait_for_socket(&mut self, old: Option<SocketIdentity>) {
        let started = Instant::now();
        loop {
            let now = identity(&self.socket());
            if now.is_some() && now != old && listens(&self.socket()) {
                return;
            }
            if let Some(status) = self.child.try_wait().expect("the daemon can be asked") {
                panic!("the daemon ended with {status} at its start; its log:\n{}", self.log());
            }
            assert!(started.elapsed() < TIMEOUT, "the daemon does not listen; its log:\n{}", self.log());
            sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_end(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the daemon can be asked") {
                return status;
            }
            assert!(started.elapsed() < TIMEOUT, "the daemon does not end; its log:\n{}", self.log());
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of diffdiskd:\n{}", self.log());
        }
    }
}

fn spawn(arguments: &[OsString], variables: &[(String, String)], folder: &Path) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).expect("a log file");
    let _lock = super::tool::lock_spawns();
    Command::new(env!("CARGO_BIN_EXE_diffdiskd"))
        .args(arguments)
        .envs(variables.iter().cloned())
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("diffdiskd starts")
}

/// Inode number and change time: an inode number alone may be reused at once by a new file of the same name.
type SocketIdentity = (u64, i64, i64);

fn identity(path: &Path) -> Option<SocketIdentity> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Returns whether a socket bound to `path` is listening, according to the kernel's table of sockets. A test connection
/// instead would occupy the daemon's only front-end connection.
fn listens(path: &Path) -> bool {
    /// Value of the column "Flags" of a listening socket (`__SO_ACCEPTCON`).
    const LISTENS: &str = "00010000";
    let table = fs::read_to_string("/proc/net/unix").expect("the kernel's table of sockets");
    let mut of_path = table
        .lines()
        .map(str::split_whitespace)
        .filter(|line| line.clone().last().is_some_and(|p| Path::new(p) == path));
    of_path.any(|mut line| line.nth(3) == Some(LISTENS))
}
