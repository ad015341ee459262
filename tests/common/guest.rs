//! The Linux guest of vm-images/: a QEMU machine that runs one job on a daemon's disk.

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock that a running virtual machine holds, so that only one runs at a time: an emulated machine uses whole
/// processors.
static MACHINE_LOCK: Mutex<()> = Mutex::new(());

/// A running guest. Dropping this value ends QEMU.
pub struct Guest {
    child: Child,
    console: BufReader<ChildStdout>,
    lines: Vec<String>,
    _machine_lock: MutexGuard<'static, ()>,
}

/// The console output of a guest whose job succeeded.
pub struct Console(Vec<String>);

impl Guest {
    /// Boots a guest with the disk at `socket`, which runs vm-images/jobs/`job`.sh. `extra` are further arguments of
    /// vm-images/run-guest.sh.
    ///
    /// Panics if QEMU or the guest's image is missing.
    pub fn boot(socket: &Path, job: &str, extra: &[&str]) -> Self {
        let lock = MACHINE_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm-images");
        let cache = std::env::var_os("DIFFDISK_CACHE").map_or_else(|| images.join("cache"), Into::into);
        assert!(
            cache.join("built-from").exists() && cache.join("fio.cpio").exists(),
            "no guest in {}: run `make test`, or `make guest` once",
            cache.display()
        );
        let qemu = std::env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let found = Command::new(&qemu).arg("--version").stdout(Stdio::null()).status();
        assert!(found.is_ok_and(|status| status.success()), "no {qemu:?}: run `make test`, or `make guest` once");
        let mut child = Command::new(images.join("run-guest.sh"))
            .arg("--socket")
            .arg(socket)
            .arg("--job")
            .arg(images.join("jobs").join(job).with_extension("sh"))
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run-guest.sh starts");
        let console = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        Self { child, console, lines: Vec::new(), _machine_lock: lock }
    }

    /// Reads the console up to a line that begins with `prefix`. Panics if the guest ends without printing such a line.
    pub fn wait_for(&mut self, prefix: &str) {
        while let Some(line) = self.next_line() {
            if line.starts_with(prefix) {
                return;
            }
        }
        panic!("the guest ended before it printed {prefix:?}:\n{}", self.lines.join("\n"));
    }

    /// Waits for the end of the job. Panics if the job failed.
    pub fn finish(mut self) -> Console {
        while self.next_line().is_some() {}
        let status = self.child.wait().expect("the guest can be waited for");
        assert!(status.success(), "the guest ended with {status}:\n{}", self.lines.join("\n"));
        Console(std::mem::take(&mut self.lines))
    }

    fn next_line(&mut self) -> Option<&str> {
        let mut bytes = Vec::new();
        let length = self.console.read_until(b'\n', &mut bytes).expect("the console can be read");
        if length == 0 {
            return None;
        }
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        println!("guest: {line}");
        self.lines.push(line);
        self.lines.last().map(String::as_str)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // On SIGTERM the script ends QEMU, too.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

impl Console {
    /// Returns the value of the line `NAME: value`. Panics if the guest printed no such line.
    pub fn value(&self, name: &str) -> &str {
        let value = self.0.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.unwrap_or_else(|| panic!("the guest printed no {name}:\n{}", self.0.join("\n")))
    }
}
