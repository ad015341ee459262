//! System calls per read, write and flush, counted with strace on the daemon while a guest works.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::client::{self, Client, Options};
use common::daemon::Daemon;
use common::tool;

const READS: usize = 10_000;
const DEPTH: usize = 32;

/// Queued 4 KiB reads from a child over a root, after each page of the disk was read twice: fewer than one system call
/// for four reads. A read is copied from the page cache or shares a submission, and one interrupt reports many
/// completions.
#[test]
fn queued_reads_share_their_system_calls() {
    tool::require(&["strace"]);
    let mut chain = Chain::with_root(16, 5);
    chain.push_child("child.vhd");
    let daemon = Daemon::start(chain.top(), &["--num-queues=1"]);
    let options = Options { queues: 1, depth: DEPTH, ..Options::default() };
    let mut guest = Client::connect_with(&daemon.socket(), &options).expect("a connection");
    read_many(&mut guest, 2 * 4096);

    let report = traced(&daemon, &["-c", "-S", "calls", "-U", "calls,name"], || read_many(&mut guest, READS));
    drop(guest);
    daemon.stop();
    println!("{READS} reads of 4 KiB, {DEPTH} at once:\n{report}");
    let total = report.lines().rev().find_map(|line| line.strip_suffix(" total")?.trim().parse::<usize>().ok());
    let total = total.expect("strace counts");
    assert!(total > 0 && total < READS / 4, "{total} system calls for {READS} reads");
}

/// Reads 4 KiB `count` times from scattered offsets, with `DEPTH` reads in flight. If `count` is a multiple of the
/// number of pages of the disk, each page is read equally often.
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

/// A flush needs no, one or two syncs (crash-safety 5), for any number of writes before it. A guest's write causes
/// exactly one write of the daemon, unless the file grows or the session stamp is written. The daemon uses plain system
/// calls here, so that strace records each operation.
#[test]
fn a_flush_costs_none_one_or_two_syncs() {
    tool::require(&["strace"]);
    let mut chain = Chain::with_root(64, 6);
    chain.push_child("child.vhd");
    let child = chain.top().to_owned();
    let root = child.with_file_name("empty.vhd");
    let root_text = root.to_str().expect("a plain path");
    tool::diffdisk(["create", root_text, "--size", "64M"]).ok();
    // New sectors of a child need two syncs. New blocks of a root need one sync, and so do overwritten sectors of both.
    for (image, fresh) in [(&child, 2), (&root, 1)] {
        let daemon = Daemon::start(image, &["--num-queues=1", "--io-engine=blocking"]);
        let mut guest = daemon.connect();
        guest.flush().expect("the first flush, which covers what went before");
        for count in [1, 5, 50] {
            // The background commit, once in five seconds, may run between a write and its flush. The test then tries
            // again.
            let seen = (0..4).map(|attempt| syncs(&daemon, &mut guest, count, attempt));
            let mut seen = seen.inspect(|(new, again, clean)| {
                println!("{count} writes: {new} syncs when new, {again} when written again, {clean} when nothing was");
            });
            assert!(seen.any(|counts| counts == (fresh, 1, 0)), "{} with {count} writes", image.display());
        }
        drop(guest);
        daemon.stop();
    }
}

/// Returns the number of syncs in each of three flushes: after `count` writes of new sectors, after the same writes
/// again, and after no write.
fn syncs(daemon: &Daemon, guest: &mut Client, count: u64, attempt: u64) -> (usize, usize, usize) {
    // Fifty writes go to ten blocks. Each attempt uses other sectors.
    let (first, blocks) = if count == 50 { (40 << 20, 10) } else { (count * (2 << 20), 1) };
    let write = |guest: &mut Client, page: u64| {
        let at = first + page % blocks * (2 << 20) + (attempt * 50 + page) * 4096;
        guest.write(at, &[7; 4096]).expect("a write");
    };
    let ask = ["-e", "trace=fdatasync,pwritev,pwrite64,pwritev2,fallocate"];
    let calls = |report: &str, name: &str| report.lines().filter(|l| l.contains(name)).count();
    let writes = traced(daemon, &ask, || (0..count).for_each(|page| write(guest, page)));
    let alone = calls(&writes, "fallocate") == 0 && calls(&writes, "fdatasync") == 0;
    // A guest's write may come with a write of a new generation to the session stamp.
    let own = writes.lines().filter(|l| l.contains("pwrite") && !l.contains("ddstamp")).count() as u64;
    assert!(!alone || own == count, "a write that is answered is one write:\n{writes}");
    let new = calls(&traced(daemon, &ask, || guest.flush().expect("a flush")), "fdatasync");
    (0..count).for_each(|page| write(guest, page));
    let again = calls(&traced(daemon, &ask, || guest.flush().expect("a flush")), "fdatasync");
    let clean = calls(&traced(daemon, &ask, || guest.flush().expect("a flush")), "fdatasync");
    (new, again, clean)
}

/// Traces the daemon while `done` runs. Returns strace's output.
fn traced(daemon: &Daemon, options: &[&str], done: impl FnOnce()) -> String {
    let report = tempfile::NamedTempFile::new().expect("a file");
    let mut strace = Command::new("strace")
        .arg("-f")
        .args(options)
        .args(["-p", &daemon.pid().to_string(), "-o"])
        .arg(report.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("strace starts");
    let attached = format!("TracerPid:\t{}", strace.id());
    let deadline = Instant::now() + Duration::from_secs(10);
    // All threads are traced: the main thread does not serve the queue.
    let tasks = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("the daemon is there");
        tasks.map(|task| std::fs::read_to_string(task.expect("a thread").path().join("status")).expect("a thread"))
    };
    while !tasks().all(|status| status.contains(&attached)) {
        assert!(Instant::now() < deadline, "strace does not attach");
        std::thread::sleep(Duration::from_millis(5));
    }
    done();
    let pid = rustix::process::Pid::from_child(&strace);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("strace can be signalled");
    strace.wait().expect("strace ends");
    std::fs::read_to_string(report.path()).expect("strace's report")
}
