//! What reads cost in system calls: strace counts those of the daemon while a guest reads.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::client::{self, Client, Options};
use common::daemon::Daemon;
use common::tool;

const READS: usize = 10_000;
const DEPTH: usize = 32;

/// Queued 4 KiB reads of sectors that are known, in a child over a root: one submit carries many of them, and the guest
/// is told of many at once.
#[test]
fn queued_reads_share_their_system_calls() {
    tool::require(&["strace"]);
    let mut chain = Chain::with_root(16, 5);
    chain.push_child("child.vhd");
    let daemon = Daemon::start(chain.top(), &["--num-queues=1"]);
    let options = Options { queues: 1, depth: DEPTH, ..Options::default() };
    let mut guest = Client::connect_with(&daemon.socket(), &options).expect("a connection");
    read_many(&mut guest, 2 * 4096);

    let report = tempfile::NamedTempFile::new().expect("a file");
    let mut strace = Command::new("strace")
        .args(["-f", "-c", "-S", "calls", "-U", "calls,name", "-p", &daemon.pid().to_string(), "-o"])
        .arg(report.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("strace starts");
    let attached = format!("TracerPid:\t{}", strace.id());
    let deadline = Instant::now() + Duration::from_secs(10);
    let status = || std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("the daemon is there");
    while !status().contains(&attached) {
        assert!(Instant::now() < deadline, "strace does not attach");
        std::thread::sleep(Duration::from_millis(5));
    }
    read_many(&mut guest, READS);
    let pid = rustix::process::Pid::from_child(&strace);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("strace can be signalled");
    strace.wait().expect("strace ends");
    drop(guest);
    daemon.stop();

    let report = std::fs::read_to_string(report.path()).expect("strace's report");
    println!("{READS} reads of 4 KiB, {DEPTH} at once:\n{report}");
    let total = report.lines().rev().find_map(|line| line.strip_suffix(" total")?.trim().parse::<usize>().ok());
    let total = total.expect("strace counts");
    assert!(total > 0 && total < READS / 4, "{total} system calls for {READS} reads");
}

/// Reads 4 KiB `count` times from all over the disk, always `DEPTH` under way.
fn read_many(guest: &mut Client, count: usize) {
    let pieces = usize::try_from(guest.capacity().expect("a size")).expect("a small disk") / 4096;
    let mut begun = 0;
    let mut done = 0;
    while done < count {
        while begun < count && guest.in_flight() < DEPTH {
            let offset = (begun * 7919 % pieces * 4096) as u64;
            guest.submit(0, client::Command::Read { offset, len: 4096 }).expect("a read");
            begun += 1;
        }
        guest.wait().expect("an answer").result.expect("the read succeeds");
        done += 1;
    }
}
