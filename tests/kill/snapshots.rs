//! A guest does not notice that the daemon of its disk is killed at every step of a snapshot. The kept images do not
//! change.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::common::chain::Chain;
use crate::common::daemon::Daemon;
use crate::common::digest::sha256_of_file;
use crate::common::failpoints;
use crate::common::frontend::{ConnectOptions, Machine, RestoredBase};
use crate::common::rng::Rng;
use crate::common::temp::RuntimeDir;
use crate::common::tool::diffdisk;
use crate::{Connection, MIB, QUEUES, SIZE, load};

/// Number of snapshots during which the daemon is not killed.
const WHOLE: u64 = 8;

/// The daemon, its guest, and the images that snapshots have kept.
struct Run<'a> {
    daemon: &'a mut Daemon,
    machine: &'a mut Machine,
    connection: Option<Connection>,
    control: PathBuf,
    image: &'a Path,
    /// The digest of each kept image when it was first seen.
    kept: BTreeMap<PathBuf, String>,
    number: u64,
}

impl Run<'_> {
    fn connect(&mut self) {
        let options = &mut ConnectOptions { base: RestoredBase::Used, wait_for_ack: true, before_message: &mut || () };
        let stream = self.machine.connect(&self.daemon.socket(), options);
        let stream = stream.unwrap_or_else(|e| panic!("the front-end cannot connect: {e}; {}", self.daemon.log()));
        self.connection = Some(Connection(stream));
    }

    fn start(&mut self, killed_at: Option<&str>) {
        match killed_at {
            Some(point) => self.daemon.restart_killed_at(point),
            None => self.daemon.restart(),
        }
        self.daemon.wait_until_listening();
        self.connect();
    }

    fn kill(&mut self) {
        self.daemon.kill_running();
        self.connection = None;
    }

    /// Requests a snapshot. Returns the path of the kept image, and the answer; `None` if the daemon ended first.
    fn snapshot(&mut self) -> (PathBuf, Option<String>) {
        self.number += 1;
        let kept = self.image.with_file_name(format!("kept{}.vhd", self.number));
        let disk = self.image.file_name().expect("a name").to_str().expect("plain");
        let request = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": "snapshot",
            "params": {"disks": [{"disk": disk, "keep_as": kept}]}});
        let mut answer = String::new();
        let call = UnixStream::connect(&self.control).and_then(|mut stream| {
            writeln!(stream, "{request}")?;
            BufReader::new(stream).read_line(&mut answer)
        });
        (kept, call.is_ok_and(|read| read > 0).then_some(answer))
    }

    /// Records the digest of a new kept image, if it exists, and checks that the folder has no other file of a
    /// snapshot.
    fn record_kept(&mut self, new: &Path) {
        if new.exists() {
            self.kept.entry(new.to_owned()).or_insert_with(|| sha256_of_file(new));
        }
        let folder = self.image.parent().expect("a folder");
        let names = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with('.')).collect();
        assert!(left.is_empty(), "left over: {left:?}");
    }
}

/// Takes snapshots of `image` while a guest works. Kills the daemon at every failpoint of a snapshot.
fn run(what: &str, image: &Path, rng: &mut Rng) {
    let runtime = RuntimeDir::new();
    let control = image.with_file_name("control");
    let option = format!("--control={}", control.display());
    let mut daemon = Daemon::start(image, &["--num-queues=3", "--log-level=info", runtime.option(), &option]);
    let mut machine = Machine::new(QUEUES, true);
    let points = failpoints::of("snapshot");
    let mut killed = 0;
    let (kept, requests) = load::under_load(&mut machine, rng, |machine, rng| {
        let mut run =
            Run { daemon: &mut daemon, machine, connection: None, control, image, kept: BTreeMap::new(), number: 0 };
        run.connect();
        for _ in 0..WHOLE {
            sleep(Duration::from_millis(rng.below(200)));
            let (path, answer) = run.snapshot();
            let answer = answer.expect("an answer");
            assert!(answer.contains("pause_us"), "{answer}");
            run.record_kept(&path);
        }
        for point in &points {
            run.kill();
            run.start(Some(point));
            sleep(Duration::from_millis(100 + rng.below(200)));
            let (path, answer) = run.snapshot();
            if let Some(answer) = answer {
                assert!(answer.contains("pause_us"), "{answer}");
                println!("{what}: {point} is not reached by a snapshot");
                continue;
            }
            run.daemon.wait_until_killed();
            killed += 1;
            run.connection = None;
            // The next daemon is killed once more, while it resolves the snapshot.
            for again in &points {
                run.daemon.restart_killed_at(again);
                sleep(Duration::from_millis(20));
                if run.daemon.has_ended() {
                    run.daemon.wait_until_killed();
                } else {
                    break;
                }
            }
            run.daemon.kill_if_running();
            run.start(None);
            let exists = path.exists();
            println!("{what}: killed at {point}: {}", if exists { "kept" } else { "undone" });
            match point.as_str() {
                "snapshot.a-note-written" | "snapshot.child-created" | "snapshot.switch-prepared" => assert!(!exists),
                "snapshot.switched"
                | "snapshot.children-in-use"
                | "snapshot.old-committed"
                | "snapshot.flushes-released" => {
                    assert!(exists, "an acknowledged write may be in the new child only");
                }
                _ => {}
            }
            run.record_kept(&path);
        }
        sleep(Duration::from_millis(300));
        // The connection stays open: the drivers still read the whole disk.
        std::mem::forget(run.connection.take());
        run.kept
    });
    println!("{what}: {} kept images, {requests} requests", kept.len());
    assert!(killed >= 15, "the daemon was killed only {killed} times");
    assert!(requests > 1000 && kept.len() as u64 >= WHOLE);
    daemon.stop();
    diffdisk(["check".as_ref(), image.as_os_str(), "--chain".as_ref()]).ok();
    for (path, digest) in kept {
        assert_eq!(digest, sha256_of_file(&path), "{} has changed", path.display());
        diffdisk(["check".as_ref(), path.as_os_str(), "--chain".as_ref()]).ok();
    }
}

#[test]
fn a_guest_does_not_notice_kills_in_snapshots() {
    let mut rng = Rng::from_env("kill-snapshots");
    let folder = crate::scratch("kill-snapshots");
    run("dynamic", &crate::created(folder.path(), "dynamic"), &mut rng);
    let mut chain = Chain::with_root(SIZE / MIB, rng.next());
    chain.push_child("child.vhd");
    run("child", chain.top(), &mut rng);
}
