//! R5: a guest does not notice that its disk daemon is killed and restarted many times.
//!
//! Several queues write, overwrite, zero, flush and read, and compare every byte read with the acknowledged writes.
//! Meanwhile the daemon gets SIGKILL about every 200 ms: under load, at its start, and during the handshake.
//! DIFFDISK_KILL_SECONDS sets the duration of the runs on all four images together, in seconds (60 by default).
#![allow(clippy::host_endian_bytes, clippy::cast_possible_truncation, reason = "a test's pattern and small numbers")]

#[path = "../common/mod.rs"]
mod common;
mod load;
#[cfg(feature = "mutants")]
mod snapshots;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::daemon::Daemon;
use common::frontend::{ConnectOptions, Machine, RestoredBase};
use common::rng::Rng;
use common::temp::{RuntimeDir, scratch};
use common::tool::diffdisk;

const QUEUES: usize = 3;
const MIB: u64 = 1 << 20;
/// Size of a disk in bytes.
const SIZE: u64 = 128 * MIB;
/// Number of sectors in a stripe. Stripes belong to the queues in rotation, so that queues share blocks and bitmaps.
const STRIPE: u64 = 128;
const STRIPES: u64 = SIZE / 512 / STRIPE;

/// Statistics of the kills and restarts in one run.
#[derive(Default)]
struct KillStats {
    kills: u32,
    handshakes_cut: u32,
    starts_cut: u32,
    reconnects: Vec<Duration>,
}

/// Kills and restarts the daemon for the duration `lasts`. At the end a daemon serves the guest. Returns the statistics
/// and that daemon's connection.
fn kill_repeatedly(
    daemon: &mut Daemon,
    machine: &mut Machine,
    lasts: Duration,
    rng: &mut Rng,
) -> (KillStats, impl Drop + use<>) {
    let mut tally = KillStats::default();
    let begun = Instant::now();
    let mut killed_at = None;
    loop {
        let over = begun.elapsed() >= lasts;
        // Sometimes the next daemon is killed before it serves: at its start, or during the handshake.
        let fate = if over { 9 } else { rng.below(10) };
        if fate == 0 && killed_at.is_some() {
            thread::sleep(Duration::from_micros(rng.below(20_000)));
            daemon.kill_running();
            tally.starts_cut += 1;
            tally.kills += 1;
            killed_at = Some(Instant::now());
            daemon.restart();
            continue;
        }
        daemon.wait_until_listening();
        let mut left = if fate == 1 { rng.below(40) } else { u64::MAX };
        let mut cut = false;
        let outcome = machine.connect(
            &daemon.socket(),
            &mut ConnectOptions {
                base: rng.pick(&[RestoredBase::Used, RestoredBase::Avail]),
                wait_for_ack: rng.below(2) == 0,
                before_message: &mut || {
                    if left == 0 && !cut {
                        daemon.kill_running();
                        cut = true;
                    }
                    left = left.saturating_sub(1);
                },
            },
        );
        match outcome {
            _ if cut => tally.handshakes_cut += 1,
            Ok(stream) => {
                tally.reconnects.extend(killed_at.map(|at: Instant| at.elapsed()));
                if over {
                    return (tally, Connection(stream));
                }
                thread::sleep(Duration::from_millis(100 + rng.below(200)));
                daemon.kill_running();
                drop(stream);
            }
            Err(e) => panic!("the front-end cannot connect: {e}; {}", daemon.log()),
        }
        killed_at = Some(Instant::now());
        tally.kills += 1;
        daemon.restart();
    }
}

struct Connection(std::os::unix::net::UnixStream);

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// Runs the load on `image` while the daemon is killed repeatedly. Then checks that the image is valid and that another
/// daemon reads the expected contents.
fn run(what: &str, image: &Path, lasts: Duration, event_idx: bool, rng: &mut Rng) {
    // The journal lies on a tmpfs, as in /run.
    let runtime = RuntimeDir::new();
    let mut daemon = Daemon::start(image, &["--num-queues=3", "--log-level=info", runtime.option()]);
    let mut machine = Machine::new(QUEUES, event_idx);
    let ((mut tally, connection), requests) =
        load::under_load(&mut machine, rng, |machine, rng| kill_repeatedly(&mut daemon, machine, lasts, rng));
    let at = |reconnects: &mut Vec<Duration>, percent: usize| {
        reconnects.sort_unstable();
        reconnects.get((reconnects.len() * percent / 100).min(reconnects.len().saturating_sub(1))).copied()
    };
    println!(
        "{what}: {} kills ({} at the start, {} in the handshake), {} requests, reconnect p50 {:?} p99 {:?}",
        tally.kills,
        tally.starts_cut,
        tally.handshakes_cut,
        requests,
        at(&mut tally.reconnects, 50).unwrap_or_default(),
        at(&mut tally.reconnects, 99).unwrap_or_default(),
    );
    drop(connection);
    assert!(requests > 3 * STRIPES / 2);
    println!(
        "{what}: {} rings were resumed with requests in flight",
        daemon.log().matches("carried out again").count()
    );
    daemon.stop();
    diffdisk([OsStr::new("check"), image.as_os_str(), OsStr::new("--chain")]).ok();
}

fn seconds() -> Duration {
    let text = std::env::var("DIFFDISK_KILL_SECONDS").unwrap_or_else(|_| "60".into());
    Duration::from_secs(text.parse().expect("DIFFDISK_KILL_SECONDS is a number"))
}

fn created(folder: &Path, kind: &str) -> PathBuf {
    let image = folder.join(format!("{kind}.vhd"));
    let size = format!("{}M", SIZE / MIB);
    diffdisk([
        OsStr::new("create"),
        image.as_os_str(),
        OsStr::new("--size"),
        size.as_ref(),
        OsStr::new("--type"),
        kind.as_ref(),
    ])
    .ok();
    image
}

#[test]
fn a_guest_does_not_notice_kills() {
    let mut rng = Rng::from_env("kill");
    let folder = scratch("kill");
    let part = seconds() / 4;
    run("fixed", &created(folder.path(), "fixed"), part, true, &mut rng);
    run("dynamic", &created(folder.path(), "dynamic"), part, false, &mut rng);
    let mut chain = Chain::with_root(SIZE / MIB, rng.next());
    for (name, event_idx) in [("child", true), ("grandchild", false)] {
        chain.push_child(&format!("{name}.vhd"));
        run(name, chain.top(), part, event_idx, &mut rng);
    }
    chain.assert_sound();
}
