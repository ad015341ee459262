//! Events, as clients receive them.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::client::Client;
use super::common::temp::RuntimeDir;
use super::common::tool::{DIFFDISK, DIFFDISKD, start, wait};
use super::rpc::Rpc;
use super::schema::check;
use super::{DISK, Served};

#[test]
fn a_front_end_that_connects_and_disconnects_is_two_events() {
    let served = Served::start(&[]);
    let (mut all, mut others, mut silent) = (served.connect(), served.connect(), served.connect());
    let schema = all.call("schema", &json!({}));
    assert_eq!(all.call("watch", &json!({}))["seq"], 0);
    others.call("watch", &json!({"events": ["poisoned", "disk_full"]}));
    for round in 0..2 {
        let guest = served.daemon.connect();
        let event = all.event();
        check(&schema["events"]["front_end"], &event).unwrap_or_else(|e| panic!("{e}"));
        let expected = json!({"connected": true, "pid": std::process::id(), "disk": DISK, "seq": 2 * round + 1});
        for (name, value) in expected.as_object().expect("members") {
            assert_eq!(event[name], *value, "{name}");
        }
        let disk = all.call("disk", &json!({"disk": DISK}));
        assert_eq!(disk["front_end"]["pid"], std::process::id());
        assert_eq!(disk["cache"], "writeback");
        drop(guest);
        let event = all.event();
        assert_eq!((&event["connected"], &event["seq"]), (&json!(false), &json!(2 * round + 2)));
    }
    // Another subscription replaces the first one. Neither of the other clients received an event.
    all.call("watch", &json!({"events": []}));
    drop(served.daemon.connect());
    served.daemon.wait_for_log("front-end disconnected", 3);
    for rpc in [&mut all, &mut others, &mut silent] {
        rpc.call("version", &json!({}));
        rpc.stream.get_ref().set_read_timeout(Some(Duration::from_millis(200))).expect("a time limit");
        let mut line = String::new();
        let nothing = std::io::BufRead::read_line(&mut rpc.stream, &mut line);
        assert!(nothing.is_err() && line.is_empty(), "{line}");
    }
    served.stop();
}

#[test]
fn a_client_that_never_reads_loses_the_oldest_of_10000_events() {
    let served = Served::start(&[]);
    served.daemon_events(10_000);
}

impl Served {
    /// Raises at least `count` events while one client does not read and another client does. The first client then
    /// gets the events, or notices of the number of lost ones.
    fn daemon_events(self, count: u64) {
        let (mut slow, mut quick) = (self.connect(), self.connect());
        slow.call("watch", &json!({}));
        quick.call("watch", &json!({"events": ["front_end"]}));
        let mut seen = 0;
        while seen < count {
            // Each pair of events is awaited, so the quick client loses none.
            drop(UnixStream::connect(self.daemon.socket()).expect("the daemon listens"));
            for connected in [true, false] {
                let event = quick.event();
                seen += 1;
                assert_eq!((&event["seq"], &event["connected"]), (&json!(seen), &json!(connected)), "{event}");
            }
        }
        let (mut received, mut lost, mut last) = (0, 0, 0);
        while last < seen {
            let event = slow.event();
            let seq = event["seq"].as_u64().expect("a number");
            assert!(seq > last, "{event} after {last}");
            match event["lost"].as_u64() {
                Some(count) => lost += count,
                None => received += 1,
            }
            last = seq;
            assert_eq!(received + lost, last, "no event is missing without a notice: {event}");
        }
        assert!(lost > 1000 && received > 1000, "{lost} lost, {received} received");
        self.stop();
    }
}

/// A full file system: a small tmpfs in a mount namespace of the daemon, which needs root.
#[test]
fn a_full_host_and_new_room_are_events() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let (folder, runtime) = (tempfile::tempdir().expect("a folder"), RuntimeDir::new());
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("images")).expect("a folder");
    let script = format!(
        "set -eu; mount -t tmpfs -o size=8m small images; head -c 5M /dev/zero > images/filler; \
         {DIFFDISK} create images/a.vhd --size 64M --quiet; \
         exec {DIFFDISKD} --blk-file=images/a.vhd --socket-path=s --control=c {}",
        runtime.option()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(folder.path()).stdin(Stdio::null());
    let mut daemon = start(command.stderr(fs::File::create(path("log")).expect("a log"))).expect("unshare");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fs::read_to_string(path("log")).expect("the log").contains("control socket on") {
        assert!(Instant::now() < deadline, "{}", fs::read_to_string(path("log")).expect("the log"));
        sleep(Duration::from_millis(10));
    }
    let mut rpc = Rpc::connect(&path("c"));
    let schema = rpc.call("schema", &json!({}));
    rpc.call("watch", &json!({"events": ["disk_full", "room_again"]}));
    let mut guest = Client::connect(&path("s")).expect("a guest");
    let data = vec![0x5A; 1 << 20];
    let writes: Vec<u64> = (0..6)
        .map(|n| guest.submit(0, super::common::client::Command::Write { offset: n << 21, data: &data }).expect("room"))
        .collect();
    let full = rpc.event();
    check(&schema["events"]["disk_full"], &full).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(
        (&full["kind"], &full["disk"], &full["path"]),
        (&json!("disk_full"), &json!("a.vhd"), &json!("images/a.vhd"))
    );
    assert_eq!(rpc.call("disk", &json!({"disk": "a.vhd"}))["state"], "full");
    // The mount namespace of the daemon is reachable through its process id.
    let filler = Path::new("/proc")
        .join(daemon.id().to_string())
        .join("root")
        .join(path("images/filler").strip_prefix("/").expect("an absolute path"));
    fs::remove_file(filler).expect("the filler");
    let again = rpc.event();
    check(&schema["events"]["room_again"], &again).unwrap_or_else(|e| panic!("{e}"));
    for _ in writes {
        guest.wait().expect("an answer").result.expect("a write");
    }
    assert_eq!(rpc.call("disk", &json!({"disk": "a.vhd"}))["state"], Value::from("serving"));
    drop(guest);
    rpc.call("shutdown", &json!({}));
    assert_eq!(wait(&mut daemon, Instant::now() + Duration::from_secs(30)), (Some(0), false));
}
