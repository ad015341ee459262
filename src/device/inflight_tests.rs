//! Tests of `inflight.rs`: of the record alone, and with a virtqueue that is killed after any store.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::parse::RequestRules;
use super::super::spec::{ID_LEN, kind};
use super::super::split_ring::SplitRing;
use super::super::store_counter::{Killed, kill_after, stores_left};
use super::super::testing::{DATA, NEXT as FOLLOWED, SEAM, STATUS, TABLE, TestDriver, WRITE};
use super::super::virtqueue::{MAX_BATCH, MAX_BATCH_BYTES, PopResult, Virtqueue};
use super::*;
use crate::disk::{Answer, Outcome, Request, Work};

const SERIAL: [u8; ID_LEN] = [b's'; ID_LEN];
const RULES: RequestRules<'static> = RequestRules { capacity: 1 << 20, read_only: false, features: 0, serial: &SERIAL };
const SIZE: u16 = 64;
/// Maximum number of chains that the driver has in flight. Each has three descriptors.
const CHAINS: u16 = 20;

fn region(entries: u16) -> Arc<InFlightRegion> {
    Arc::new(InFlightRegion::new(MmapRegion::new(InFlightRecord::len(entries)).unwrap(), None))
}

fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// A guest whose device is killed and restarted.
struct KillHarness {
    d: TestDriver,
    map: Arc<InFlightRegion>,
    device: Option<(Virtqueue, Vec<Request>)>,
    /// By chain: the number of its request while the request has no answer. Requests are numbered in the order in which
    /// they were added.
    asked: [Option<u32>; CHAINS as usize],
    asks: u32,
    answers: u32,
    lives: u32,
    kills: u32,
    /// The value for [`kill_after`] with which the device that follows a killed device runs.
    again: Option<u32>,
    /// Value of [`stores_left`] at the end of [`KillHarness::live`].
    stores_left: Option<u32>,
    seed: u64,
}

impl KillHarness {
    fn new(seed: u64) -> KillHarness {
        let (d, map) = (TestDriver::new(SIZE), region(SIZE));
        let asked = Default::default();
        KillHarness {
            d,
            map,
            device: None,
            asked,
            asks: 0,
            answers: 0,
            lives: 0,
            kills: 0,
            again: None,
            stores_left: None,
            seed,
        }
    }

    fn ask(&mut self) {
        let Some(slot) = (0..CHAINS).find(|s| self.asked[usize::from(*s)].is_none()) else { return };
        let first = 3 * slot;
        let at = STATUS + u64::from(slot);
        self.d.put(at, &[0xff]);
        let ask = |d: &TestDriver, kind, flag| {
            let header = d.header(slot, kind, 0);
            d.chain(TABLE, first, &[(header, 16, 0), (SEAM, 512, flag), (at, 1, WRITE)]);
        };
        match next(&mut self.seed) % 8 {
            0..3 => ask(&self.d, kind::IN, WRITE),
            3..6 => ask(&self.d, kind::OUT, 0),
            6 => ask(&self.d, kind::GET_ID, WRITE),
            // Two chains that are returned with length 0: a loop, and one without a status.
            _ if slot.is_multiple_of(2) => self.d.desc(TABLE, first, (DATA, 1, FOLLOWED, first)),
            _ => self.d.chain(TABLE, first, &[(DATA, 16, 0)]),
        }
        self.asked[usize::from(slot)] = Some(self.asks);
        self.asks += 1;
        self.d.add(first);
    }

    /// Runs `f` on the device, and creates the device first if there is none. The device may be killed meanwhile.
    fn run(&mut self, f: impl FnOnce(&mut Virtqueue, &mut Vec<Request>, &mut u64)) {
        let (d, map) = (&self.d, &self.map);
        let (device, seed) = (self.device.take(), &mut self.seed);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let (mut x, mut disk) = device.unwrap_or_else(|| {
                self.lives += 1;
                // QEMU sends the used index and cloud-hypervisor the avail index. The device uses neither.
                let base = u16::try_from(next(seed) & 0xffff).unwrap();
                let ring = SplitRing::new(&d.view(), d.layout(), SIZE, false, base).unwrap();
                (Virtqueue::new(d.view(), ring, Some(InFlightRecord::new(map.clone(), 0, SIZE))).unwrap(), Vec::new())
            });
            f(&mut x, &mut disk, seed);
            (x, disk)
        }));
        match outcome {
            Ok(device) => self.device = Some(device),
            Err(e) if e.is::<Killed>() => {
                self.kills += 1;
                kill_after(self.again.take());
            }
            Err(e) => std::panic::resume_unwind(e),
        }
        self.reap();
    }

    /// Pops chains. Checks that each started request has no answer yet, and that requests start in the order in which
    /// they were added.
    fn take(&mut self) {
        let asked = self.asked;
        self.run(|x, disk, _| {
            let mut last = disk.iter().filter_map(|r| asked[slot_of(r)]).max();
            let mut push = |r: Request| {
                let number = asked[slot_of(&r)];
                assert!(number.is_some(), "a request that was answered is started again");
                assert!(number > last, "request {number:?} is started after {last:?}");
                last = number;
                disk.push(r);
                100
            };
            let mut pause = PopResult::BatchFull;
            while pause == PopResult::BatchFull {
                pause = match x.chains_to_resubmit() {
                    0 => x.pop_chains(&RULES, 100, &mut push),
                    _ => x.pop_resubmitted(&RULES, 100, &mut push),
                };
            }
            assert_eq!(pause, PopResult::Empty);
        });
    }

    /// Answers some of the requests in any order, and publishes their chains.
    fn answer(&mut self, all: bool) {
        self.run(|x, disk, seed| {
            while !disk.is_empty() && (all || !next(seed).is_multiple_of(4)) {
                let at = usize::try_from(next(seed)).unwrap() % disk.len();
                let Request { tag, work } = disk.remove(at);
                let memory = match work {
                    Work::Read { into: s, .. } | Work::Write { from: s, .. } => Some(s),
                    _ => None,
                };
                x.complete(Answer { tag, outcome: Outcome::Done, memory });
            }
            x.publish();
        });
    }

    /// Reads the used elements, and checks that each chain is returned once, with its status.
    fn reap(&mut self) {
        for (head, written) in self.d.used() {
            let slot = usize::try_from(head / 3).unwrap();
            assert!(self.asked[slot].take().is_some(), "head {head} is given back twice");
            self.answers += 1;
            let status = self.d.get(STATUS + u64::from(head / 3), 1)[0];
            assert_eq!(status, if written == 0 { 0xff } else { 0 }, "head {head} with {written} bytes");
        }
    }

    /// Adds and answers requests for some rounds, and then continues until all requests are answered.
    fn live(&mut self) {
        for _ in 0..12 {
            (0..next(&mut self.seed) % 5).for_each(|_| self.ask());
            self.take();
            self.answer(false);
        }
        let mut turns = 0;
        while self.asked.iter().any(Option::is_some) {
            self.take();
            self.answer(true);
            turns += 1;
            assert!(turns < 20, "{:?} are never answered", self.asked);
        }
        assert_eq!(self.answers, self.asks);
        self.stores_left = stores_left();
        // The next device has nothing to resubmit.
        kill_after(None);
        self.device = None;
        self.take();
        assert_eq!(self.device.as_ref().map(|(x, disk)| (x.chains_to_resubmit(), disk.len())), Some((0, 0)));
    }
}

fn slot_of(request: &Request) -> usize {
    usize::try_from(request.tag / 3).unwrap()
}

#[test]
fn a_kill_after_any_store_loses_and_repeats_nothing() {
    for seed in [1, 2, 3] {
        const MANY: u32 = 1 << 30;
        kill_after(Some(MANY));
        let mut world = KillHarness::new(seed);
        world.live();
        let stores = MANY - world.stores_left.unwrap();
        assert!(world.kills == 0 && stores > 200, "{stores}");
        for at in 0..stores {
            // The second kill hits the device that takes over from the killed one, or a later one.
            for again in [None, Some(at % 5), Some(at % 97)] {
                let mut world = KillHarness::new(seed);
                world.again = again;
                kill_after(Some(at));
                world.live();
                assert!(world.kills > 0, "it was killed at store {at} of {stores}");
            }
        }
    }
}

#[test]
fn kills_at_random() {
    for mut seed in 1..400u64 {
        let mut world = KillHarness::new(seed);
        for _ in 0..60 {
            if stores_left().is_none() {
                kill_after(Some(u32::try_from(next(&mut seed) % 60).unwrap()));
            }
            (0..next(&mut seed) % 4).for_each(|_| world.ask());
            world.take();
            world.answer(false);
        }
        kill_after(None);
        world.live();
        assert!(world.kills > 3 && world.lives > 3);
    }
}

/// Front-ends that reconnect send different values as the base of a ring.
#[test]
fn the_base_has_no_effect() {
    let outcome = |base: u16| {
        let mut world = KillHarness::new(7);
        (0..9).for_each(|_| world.ask());
        world.take();
        (0..3).for_each(|_| world.ask());
        let taken = world.d.added - 3;
        let (d, used) = (&world.d, world.d.seen);
        let base = [used, d.added, taken, 12345][usize::from(base)];
        let ring = SplitRing::new(&d.view(), d.layout(), SIZE, false, base).unwrap();
        let mut x = Virtqueue::new(d.view(), ring, Some(InFlightRecord::new(world.map.clone(), 0, SIZE))).unwrap();
        assert_eq!((x.ring().next_avail(), x.chains_to_resubmit()), (taken, 9));
        let mut begun = Vec::new();
        let mut push = |r: Request| {
            begun.push(r.tag);
            100
        };
        assert_eq!(x.pop_resubmitted(&RULES, 100, &mut push), PopResult::Empty);
        assert_eq!(x.pop_chains(&RULES, 100, &mut push), PopResult::Empty);
        begun
    };
    assert!(outcome(0).len() > 6);
    for base in 1..4 {
        assert_eq!(outcome(base), outcome(0));
    }
}

#[test]
fn a_batch_of_resubmitted_chains_is_bounded_in_bytes() {
    let (mut d, map) = (TestDriver::new(SIZE), region(SIZE));
    let much = u32::try_from(MAX_BATCH_BYTES).unwrap();
    let mut record = InFlightRecord::new(map.clone(), 0, SIZE);
    record.resume(SIZE, 0).unwrap();
    for slot in 0..3 {
        let (first, header) = (3 * slot, d.header(slot, kind::IN, 0));
        let at = STATUS + u64::from(slot);
        d.chain(TABLE, first, &[(header, 16, 0), (SEAM, much / 2, WRITE), (at, 1, WRITE)]);
        d.add(first);
        record.record_taken(first);
    }
    let ring = SplitRing::new(&d.view(), d.layout(), SIZE, false, 3).unwrap();
    let mut x = Virtqueue::new(d.view(), ring, Some(InFlightRecord::new(map, 0, SIZE))).unwrap();
    let mut begun = Vec::new();
    let mut take = || {
        let pause = x.pop_resubmitted(&RULES, 100, |r| {
            begun.push(r.tag);
            100
        });
        (pause, begun.len())
    };
    assert_eq!((take(), take()), ((PopResult::BatchFull, 2), (PopResult::Empty, 3)));
}

#[test]
fn a_new_record_starts_at_the_used_index_of_the_ring() {
    let map = region(SIZE);
    let mut record = InFlightRecord::new(map.clone(), 0, SIZE);
    assert_eq!(record.resume(SIZE, 65530).unwrap(), [0u16; 0]);
    record.record_taken(3);
    record.record_completed(3);
    // In SPDK's bug 3766 a new record starts at used index 0. Then 65530 chains would count as completed in this test.
    assert_eq!(InFlightRecord::new(map.clone(), 0, SIZE).resume(SIZE, 65530).unwrap(), [3]);
    assert_eq!(InFlightRecord::new(map.clone(), 0, SIZE).resume(SIZE, 65531).unwrap(), [0u16; 0]);
    let raw = |at: usize, len: usize| {
        let mut bytes = vec![0; len];
        map.map.get_slice(at, len).unwrap().copy_to(&mut bytes);
        bytes
    };
    assert_eq!(raw(0, 8), [0; 8]);
    assert_eq!(raw(8, 8), [1u16, SIZE, 3, 65531].map(u16::to_ne_bytes).concat());
}

/// The layout is that of QEMU, since a region may be passed from one back-end to another.
#[test]
fn the_layout_is_that_of_the_protocol() {
    let map = region(8);
    assert_eq!(InFlightRecord::len(8), 192);
    let mut record = InFlightRecord::new(map.clone(), 0, 8);
    record.resume(8, 0).unwrap();
    for head in [5, 2, 7] {
        record.record_taken(head);
    }
    record.record_completed(7);
    record.record_completed(2);
    let mut raw = [0u8; 144];
    map.map.get_slice(0, 144).unwrap().copy_to(&mut raw);
    let head = |h: usize| (raw[16 + 16 * h], raw[22 + 16 * h], raw[24 + 16 * h]);
    assert_eq!((head(5), head(2), head(7)), ((1, 0, 0), (1, 7, 1), (1, 0, 2)));
    assert_eq!((raw[12], raw[14]), (2, 0));
    record.record_published(2);
    map.map.get_slice(0, 144).unwrap().copy_to(&mut raw);
    assert_eq!([5, 2, 7].map(|h| raw[16 + 16 * h]), [1, 0, 0]);
    assert_eq!(raw[14], 2);
}

#[test]
fn invalid_records_are_refused() {
    let map = region(64);
    let mut record = InFlightRecord::new(map.clone(), 0, 64);
    assert!(record.resume(128, 0).is_err(), "the ring is larger than the record");
    assert!(record.resume(64, 0).is_ok() && record.resume(32, 0).is_ok());
    for (at, word) in [(VERSION, 2), (VERSION, u16::MAX), (DESC_NUM, 63), (DESC_NUM, 65), (DESC_NUM, 0)] {
        let was: u16 = record.load(at);
        record.store(at, word);
        assert_eq!(record.resume(64, 0).unwrap_err().kind(), ErrorKind::Invalid);
        record.store(at, was);
    }
    assert!(record.resume(64, 0).is_ok());
}

/// If the record belongs to an earlier ring, the device resubmits nothing.
#[test]
fn the_record_of_an_earlier_ring_is_cleared() {
    let mut record = InFlightRecord::new(region(64), 0, 64);
    record.resume(64, 1000).unwrap();
    record.record_taken(1);
    assert_eq!(record.clone().resume(64, 1064).unwrap(), [1], "a batch of a whole ring, of other chains");
    let mut record = InFlightRecord::new(region(64), 0, 64);
    record.resume(64, 1000).unwrap();
    record.record_taken(1);
    assert_eq!(record.resume(64, 0).unwrap(), [0u16; 0]);
    assert_eq!(record.resume(64, 0).unwrap(), [0u16; 0]);
}

#[test]
fn a_hostile_record_is_bounded() {
    for mut seed in 1..2000u64 {
        let map = region(64);
        let bytes: Vec<u8> = (0..InFlightRecord::len(64)).map(|_| next(&mut seed).to_be_bytes()[7]).collect();
        map.map.get_slice(0, bytes.len()).unwrap().copy_from(&bytes);
        let mut record = InFlightRecord::new(map, 0, 64);
        // A header that `resume` accepts.
        record.store(VERSION, VERSION_1);
        record.store(DESC_NUM, 64u16);
        let used = u16::try_from(next(&mut seed) & 0xffff).unwrap();
        record.store(USED_IDX, used.wrapping_sub(u16::try_from(next(&mut seed) % 80).unwrap()));
        if seed.is_multiple_of(2) {
            record.store(LAST_BATCH_HEAD, u16::try_from(next(&mut seed) % 64).unwrap());
            (0..64u16).for_each(|h| record.store(entry_offset(h) + NEXT, h ^ 1));
            (0..64).for_each(|h| record.store(entry_offset(h), 1u8));
            record.store(entry_offset(9) + COUNTER, u64::MAX);
        }
        let size = [64, 32, 1][usize::try_from(next(&mut seed) % 3).unwrap()];
        let heads = record.resume(size, used).unwrap();
        let mut once = heads.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), heads.len());
        assert!(heads.iter().all(|h| *h < size));
        record.record_taken(0);
        record.record_completed(0);
        record.record_published(used.wrapping_add(1));
        let d = TestDriver::new(size);
        let ring = SplitRing::new(&d.view(), d.layout(), 64, false, 0).unwrap();
        let mut x = Virtqueue::new(d.view(), ring, Some(record)).unwrap();
        for _ in 0..=64 / MAX_BATCH {
            let _ = x.pop_resubmitted(&RULES, 100, |_| 100);
        }
        assert_eq!(x.chains_to_resubmit(), 0);
        x.publish();
        x.pop_chains(&RULES, 100, |_| 100);
    }
}
