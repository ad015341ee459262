//! `diffdiskd` in a test's hands: started, stopped as an administrator would, or killed.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

use super::client::Client;

/// How long a daemon may take to offer its socket, and to end after SIGTERM: both are quick, unless something hangs.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A running daemon that serves one disk. Dropped, it is killed.
pub struct Daemon {
    child: Child,
    arguments: Vec<OsString>,
    /// What a killed predecessor has left.
    old_socket: Option<SocketIdentity>,
    // A folder of its own: a socket's path must be short.
    socket_folder: TempDir,
}

impl Daemon {
    /// Serves `image`; returns when the socket is there. `extra` are further command-line arguments.
    pub fn start(image: &Path, extra: &[&str]) -> Self {
        let rendezvous = tempfile::tempdir().expect("a temporary folder");
        let option = |name: &str, value: &Path| {
            let mut option = OsString::from(name);
            option.push(value);
            option
        };
        let mut arguments =
            vec![option("--socket-path=", &rendezvous.path().join("disk.sock")), option("--blk-file=", image)];
        arguments.extend(extra.iter().map(OsString::from));
        let child = spawn(&arguments, rendezvous.path());
        let mut daemon = Self { child, arguments, old_socket: None, socket_folder: rendezvous };
        daemon.wait_for_socket(None);
        daemon
    }

    /// Where front-ends connect.
    pub fn socket(&self) -> PathBuf {
        self.socket_folder.path().join("disk.sock")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.socket_folder.path().join("log")).unwrap_or_default()
    }

    /// A guest on its disk. The one before may have left a moment ago, with its socket still open in a program that
    /// another thread is just starting: then it is tried again, as QEMU does.
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

    /// SIGKILL: the process dies as it is.
    pub fn kill(mut self) {
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("a killed daemon ends");
    }

    /// SIGKILL without waiting for its end.
    pub fn send_sigkill(&self) {
        kill_process(Pid::from_child(&self.child), Signal::KILL).expect("the daemon can be killed");
    }

    /// Ends it by SIGTERM. The test fails when its exit status is not 0.
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("the daemon can be signalled");
        let status = self.wait_for_end();
        assert!(status.success(), "the daemon ended with {status} after SIGTERM; it said:\n{}", self.log());
    }

    /// Kills it (SIGKILL), whatever it was doing, and starts it again with the same command line.
    pub fn kill_and_restart(&mut self) {
        self.kill_running();
        self.restart();
        self.wait_until_listening();
    }

    /// SIGKILL, at work: it must not have ended by itself.
    pub fn kill_running(&mut self) {
        let running = self.child.try_wait().expect("the daemon can be asked");
        assert!(running.is_none(), "the daemon ended by itself: {running:?}; it said:\n{}", self.log());
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("the daemon can be waited for");
    }

    /// Starts it again, after its end, with the same command line.
    pub fn restart(&mut self) {
        self.old_socket = identity(&self.socket());
        self.child = spawn(&self.arguments, self.socket_folder.path());
    }

    /// Waits until there is a socket other than the one that its predecessor has left, and it listens.
    pub fn wait_until_listening(&mut self) {
        let old = self.old_socket;
        self.wait_for_socket(old);
    }

    /// Waits until it, or a predecessor, has said `words` so many times.
    pub fn wait_for_log(&self, words: &str, times: usize) {
        let started = Instant::now();
        while self.log().matches(words).count() < times {
            assert!(started.elapsed() < TIMEOUT, "in vain waited for {words:?}; the daemon said:\n{}", self.log());
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until there is a socket other than `old`, the one a killed daemon has left, and it listens: a moment lies
    /// between the two.
    fn wait_for_socket(&mut self, old: Option<SocketIdentity>) {
        let started = Instant::now();
        loop {
            let now = identity(&self.socket());
            if now.is_some() && now != old && listens(&self.socket()) {
                return;
            }
            if let Some(status) = self.child.try_wait().expect("the daemon can be asked") {
                panic!("the daemon ended with {status} at its start; it said:\n{}", self.log());
            }
            assert!(started.elapsed() < TIMEOUT, "the daemon has no socket yet; it said:\n{}", self.log());
            sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_end(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the daemon can be asked") {
                return status;
            }
            assert!(started.elapsed() < TIMEOUT, "the daemon does not end; it said:\n{}", self.log());
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
            eprintln!("diffdiskd said:\n{}", self.log());
        }
    }
}

fn spawn(arguments: &[OsString], folder: &Path) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).expect("a log file");
    let _alone = super::tool::lock_spawns();
    Command::new(env!("CARGO_BIN_EXE_diffdiskd"))
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("diffdiskd starts")
}

/// Tells a new file from an old one of the same name: an inode number alone may be used again at once.
type SocketIdentity = (u64, i64, i64);

fn identity(path: &Path) -> Option<SocketIdentity> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// If a socket that is bound to `path` accepts connections, by the host's table of them: to connect to it would keep its
/// front-end out.
fn listens(path: &Path) -> bool {
    /// Of the column "Flags": it accepts connections (`__SO_ACCEPTCON`).
    const LISTENS: &str = "00010000";
    let table = fs::read_to_string("/proc/net/unix").expect("the host's table of sockets");
    let mut of_path = table
        .lines()
        .map(str::split_whitespace)
        .filter(|line| line.clone().last().is_some_and(|p| Path::new(p) == path));
    of_path.any(|mut line| line.nth(3) == Some(LISTENS))
}
