//! The start of the daemon: inherited sockets, refusals, and no leftover files after a failed start.

use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use rustix::process::{Pid, Signal, kill_process};

use super::blk::Guest;
use super::image;
use super::setup::MIB;
use super::temp::{self, RuntimeDir};

/// A folder for images, and a separate runtime folder.
struct StartFixture {
    dir: tempfile::TempDir,
    runtime: RuntimeDir,
}

impl StartFixture {
    fn new() -> StartFixture {
        StartFixture { dir: temp::scratch("start"), runtime: RuntimeDir::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Creates a dynamic image, which has a live journal while it is served.
    fn image(&self, name: &str) -> PathBuf {
        let made = self.tool(&["create", name, "--size", "64M", "--quiet"]);
        assert!(made.status.success(), "{}", stderr_text(&made));
        self.path(name)
    }

    fn tool(&self, args: &[&str]) -> Output {
        let mut command = Command::new(cargo_bin!("diffdisk"));
        command.current_dir(&self.dir).args(args).arg(self.runtime.option()).output().unwrap()
    }

    /// Returns the command of a shell that runs `before` and then the daemon.
    fn daemon(&self, before: &str, args: &str) -> Command {
        // env restores SIGHUP even under nohup. A shell cannot restore a signal that it inherited as ignored.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP", "sh"]);
        let runtime = self.runtime.option();
        let program = cargo_bin!("diffdiskd").display();
        let line = format!("{before} exec {program} --no-system-config {runtime} {args}");
        command.current_dir(&self.dir).args(["-c", &line]).stdin(Stdio::null()).stderr(self.log());
        command
    }

    fn log(&self) -> fs::File {
        fs::File::options().create(true).append(true).open(self.path("log")).unwrap()
    }

    fn log_text(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    #[track_caller]
    fn wait_for(&self, child: &mut Child, words: &str) {
        let begun = Instant::now();
        while !self.log_text().contains(words) {
            assert!(child.try_wait().unwrap().is_none(), "the daemon ended: {}", self.log_text());
            assert!(begun.elapsed() < Duration::from_secs(60), "timed out waiting for {words:?}: {}", self.log_text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the names of files that a daemon may have left: journals, sockets, locks.
    fn leftover_files(&self) -> Vec<String> {
        let names = |dir: &Path| fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let known = |name: &String| ![".vhd", "log"].iter().any(|end| name.ends_with(end)) && name != "file";
        names(self.runtime.path()).chain(names(self.dir.path()).filter(known).collect::<Vec<_>>()).collect()
    }
}

fn stderr_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stop(mut child: Child, signal: Signal) -> Option<i32> {
    kill_process(Pid::from_child(&child), signal).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the daemon did not end on {signal:?}");
        }
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_start_that_fails_leaves_no_files() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    fs::write(fixture.path("file"), "precious").unwrap();
    let second = "--disk path=a.vhd,socket=a.sock";
    // The shell commands before the daemon, its arguments, and a part of its error message.
    let cases = [
        ("", "--blk-file=a.vhd --socket-path=none/a.sock".to_owned(), "none/a.sock"),
        ("", "--blk-file=a.vhd --socket-path=file".into(), "not a socket"),
        ("", format!("{second} --disk path=none.vhd,socket=b.sock"), "none.vhd"),
        ("", "--blk-file=a.vhd --socket-path=a.sock --socket-group=no-such-group".into(), "no-such-group"),
        ("ulimit -n 64;", "--blk-file=a.vhd --socket-path=a.sock --num-queues=16".into(), "file descriptors"),
    ];
    for (before, args, why) in cases {
        let status = fixture.daemon(before, &args).status().unwrap();
        assert_eq!(status.code(), Some(1), "{args}: {}", fixture.log_text());
        assert!(fixture.log_text().lines().last().unwrap().contains(why), "{args}: {}", fixture.log_text());
        assert_eq!(fixture.leftover_files(), [""; 0], "{args}");
        let check = fixture.tool(&["check", "a.vhd"]);
        assert_eq!(check.status.code(), Some(0), "after {args}: {}", stderr_text(&check));
    }
    assert_eq!(fs::read(fixture.path("file")).unwrap(), b"precious");
}

#[test]
fn a_start_that_is_interrupted_while_it_waits_leaves_no_files() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    fixture.image("b.vhd");
    let mut holder = fixture.daemon("", "--blk-file=b.vhd --socket-path=b.sock").spawn().unwrap();
    fixture.wait_for(&mut holder, "disk b.vhd: ");
    let before = fixture.leftover_files();
    let args = "--disk path=a.vhd,socket=a.sock --disk path=b.vhd,socket=c.sock";
    let mut waits = fixture.daemon("", args).spawn().unwrap();
    fixture.wait_for(&mut waits, "waiting up to");
    assert!(fixture.leftover_files().len() > before.len(), "the first disk has no files yet");
    assert_eq!(stop(waits, Signal::TERM), Some(0), "{}", fixture.log_text());
    assert_eq!(fixture.leftover_files(), before);
    assert_eq!(stop(holder, Signal::TERM), Some(0));
    assert_eq!(fixture.leftover_files(), [""; 0]);
}

/// Writes that a killed daemon acknowledged survive a failed start.
#[test]
fn the_journal_of_a_killed_daemon_outlives_a_failed_start() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    let mut daemon = fixture.daemon("", "--blk-file=a.vhd --socket-path=a.sock").spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk a.vhd: ");
    let mut guest = Guest::connect(&fixture.path("a.sock"), 1, 64);
    assert_eq!(guest.write(0, 4096, &[7; 4096]), 0);
    stop(daemon, Signal::KILL);
    drop(guest);
    let journals = || fixture.runtime.journals().len();
    assert_eq!(journals(), 1);
    let status = fixture.daemon("", "--blk-file=a.vhd --socket-path=none/a.sock").status().unwrap();
    assert_eq!((status.code(), journals()), (Some(1), 1), "{}", fixture.log_text());
    let mut daemon = fixture.daemon("", "--blk-file=a.vhd --socket-path=b.sock").spawn().unwrap();
    fixture.wait_for(&mut daemon, "on b.sock");
    let mut guest = Guest::connect(&fixture.path("b.sock"), 1, 64);
    assert_eq!(guest.read(0, 4096, 4096).unwrap(), [7; 4096]);
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
}

#[test]
fn sighup_shuts_the_daemon_down_cleanly() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    let mut daemon = fixture.daemon("", "--blk-file=a.vhd --socket-path=a.sock").spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk a.vhd: ");
    assert_eq!(stop(daemon, Signal::HUP), Some(0), "{}", fixture.log_text());
    assert!(fixture.log_text().contains("closed"));
    assert_eq!(fixture.leftover_files(), [""; 0]);
    // Under nohup the daemon ignores SIGHUP.
    let mut daemon = fixture.daemon("trap '' HUP;", "--blk-file=a.vhd --socket-path=b.sock").spawn().unwrap();
    fixture.wait_for(&mut daemon, "on b.sock");
    kill_process(Pid::from_child(&daemon), Signal::HUP).unwrap();
    let mut guest = Guest::connect(&fixture.path("b.sock"), 1, 64);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
}

/// Returns a listening socket that child processes inherit, and its descriptor number.
fn inheritable(path: &Path) -> (UnixListener, RawFd) {
    let listener = UnixListener::bind(path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let number = listener.as_raw_fd();
    (listener, number)
}

#[test]
fn the_names_of_inherited_sockets_select_their_disks() {
    let fixture = StartFixture::new();
    image::make_fixed(&fixture.path("a.vhd"), MIB);
    image::make_fixed(&fixture.path("b.vhd"), 2 * MIB);
    let ((first, x), (second, y)) = (inheritable(&fixture.path("x")), inheritable(&fixture.path("y")));
    let before = |names: &str| format!("exec 3<&{x} 4<&{y}; {names} LISTEN_FDS=2 LISTEN_PID=$$");
    let disks = "--disk path=a.vhd,id=a --disk path=b.vhd,id=b";
    // The sockets are passed in the reverse order of the disks.
    let mut daemon = fixture.daemon(&before("LISTEN_FDNAMES=b:a"), disks).spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk b: ");
    let sectors = |name: &str| Guest::connect(&fixture.path(name), 1, 64).config.capacity.to_native();
    assert_eq!((sectors("x"), sectors("y")), (2 * MIB / 512, MIB / 512));
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
    for (names, why) in [
        ("", "belongs to no disk"),
        ("LISTEN_FDNAMES=vm.socket:vm.socket", "belongs to no disk"),
        ("LISTEN_FDNAMES=a:c", "\"c\""),
        ("LISTEN_FDNAMES=a:a", "two sockets"),
        ("LISTEN_FDNAMES=a", "1 names for 2 sockets"),
    ] {
        let status = fixture.daemon(&before(names), disks).status().unwrap();
        let log = fixture.log_text();
        assert_eq!(status.code(), Some(1), "{names}: {log}");
        assert!(log.lines().last().unwrap().contains(why), "{names}: {log}");
    }
    // Sockets whose names are not the id of a disk are assigned by their paths.
    let by_path = format!(
        "--disk path=a.vhd,id=a,socket={} --disk path=b.vhd,id=b,socket={}",
        fixture.path("y").display(),
        fixture.path("x").display()
    );
    let mut daemon = fixture.daemon(&before("LISTEN_FDNAMES=vm.socket:vm.socket"), &by_path).spawn().unwrap();
    fixture.wait_for(&mut daemon, &format!("disk b: {} bytes on {}", 2 * MIB, fixture.path("x").display()));
    assert_eq!(sectors("x"), 2 * MIB / 512);
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
    drop((first, second));
}

#[test]
fn an_inherited_socket_without_a_name_serves_the_only_disk() {
    let fixture = StartFixture::new();
    image::make_fixed(&fixture.path("a.vhd"), MIB);
    let (listener, number) = inheritable(&fixture.path("x"));
    for names in ["", "LISTEN_FDNAMES=unknown", "LISTEN_FDNAMES=vm.socket"] {
        let before = format!("exec 3<&{number}; {names} LISTEN_FDS=1 LISTEN_PID=$$");
        let daemon = fixture.daemon(&before, "--blk-file=a.vhd").spawn().unwrap();
        assert_eq!(Guest::connect(&fixture.path("x"), 1, 64).config.capacity.to_native(), MIB / 512);
        assert_eq!(stop(daemon, Signal::TERM), Some(0), "{}", fixture.log_text());
    }
    drop(listener);
}

#[test]
fn a_socket_gets_its_group_and_mode_from_the_options() {
    let fixture = StartFixture::new();
    image::make_fixed(&fixture.path("a.vhd"), MIB);
    image::make_fixed(&fixture.path("b.vhd"), MIB);
    let group = if rustix::process::geteuid().is_root() { 7 } else { rustix::process::getegid().as_raw() };
    let args = format!(
        "--socket-group={group} --disk path=a.vhd,socket=a.sock --disk path=b.vhd,socket=b.sock,socket-mode=0666"
    );
    // The mode does not depend on the umask.
    let mut daemon = fixture.daemon("umask 077;", &args).spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk b.vhd: ");
    let access = |name: &str| {
        let found = fs::metadata(fixture.path(name)).unwrap();
        (found.gid(), found.permissions().mode() & 0o777)
    };
    assert_eq!((access("a.sock"), access("b.sock")), ((group, 0o660), (group, 0o666)));
    let bound = fs::read_to_string("/proc/net/unix").unwrap();
    assert!(bound.lines().any(|line| line.ends_with(" a.sock")), "the kernel shows the final name");
    // A second daemon on the same path is refused and does not disturb the first.
    image::make_fixed(&fixture.path("c.vhd"), MIB);
    let status = fixture.daemon("", "--blk-file=c.vhd --socket-path=a.sock").status().unwrap();
    assert_eq!(status.code(), Some(1), "{}", fixture.log_text());
    UnixStream::connect(fixture.path("a.sock")).unwrap();
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
    assert_eq!(fixture.leftover_files(), [""; 0]);
    let usage = fixture.daemon("", "--blk-file=a.vhd --fd=3 --socket-mode=0660").status().unwrap();
    assert_eq!(usage.code(), Some(2), "a socket that was handed over has its mode");
}

#[test]
fn a_listener_with_a_full_backlog_does_not_delay_the_start() {
    let fixture = StartFixture::new();
    image::make_fixed(&fixture.path("a.vhd"), MIB);
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(fixture.path("a.sock")).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let _waits = UnixStream::connect(fixture.path("a.sock")).unwrap();
    let begun = Instant::now();
    let mut daemon = fixture.daemon("", "--blk-file=a.vhd --socket-path=a.sock").spawn().unwrap();
    while daemon.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(30) {
            daemon.kill().unwrap();
            panic!("the start hangs: {}", fixture.log_text());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(fixture.log_text().contains("listens on the socket"), "{}", fixture.log_text());
}

#[test]
fn an_image_that_is_unlinked_while_served_is_reported_once() {
    let fixture = StartFixture::new();
    for name in ["a.vhd", "b.vhd", "c.vhd", "new.vhd"] {
        image::make_fixed(&fixture.path(name), MIB);
    }
    let args = "--disk path=a.vhd,socket=a.sock --disk path=b.vhd,socket=b.sock --disk path=c.vhd,socket=c.sock";
    let mut daemon = fixture.daemon("", args).spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk c.vhd: ");
    // The first disk has a front-end, the others have none.
    let mut guest = Guest::connect(&fixture.path("a.sock"), 1, 64);
    fs::remove_file(fixture.path("a.vhd")).unwrap();
    fs::rename(fixture.path("b.vhd"), fixture.path("moved.vhd")).unwrap();
    fs::rename(fixture.path("new.vhd"), fixture.path("c.vhd")).unwrap();
    for warning in ["a.vhd: the file was removed", "b.vhd: the file was renamed", "c.vhd: another file"] {
        fixture.wait_for(&mut daemon, warning);
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), 0, "it is served on");
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(fixture.log_text().matches("while it is served").count(), 3, "{}", fixture.log_text());
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
}

#[test]
fn a_file_size_limit_fails_the_write() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    // `ulimit -f` counts units of 512 bytes. 20 MiB is less than one step of growth and more than a block of 2 MiB.
    let mut daemon =
        fixture.daemon("ulimit -f 40960;", "--blk-file=a.vhd --socket-path=a.sock --num-queues=1").spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk a.vhd: ");
    let mut guest = Guest::connect(&fixture.path("a.sock"), 1, 64);
    let outcomes: Vec<i32> = (0..32).map(|block| guest.write(0, block * 2 * MIB, &[1; 4096])).collect();
    let fitting = outcomes.iter().take_while(|outcome| **outcome == 0).count();
    assert!((6..10).contains(&fitting), "{outcomes:?}: {}", fixture.log_text());
    assert!(outcomes[fitting..].iter().all(|outcome| *outcome != 0), "{outcomes:?}");
    assert!(
        fixture.log_text().contains("ulimit -f") && !fixture.log_text().contains("host is full"),
        "{}",
        fixture.log_text()
    );
    assert_eq!(guest.write(0, 0, &[2; 4096]), 0, "what fits is written on");
    assert_eq!(guest.read(0, 0, 512).unwrap(), [2; 512]);
    drop(guest);
    assert_eq!(stop(daemon, Signal::TERM), Some(0), "{}", fixture.log_text());
    let check = fixture.tool(&["check", "a.vhd"]);
    assert_eq!(check.status.code(), Some(0), "{}", stderr_text(&check));
}

/// The tool reports a file size limit (`ulimit -f`) as an error: SIGXFSZ does not kill the tool, and no temporary file
/// is left.
#[test]
fn the_tool_reports_a_file_size_limit() {
    let fixture = StartFixture::new();
    fs::write(fixture.path("source"), vec![7; 8 << 20]).unwrap();
    for line in ["create a.vhd --type fixed --size 64M", "convert source a.vhd --from raw --to dynamic"] {
        let line = format!("ulimit -f 2048; exec {} {line}", cargo_bin!("diffdisk").display());
        let output = Command::new("sh").current_dir(&fixture.dir).args(["-c", &line]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}: {}", stderr_text(&output));
        assert!(stderr_text(&output).contains("File too large"), "{line}: {}", stderr_text(&output));
        assert_eq!(fixture.leftover_files(), ["source"], "{line}");
    }
}

/// The number of file descriptors that the daemon reserves at its start suffices for the load, and is not much larger
/// than needed.
#[test]
fn the_start_reserves_the_right_number_of_descriptors() {
    let fixture = StartFixture::new();
    fixture.image("a.vhd");
    let mut daemon = fixture.daemon("", "--blk-file=a.vhd --socket-path=a.sock --num-queues=32").spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk a.vhd: ");
    let mut guest = Guest::connect(&fixture.path("a.sock"), 32, 64);
    for queue in 0..32 {
        assert_eq!(guest.write(queue, 0, &[1; 512]), 0);
    }
    let used = fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count();
    let counted = usize::try_from(diffdisk::vhost::fds_of_disk(32, 1)).unwrap() + 32;
    assert!(used <= counted && counted < used * 2, "{used} are used, {counted} are asked for");
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
}

#[test]
fn the_log_lists_the_disks_and_their_settings() {
    let fixture = StartFixture::new();
    fixture.image("root.vhd");
    let made = fixture.tool(&["create", "a.vhd", "--parent", "root.vhd", "--quiet"]);
    assert!(made.status.success(), "{}", stderr_text(&made));
    let args = "--blk-file=a.vhd --socket-path=a.sock --io-engine=blocking --cache=writethrough";
    let mut daemon = fixture.daemon("", args).spawn().unwrap();
    fixture.wait_for(&mut daemon, "disk a.vhd: ");
    let (log, runtime) = (fixture.log_text(), fixture.runtime.path().display().to_string());
    let line = log.lines().find(|line| line.contains("disk a.vhd: ")).unwrap();
    let version = format!("diffdiskd {} (commit ", env!("CARGO_PKG_VERSION"));
    for part in
        ["a.vhd <- ", "root.vhd", "4 queues of 1024", &runtime, "engine blocking", "cache writethrough", &version]
    {
        assert!(line.contains(part), "{part:?} is not in {line}");
    }
    assert_eq!(stop(daemon, Signal::TERM), Some(0));
}
