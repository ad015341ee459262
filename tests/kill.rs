//! R5: a guest does not notice that its disk daemon is killed and restarted many times.
//!
//! Several queues write, overwrite, zero, flush and read, and compare every byte read with the acknowledged writes.
//! Meanwhile the daemon gets SIGKILL about every 200 ms: under load, at its start, and during the handshake.
//! DIFFDISK_KILL_SECONDS sets the duration of the runs on all four images together, in seconds (60 by default).
#![allow(clippy::host_endian_bytes, clippy::cast_possible_truncation, reason = "a test's pattern and small numbers")]

mod common;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::chain::Chain;
use common::daemon::Daemon;
use common::frontend::{ConnectOptions, DEPTH, Driver, Machine, RequestKind, RestoredBase};
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

/// The expected contents of one queue's part of the disk.
struct Model {
    queue: u64,
    /// The contents of each stripe before the run, by the number of the stripe.
    initial: HashMap<u64, Vec<u8>>,
    /// The number of the last acknowledged write of each sector, or 0 for zeros. A sector without an entry has its
    /// contents from before the run.
    written: HashMap<u64, u64>,
}

/// Fills `data` with the contents of the sectors from `first` on after write number `tag`, which is not 0.
fn fill(data: &mut [u8], tag: u64, first: u64) {
    for (sector, chunk) in (first..).zip(data.chunks_mut(512)) {
        let mut word = tag.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ sector.rotate_left(40);
        for eight in chunk.chunks_mut(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(tag | 1);
            eight.copy_from_slice(&word.to_ne_bytes());
        }
    }
}

impl Model {
    fn check(&self, data: &[u8], first: u64) {
        let mut want = [0; 512];
        for (sector, got) in (first..).zip(data.chunks(512)) {
            match self.written.get(&sector) {
                Some(0) => want.fill(0),
                Some(tag) => fill(&mut want, *tag, sector),
                None => {
                    let at = usize::try_from(sector % STRIPE * 512).expect("small");
                    want.copy_from_slice(&self.initial[&(sector / STRIPE)][at..at + 512]);
                }
            }
            let written = self.written.get(&sector);
            let is = match got {
                got if got.iter().all(|b| *b == 0) => "zeros".into(),
                got => format!("{:02x?}", &got[..16]),
            };
            assert!(*got == want, "MISCOMPARE: queue {}, sector {sector}, write {written:?}, is {is}", self.queue);
        }
    }
}

/// A request in flight.
#[derive(Clone, Copy)]
struct PendingRequest {
    kind: RequestKind,
    sector: u64,
    sectors: u32,
    tag: u64,
}

struct QueueLoad<'a> {
    driver: Driver,
    model: Model,
    in_flight: [Option<PendingRequest>; DEPTH],
    requests: &'a AtomicU64,
}

impl QueueLoad<'_> {
    /// Submits the requests that `next` returns, one in every free slot, until it returns `None`. Waits for all
    /// completions.
    fn run(&mut self, mut next: impl FnMut(&Model, &[Option<PendingRequest>]) -> Option<PendingRequest>) {
        let mut more = true;
        loop {
            let mut added = 0;
            while let (true, Some(slot)) = (more, self.in_flight.iter().position(Option::is_none)) {
                let Some(asked) = next(&self.model, &self.in_flight) else {
                    more = false;
                    break;
                };
                if asked.kind == RequestKind::Write {
                    fill(&mut self.driver.data(slot)[..asked.sectors as usize * 512], asked.tag, asked.sector);
                }
                self.driver.add(slot, asked.kind, asked.sector, asked.sectors);
                self.in_flight[slot] = Some(asked);
                added += 1;
                // Some kicks come before all free slots are used.
                if asked.tag.is_multiple_of(3) {
                    self.driver.kick(added);
                    added = 0;
                }
            }
            self.driver.kick(added);
            if self.in_flight.iter().all(Option::is_none) {
                return;
            }
            for (slot, status) in self.driver.wait() {
                let asked = self.in_flight[slot].take().unwrap_or_else(|| panic!("slot {slot} is answered twice"));
                let PendingRequest { kind, sector, sectors, tag } = asked;
                assert_eq!(status, 0, "GUEST ERROR: {kind:?} of {sectors} sectors at {sector}");
                self.requests.fetch_add(1, Ordering::Relaxed);
                let sectors_of = || sector..sector + u64::from(sectors);
                match kind {
                    RequestKind::Write => self.model.written.extend(sectors_of().map(|s| (s, tag))),
                    RequestKind::WriteZeroes => self.model.written.extend(sectors_of().map(|s| (s, 0))),
                    RequestKind::Flush => {}
                    RequestKind::Read => {
                        let len = sectors as usize * 512;
                        let stripe = sector / STRIPE;
                        if !self.model.initial.contains_key(&stripe) {
                            assert_eq!(u64::from(sectors), STRIPE);
                            self.model.initial.insert(stripe, self.driver.data(slot)[..len].to_vec());
                        }
                        self.model.check(&self.driver.data(slot)[..len], sector);
                    }
                }
            }
        }
    }

    /// Reads the queue's whole part of the disk. The first read sets the expected contents.
    fn read_all(&mut self) {
        let mut stripe = self.model.queue;
        self.run(|_, _| {
            let asked =
                PendingRequest { kind: RequestKind::Read, sector: stripe * STRIPE, sectors: STRIPE as u32, tag: 0 };
            stripe += QUEUES as u64;
            (asked.sector < STRIPES * STRIPE).then_some(asked)
        });
    }

    /// Submits random requests until `stop` is set, and compares all data that is read with the model.
    fn work(&mut self, stop: &AtomicBool, mut rng: Rng) {
        let (queue, mut tag) = (self.model.queue, 0);
        let of_queue = STRIPES / QUEUES as u64;
        let mut grown = 0;
        self.run(|_, asked| {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            tag += 1;
            // One request per stripe at a time, because a read concurrent with a write may return either content.
            let busy = |stripe: u64| {
                asked.iter().flatten().any(|a| a.kind != RequestKind::Flush && a.sector / STRIPE == stripe)
            };
            let stripe = loop {
                // The range of the requests grows up to the whole disk, so that new blocks are allocated over many
                // kills.
                grown = (tag / 8).clamp(64, of_queue);
                let stripe = rng.below(grown) * QUEUES as u64 + queue;
                if !busy(stripe) {
                    break stripe;
                }
            };
            let sectors =
                [1, 1, 8, 8, 8, 16, 128, 1 + rng.below(STRIPE)][usize::try_from(rng.below(8)).expect("small")];
            let sector = stripe * STRIPE + rng.below(STRIPE - sectors + 1);
            let kind = match rng.below(20) {
                0..11 => RequestKind::Write,
                11 => RequestKind::WriteZeroes,
                12 => RequestKind::Flush,
                _ => RequestKind::Read,
            };
            Some(PendingRequest { kind, sector, sectors: u32::try_from(sectors).expect("small"), tag })
        });
        println!("queue {queue}: {tag} requests over {grown} stripes of {of_queue}");
    }
}

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
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let seeds: Vec<u64> = (0..QUEUES).map(|_| rng.next()).collect();
    thread::scope(|scope| {
        for (queue, seed) in seeds.into_iter().enumerate() {
            let driver = machine.driver(queue);
            let (stop, requests) = (&stop, &requests);
            scope.spawn(move || {
                let model = Model { queue: queue as u64, initial: HashMap::new(), written: HashMap::new() };
                let mut load = QueueLoad { driver, model, in_flight: [None; DEPTH], requests };
                // A thread that fails must stop the other threads, too.
                struct Stop<'a>(&'a AtomicBool);
                impl Drop for Stop<'_> {
                    fn drop(&mut self) {
                        self.0.store(true, Ordering::Relaxed);
                    }
                }
                let _stop = Stop(stop);
                load.read_all();
                load.work(stop, Rng::new(seed));
                load.read_all();
            });
        }
        let (mut tally, connection) = kill_repeatedly(&mut daemon, &mut machine, lasts, rng);
        stop.store(true, Ordering::Relaxed);
        let at = |reconnects: &mut Vec<Duration>, percent: usize| {
            reconnects.sort_unstable();
            reconnects.get((reconnects.len() * percent / 100).min(reconnects.len().saturating_sub(1))).copied()
        };
        println!(
            "{what}: {} kills ({} at the start, {} in the handshake), {} requests, reconnect p50 {:?} p99 {:?}",
            tally.kills,
            tally.starts_cut,
            tally.handshakes_cut,
            requests.load(Ordering::Relaxed),
            at(&mut tally.reconnects, 50).unwrap_or_default(),
            at(&mut tally.reconnects, 99).unwrap_or_default(),
        );
        // The connection stays open, because the drivers still read the whole disk.
        std::mem::forget(connection);
    });
    assert!(requests.load(Ordering::Relaxed) > 3 * STRIPES / 2);
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
