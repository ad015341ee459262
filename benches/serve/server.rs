//! The servers under load: `diffdiskd` and qemu-storage-daemon. The server runs on the first processor, and the guest
//! on the last processor.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::load::Guest;
use crate::processors::{pin, pin_this_thread, processors};

/// Maximum time for a server to create its socket, and to end.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A server program.
#[derive(Clone)]
pub enum Kind {
    /// `diffdiskd` with additional arguments.
    Ours(Vec<&'static str>),
    /// qemu-storage-daemon with the format driver of this name.
    Qemu(&'static str),
}

impl Kind {
    pub fn ours() -> Kind {
        Kind::Ours(Vec::new())
    }
}

/// A running server. The server is killed on drop.
pub struct Server {
    child: Child,
    folder: TempDir,
    /// Time at which the server was started.
    pub started: Instant,
}

impl Server {
    /// Starts a server for `image`. Returns when the socket of the server exists.
    pub fn start(kind: &Kind, image: &Path) -> Server {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let (program, arguments) = command(kind, image, folder.path());
        let log = File::create(folder.path().join("log")).expect("a log file");
        // The child process inherits the affinity of this thread.
        pin_this_thread(0);
        let started = Instant::now();
        let child = Command::new(&program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}; run `make bench`", program.display()));
        pin_this_thread(processors() - 1);
        let mut server = Server { child, folder, started };
        server.wait_for_socket();
        server
    }

    fn wait_for_socket(&mut self) {
        while !self.socket().exists() {
            if let Some(status) = self.child.try_wait().expect("the server can be asked") {
                panic!("the server ended with {status}; it said: {}", self.log());
            }
            assert!(self.started.elapsed() < TIMEOUT, "no socket; the server said: {}", self.log());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Pins each thread of the server to the processor that `processor` returns for the name of the thread.
    pub fn pin(&self, processor: impl Fn(&str) -> usize) {
        for task in self.tasks() {
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            let id = task.file_name().and_then(|n| n.to_str()?.parse().ok()).expect("a task is a number");
            pin(id, processor(name.trim()));
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Connects a guest with `queues` queues.
    pub fn connect(&self, queues: usize) -> Guest {
        // qemu-storage-daemon creates its socket a moment before it listens, so the connection is retried.
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match Guest::connect(&self.socket(), queues) {
                Ok(guest) => return guest,
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < until => {}
                Err(e) => panic!("cannot connect: {e}; the server said: {}", self.log()),
            }
        }
    }

    /// Returns the processor time that the running threads of the server have used since their start.
    pub fn processor_time(&self) -> Duration {
        let nanos = |task: PathBuf| {
            let text = fs::read_to_string(task.join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        };
        Duration::from_nanos(self.tasks().filter_map(nanos).sum())
    }

    /// Returns the current and the peak resident memory in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the server is there");
        let value = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)).expect("Linux tells");
            line.trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
        };
        (value("VmRSS:"), value("VmHWM:"))
    }

    fn tasks(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let folder = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("the server is there");
        folder.filter_map(|entry| entry.ok().map(|e| e.path()))
    }

    /// Stops the server with SIGTERM.
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("the server can be signalled");
        let deadline = Instant::now() + TIMEOUT;
        while self.child.try_wait().expect("the server can be asked").is_none() {
            assert!(Instant::now() < deadline, "the server does not end; it said: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(kind: &Kind, image: &Path, folder: &Path) -> (PathBuf, Vec<OsString>) {
    let socket = folder.join("s");
    match kind {
        Kind::Ours(extra) => {
            let mut arguments = vec![
                "--blk-file".into(),
                image.into(),
                "--socket-path".into(),
                socket.into(),
                "--runtime-dir".into(),
                folder.into(),
                "--log-level=warn".into(),
            ];
            arguments.extend(extra.iter().map(OsString::from));
            (env!("CARGO_BIN_EXE_diffdiskd").into(), arguments)
        }
        Kind::Qemu(format) => {
            let image = image.to_str().expect("our own names").replace(',', ",,");
            let file = format!("driver=file,node-name=file,aio=io_uring,filename={image}");
            let mut arguments = vec!["--object".to_owned(), "iothread,id=io".into(), "--blockdev".into(), file];
            let mut node = "file";
            if *format != "raw" {
                arguments.extend(["--blockdev".into(), format!("driver={format},node-name=disk,file=file")]);
                node = "disk";
            }
            let socket = socket.to_str().expect("our own names");
            let export = format!(
                "type=vhost-user-blk,id=e,node-name={node},addr.type=unix,addr.path={socket},writable=on,iothread=io"
            );
            arguments.extend(["--export".into(), export]);
            ("qemu-storage-daemon".into(), arguments.into_iter().map(OsString::from).collect())
        }
    }
}
