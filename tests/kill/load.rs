//! The load of a guest: several queues, each of which compares every byte that it reads with its acknowledged writes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::common::frontend::{DEPTH, Driver, Machine, RequestKind};
use crate::common::rng::Rng;
use crate::{QUEUES, STRIPE, STRIPES};

/// The expected contents of one queue's part of the disk.
struct Model {
    queue: u64,
    /// The contents of each stripe before the run, by the number of the stripe. The first read of a stripe adds them.
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
                // Some kicks are sent before all free slots are used.
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

/// Runs the load on all queues of a machine while `during` runs, and then reads the whole disk. Returns the result of
/// `during`, and the number of requests.
pub(crate) fn under_load<T>(
    machine: &mut Machine,
    rng: &mut Rng,
    during: impl FnOnce(&mut Machine, &mut Rng) -> T,
) -> (T, u64) {
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let seeds: Vec<u64> = (0..QUEUES).map(|_| rng.next()).collect();
    let result = thread::scope(|scope| {
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
        let result = during(machine, rng);
        stop.store(true, Ordering::Relaxed);
        result
    });
    (result, requests.load(Ordering::Relaxed))
}
