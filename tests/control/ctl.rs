//! `diffdisk ctl`: verbs, output, exit codes, and how it finds the socket.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::daemon::Daemon;
use super::common::tool::{DIFFDISK, Finished, leave_socket, run, start, wait};
use super::{DISK, Served, create_chain, diffdisk};

/// Runs `diffdisk ctl`. Without `variable`, the environment names no socket.
pub(super) fn ctl(words: &[&str], variable: Option<&OsStr>) -> Finished {
    let mut command = Command::new(DIFFDISK);
    command.arg("ctl").args(words).env_remove("DIFFDISK_CONTROL");
    if let Some(path) = variable {
        command.env("DIFFDISK_CONTROL", path);
    }
    run(&mut command, Duration::from_secs(30))
}

/// Runs `diffdisk ctl` with the socket of a daemon. Returns what it prints.
#[track_caller]
pub(super) fn text_of(served: &Served, words: &[&str]) -> String {
    printed(ctl(words, Some(served.control.as_os_str())))
}

/// Removes the numbers that other programs change: what the file system has available.
fn without_available(mut result: Value) -> Value {
    for disk in result["disks"].as_array_mut().expect("disks") {
        disk["gauges"].as_object_mut().expect("gauges").remove("file_system_available_bytes").expect("a number");
    }
    result
}

fn lines_without_available(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.contains("file_system_available")).collect()
}

#[track_caller]
fn printed(finished: Finished) -> String {
    let finished = finished.ok();
    assert_eq!(finished.stderr, "");
    String::from_utf8(finished.stdout).expect("text")
}

/// Panics unless the verb failed with exit code 1 and one line.
#[track_caller]
pub(super) fn assert_fails(finished: &Finished, verb: &str, why: &str) {
    let message = &finished.stderr;
    assert_eq!((finished.code, finished.stdout.as_slice()), (Some(1), &b""[..]), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with(&format!("diffdisk: {verb}: ")) && message.contains(why), "{message}");
}

#[test]
fn every_verb_prints_for_people_and_as_json() {
    let served = Served::start(&[]);
    let socket = served.control.as_os_str();
    let mut rpc = served.connect();
    let text = |words: &[&str]| printed(ctl(words, Some(socket)));
    let json_of =
        |words: &[&str]| -> Value { serde_json::from_str(&text(&[words, &["--json"]].concat())).expect("JSON") };
    assert!(text(&["version"]).starts_with("diffdiskd ") && text(&["version"]).ends_with(", protocol 1\n"));
    assert_eq!(json_of(&["version"]), rpc.call("version", &json!({})));
    let table = text(&["disks"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("NAME ") && lines[1].starts_with(DISK), "{table}");
    assert!(lines[1].contains("8 MiB") && lines[1].contains("serving") && lines[1].contains("none"), "{table}");
    assert_eq!(json_of(&["disks"]), rpc.call("disks", &json!({})));
    assert!(text(&["disk", DISK]).contains("size:        8 MiB (8388608 bytes)\n"), "{}", text(&["disk", DISK]));
    assert_eq!(json_of(&["disk", DISK]), rpc.call("disk", &json!({"disk": DISK})));
    let statistics = without_available(rpc.call("stats", &json!({})));
    assert!(text(&["stats"]).contains("\ncommits  "), "{}", text(&["stats"]));
    assert_eq!(without_available(json_of(&["stats"])), statistics);
    let prometheus = rpc.call("stats", &json!({"format": "prometheus"}));
    assert_eq!(
        lines_without_available(&text(&["stats", DISK, "--format", "prometheus"])),
        lines_without_available(prometheus.as_str().expect("a text"))
    );
    let as_json: Value = serde_json::from_str(&text(&["stats", "--format", "json"])).expect("JSON");
    assert_eq!(without_available(as_json), statistics);
    assert_eq!(json_of(&["schema"]), rpc.call("schema", &json!({})));
    assert_fails(
        &ctl(&["disk", "x"], Some(socket)),
        "ctl disk",
        "no disk has the name \"x\": the disks are \"child.vhd\"",
    );
    assert_fails(&ctl(&["watch", "rain"], Some(socket)), "ctl watch", "rain");
    for wrong in [&["disk"][..], &["stats", "--format", "xml"], &["shutdown", "--timeout-s", "0"], &["dance"], &[]] {
        assert_eq!(ctl(wrong, Some(socket)).code, Some(2), "{wrong:?}");
    }
    served.stop();
}

#[test]
fn watch_prints_events_until_the_daemon_ends() {
    let served = Served::start(&[]);
    let control = format!("--control={}", served.control.display());
    let mut watchers: Vec<(Child, Receiver<String>)> = [&["front_end"][..], &["--json"]]
        .into_iter()
        .map(|more| {
            let mut command = Command::new(DIFFDISK);
            let child = start(command.args(["ctl", &control, "watch"]).args(more).stdout(Stdio::piped()));
            let mut child = child.expect("a program");
            let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
            let (sender, receiver) = channel();
            std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
            (child, receiver)
        })
        .collect();
    // Front-ends connect until both programs have printed an event.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut first: Vec<Option<String>> = vec![None, None];
    while first.contains(&None) {
        assert!(Instant::now() < deadline, "no events: {first:?}");
        drop(served.daemon.connect());
        for (line, (_, lines)) in first.iter_mut().zip(&watchers) {
            *line = line.take().or_else(|| lines.recv_timeout(Duration::from_millis(100)).ok());
        }
    }
    let line = first[0].as_ref().expect("an event");
    assert!(line.starts_with("20") && line.contains(&format!("Z front_end {DISK} connected=")), "{line}");
    let event: Value = serde_json::from_str(first[1].as_ref().expect("an event")).expect("JSON");
    assert_eq!((&event["kind"], &event["disk"]), (&json!("front_end"), &json!(DISK)));
    printed(ctl(&[&control, "shutdown"], None));
    for (child, _) in &mut watchers {
        assert_eq!(wait(child, Instant::now() + Duration::from_secs(30)), (Some(0), false));
    }
}

#[test]
fn the_end_of_a_daemon_that_did_not_close_its_disks_is_an_error() {
    let served = Served::start(&[]);
    let control = format!("--control={}", served.control.display());
    let mut watcher = start(Command::new(DIFFDISK).args(["ctl", &control, "watch"]).stdout(Stdio::piped()));
    let watcher = watcher.as_mut().expect("a program");
    let lines = BufReader::new(watcher.stdout.take().expect("a pipe")).lines();
    // An event shows that the program watches. All are read: the program ends in silence if nobody reads its output.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut rpc = served.connect();
    let (sender, first) = channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
    while first.try_recv().is_err() {
        assert!(Instant::now() < deadline, "no events");
        drop(served.daemon.connect());
        std::thread::sleep(Duration::from_millis(50));
    }
    rpc.call("version", &json!({}));
    served.daemon.kill();
    assert_eq!(wait(watcher, deadline), (Some(1), false));
    // A daemon that accepts the request to end, and is killed then.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.control");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let daemon = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        let mut request = String::new();
        BufReader::new(&stream).read_line(&mut request).expect("a request");
        let request: Value = serde_json::from_str(&request).expect("JSON");
        let answer = json!({"jsonrpc": "2.0", "id": request["id"], "result": null});
        std::io::Write::write_all(&mut &stream, format!("{answer}\n").as_bytes()).expect("an answer");
    });
    // The named folder is searched although it may not be on tmpfs.
    let words = ["shutdown".to_owned(), format!("--runtime-dir={}", folder.path().display())];
    let failed = ctl(&words.each_ref().map(String::as_str), None);
    assert_fails(&failed, "ctl shutdown", "the daemon ended without closing its disks");
    daemon.join().expect("the daemon");
    // Now nobody listens on the socket.
    assert_fails(&ctl(&["disks", &words[1]], None), "ctl disks", "no daemon listens there");
}

#[test]
fn shutdown_ends_the_daemon_and_waits_for_it() {
    let served = Served::start(&[]);
    let mut guest = served.daemon.connect();
    guest.write(0, &[9; 4096]).expect("a write");
    assert_eq!(
        printed(ctl(&["shutdown", "--timeout-s", "30"], Some(served.control.as_os_str()))),
        "the daemon has ended, and all disks are closed\n"
    );
    assert!(!served.control.exists(), "it has ended when the verb returns");
    let log = served.daemon.log();
    assert!(log.contains("requests shutdown") && log.contains("closed"), "{log}");
    assert!(served.daemon.wait_for_exit().success());
    // The image was closed: it needs no live journal.
    let image = served.folder.path().join(DISK);
    let image = image.to_str().expect("a plain path");
    assert_eq!(diffdisk(["info", image, "--json"]).json()["session"], Value::Null);
    let disk = diffdisk(["convert", image, "-", "--to", "raw", "--allow-parents", "/"]).ok().stdout;
    assert_eq!(disk[..4096], [9; 4096]);
}

#[test]
fn the_socket_is_found_in_the_runtime_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let option = format!("--runtime-dir={}", runtime.path().display());
    let version = |variable: Option<&OsStr>| ctl(&["version", &option], variable);
    assert_fails(&version(None), "ctl version", "no daemon has a control socket");
    // Neither the socket of a killed daemon nor other files count.
    leave_socket(&runtime.path().join("old.control"));
    fs::write(runtime.path().join("file.control"), "").expect("a file");
    let daemon = |name: &str| {
        let place = folder.path().join(name);
        fs::create_dir(&place).expect("a folder");
        let control = runtime.path().join(format!("{name}.control"));
        let daemon = Daemon::start(&create_chain(&place), &[&format!("--control={}", control.display()), &option]);
        daemon.wait_for_log("control socket on", 1);
        (daemon, control)
    };
    let (first, path) = daemon("first");
    printed(version(None));
    let (second, _) = daemon("second");
    let several = version(None);
    assert_fails(&several, "ctl version", "several daemons have a control socket");
    assert!(
        several.stderr.contains("first.control") && several.stderr.contains("second.control"),
        "{}",
        several.stderr
    );
    printed(version(Some(path.as_os_str())));
    // The option has priority over the variable.
    let control = format!("--control={}", path.display());
    printed(ctl(&["version", &control], Some(OsStr::new("/nonexistent"))));
    assert_fails(&version(Some(OsStr::new("/nonexistent"))), "ctl version", "/nonexistent: cannot connect");
    first.stop();
    printed(version(None));
    second.stop();
}
