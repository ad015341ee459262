//! A running `diffdiskd` that serves one disk, and ends with the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::client::Client;
use super::tool::{self, DIFFDISKD};

/// How long a start or a stop may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon serving one disk over a socket in a folder of its own.
pub(crate) struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// Serves `image`; `extra` are further options. Returns when the socket exists.
    #[track_caller]
    pub(crate) fn start(image: &Path, extra: &[&str]) -> Daemon {
        // Not in target/: a socket's name has 107 bytes at most.
        let folder = tempfile::Builder::new().prefix("dd").tempdir().expect("a folder for the socket");
        let log = File::create(folder.path().join("log")).expect("a log file");
        let mut command = Command::new(DIFFDISKD);
        command.arg(format!("--socket-path={}", folder.path().join("sock").display()));
        command.arg(format!("--blk-file={}", image.display()));
        command.arg(format!("--runtime-dir={}", folder.path().display())).args(extra);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("diffdiskd starts");
        let mut daemon = Daemon { child, folder };
        let deadline = Instant::now() + PATIENCE;
        while !daemon.socket().exists() {
            let ended = daemon.child.try_wait().expect("the daemon can be waited for");
            assert!(ended.is_none(), "diffdiskd ended ({ended:?}): {}", daemon.log());
            assert!(Instant::now() < deadline, "diffdiskd made no socket: {}", daemon.log());
            thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    /// The socket it serves.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    /// What it logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A guest on its disk.
    #[track_caller]
    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.socket()).unwrap_or_else(|e| panic!("cannot connect: {e}; {}", self.log()))
    }

    /// SIGTERM; panics unless it then exits with 0.
    #[track_caller]
    pub(crate) fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("the daemon can be signalled");
        let (code, killed) = tool::wait(&mut self.child, Instant::now() + PATIENCE);
        assert!(!killed, "diffdiskd did not stop: {}", self.log());
        assert_eq!(code, Some(0), "diffdiskd stopped with an error: {}", self.log());
    }

    /// SIGKILL: the process dies as it is.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("a killed daemon ends");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already gone after stop() and kill(): both calls then fail, and nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
