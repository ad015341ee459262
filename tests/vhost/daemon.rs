//! The daemon as a child process of the test: start, wait, stop.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;

/// Name of the socket of the disk.
pub(crate) const SOCKET: &str = "vhost.sock";

/// A running daemon with one disk; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Serves `image` on a socket in `dir`; returns when the socket listens.
    pub(crate) fn start(dir: &Path, image: &Path, options: &[&str]) -> Daemon {
        let mut command = Command::new(cargo_bin!("diffdiskd"));
        command.arg("--socket-path").arg(dir.join(SOCKET)).arg("--blk-file").arg(image).args(options);
        Daemon::run(dir, command)
    }

    /// Serves `disks`, the last of which must have the socket [`SOCKET`] in `dir`.
    pub(crate) fn start_disks(dir: &Path, disks: &[String], options: &[&str]) -> Daemon {
        let mut command = Command::new(cargo_bin!("diffdiskd"));
        command.args(disks.iter().flat_map(|disk| ["--disk", disk])).args(options);
        Daemon::run(dir, command)
    }

    fn run(dir: &Path, mut command: Command) -> Daemon {
        let (socket, log) = (dir.join(SOCKET), dir.join("log"));
        let child = command.stderr(File::create(&log).unwrap()).stdin(Stdio::null()).spawn().unwrap();
        let mut daemon = Daemon { child, socket, log };
        // The daemon logs this line after the socket listens. The socket's name appears a moment earlier.
        let serves = format!(" on {}, ", daemon.socket.display());
        daemon.wait_until("the disk is served", |daemon| daemon.log().contains(&serves));
        daemon
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Returns whether the daemon has mapped a part of `file`.
    pub(crate) fn has_mapped(&self, file: &Path) -> bool {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        maps.contains(&*file.canonicalize().unwrap().to_string_lossy())
    }

    /// Returns the log written so far.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        File::open(&self.log).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits until the log contains `words` at least `times` times.
    pub(crate) fn wait_for_log(&mut self, words: &str, times: usize) {
        self.wait_until(words, |daemon| daemon.log().matches(words).count() >= times);
    }

    fn wait_until(&mut self, what: &str, is_so: impl Fn(&Daemon) -> bool) {
        for _ in 0..3000 {
            if is_so(self) {
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("waiting for {what:?}: the daemon ended, {status}:\n{}", self.log());
            }
            sleep(Duration::from_millis(10));
        }
        panic!("timed out waiting for {what:?}:\n{}", self.log());
    }

    /// Sends SIGTERM and waits for the exit.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.send_term();
        self.child.wait().unwrap()
    }

    /// Sends SIGTERM and waits at most `time`. Returns `None` if the daemon still runs after this time.
    pub(crate) fn terminate_within(&mut self, time: Duration) -> Option<ExitStatus> {
        self.send_term();
        let begun = Instant::now();
        while begun.elapsed() < time {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            sleep(Duration::from_millis(10));
        }
        None
    }

    fn send_term(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
