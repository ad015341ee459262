//! The counters of all lanes of a disk, with those of lanes that have ended, so that no sum ever decreases.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::histogram::HistogramSnapshot;
use super::lane_counters::{LaneCounters, LayerCounters, RequestKind};
use crate::storage::{FILE_SLOTS, FileSlot};

/// The counters of the lanes of a disk.
#[derive(Debug, Default)]
pub(in crate::disk) struct LaneRegistry(Mutex<RegisteredLanes>);

#[derive(Debug, Default)]
struct RegisteredLanes {
    running: Vec<Arc<LaneCounters>>,
    /// The sums of lanes that have ended, by queue.
    ended: BTreeMap<Option<u32>, QueueTotals>,
}

/// The sums of the lanes of one queue.
#[derive(Clone, Debug)]
pub(super) struct QueueTotals {
    /// Requests that were taken and not answered, of lanes that run.
    pub(super) in_flight: u64,
    pub(super) refused: u64,
    pub(super) zero_filled_bytes: u64,
    /// By the value of `RequestKind`.
    pub(super) kinds: [KindTotals; RequestKind::ALL.len()],
    /// By file slot.
    pub(super) layers: Vec<LayerTotals>,
}

/// The sums of the requests of one kind.
#[derive(Clone, Debug, Default)]
pub(super) struct KindTotals {
    pub(super) bytes: u64,
    pub(super) errors: u64,
    pub(super) latency: HistogramSnapshot,
}

/// The sums of one file of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LayerTotals {
    pub(super) reads: u64,
    pub(super) read_bytes: u64,
    pub(super) copies: u64,
    pub(super) copied_bytes: u64,
    pub(super) writes: u64,
    pub(super) written_bytes: u64,
    pub(super) zeroed_bytes: u64,
}

impl LaneRegistry {
    /// Creates the counters of a new lane. The lane ends when it drops them.
    pub(in crate::disk) fn add_lane(&self) -> Arc<LaneCounters> {
        let counters = Arc::new(LaneCounters::new());
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.fold_ended();
        lanes.running.push(counters.clone());
        counters
    }

    /// Returns the sums of each queue. Those of lanes without a queue come first, under `None`.
    pub(super) fn totals(&self) -> BTreeMap<Option<u32>, QueueTotals> {
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.fold_ended();
        let mut totals = lanes.ended.clone();
        for lane in &lanes.running {
            let queue = totals.entry(lane.queue()).or_default();
            // Answers are counted after their requests were taken, so they are read first.
            let answered = queue.add_lane(lane);
            queue.in_flight += lane.taken.get().saturating_sub(answered);
        }
        totals
    }
}

impl RegisteredLanes {
    /// Moves the counts of lanes that have ended to the sums.
    fn fold_ended(&mut self) {
        let RegisteredLanes { running, ended } = self;
        // `get_mut` succeeds if the lane has dropped its reference, and then all of its stores are visible here.
        for lane in running.extract_if(.., |lane| Arc::get_mut(lane).is_some()) {
            ended.entry(lane.queue()).or_default().add_lane(&lane);
        }
    }
}

impl Default for QueueTotals {
    fn default() -> QueueTotals {
        QueueTotals {
            in_flight: 0,
            refused: 0,
            zero_filled_bytes: 0,
            kinds: RequestKind::ALL.map(|_| KindTotals::default()),
            layers: vec![LayerTotals::default(); usize::from(FILE_SLOTS)],
        }
    }
}

impl QueueTotals {
    /// Adds the counts of a lane, except those of requests in flight. Returns the number of requests that it has
    /// answered.
    fn add_lane(&mut self, lane: &LaneCounters) -> u64 {
        let mut answered = 0;
        for (total, kind) in self.kinds.iter_mut().zip(RequestKind::ALL) {
            let counters = lane.kind(kind);
            let mut latency = HistogramSnapshot::default();
            counters.latency.add_to(&mut latency);
            answered += latency.count();
            total.latency.add(&latency);
            total.bytes += counters.bytes.get();
            total.errors += counters.errors.get();
        }
        self.refused += lane.refused.get();
        self.zero_filled_bytes += lane.zero_filled_bytes.get();
        for (total, slot) in self.layers.iter_mut().zip(0..) {
            total.add_counters(lane.layer(FileSlot(slot)));
        }
        answered
    }

    /// Adds the counts of another queue.
    pub(super) fn add(&mut self, other: &QueueTotals) {
        self.in_flight += other.in_flight;
        self.refused += other.refused;
        self.zero_filled_bytes += other.zero_filled_bytes;
        for (total, kind) in self.kinds.iter_mut().zip(&other.kinds) {
            total.latency.add(&kind.latency);
            total.bytes += kind.bytes;
            total.errors += kind.errors;
        }
        self.layers.iter_mut().zip(&other.layers).for_each(|(total, layer)| total.add(layer));
    }
}

impl LayerTotals {
    fn add_counters(&mut self, layer: &LayerCounters) {
        self.add(&LayerTotals {
            reads: layer.reads.get(),
            read_bytes: layer.read_bytes.get(),
            copies: layer.copies.get(),
            copied_bytes: layer.copied_bytes.get(),
            writes: layer.writes.get(),
            written_bytes: layer.written_bytes.get(),
            zeroed_bytes: layer.zeroed_bytes.get(),
        });
    }

    fn add(&mut self, other: &LayerTotals) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.copies += other.copies;
        self.copied_bytes += other.copied_bytes;
        self.writes += other.writes;
        self.written_bytes += other.written_bytes;
        self.zeroed_bytes += other.zeroed_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(lane: &LaneCounters, kind: RequestKind) {
        lane.taken.add(1);
        lane.kind(kind).latency.record(1000, 1);
        lane.kind(kind).bytes.add(512);
    }

    #[test]
    fn lanes_that_ended_keep_their_counts() {
        let registry = LaneRegistry::default();
        let lanes = [0, 1].map(|queue| {
            let lane = registry.add_lane();
            lane.set_queue(queue);
            lane
        });
        answer(&lanes[0], RequestKind::Read);
        answer(&lanes[1], RequestKind::Flush);
        lanes[1].taken.add(2);
        let count = |queue, kind: RequestKind| registry.totals()[&Some(queue)].kinds[kind as usize].latency.count();
        assert_eq!((count(0, RequestKind::Read), count(1, RequestKind::Flush)), (1, 1));
        assert_eq!(registry.totals()[&Some(1)].in_flight, 2);
        drop(lanes);
        // A queue that is served again has the counts of both lanes. Requests that a lane lost are not in flight.
        let again = registry.add_lane();
        again.set_queue(1);
        answer(&again, RequestKind::Flush);
        assert_eq!((count(0, RequestKind::Read), count(1, RequestKind::Flush)), (1, 2));
        assert_eq!(registry.totals()[&Some(1)].in_flight, 0);
        let mut sum = QueueTotals::default();
        registry.totals().values().for_each(|queue| sum.add(queue));
        assert_eq!(sum.kinds.iter().map(|kind| kind.bytes).sum::<u64>(), 3 * 512);
    }

    #[test]
    fn counts_never_decrease_while_lanes_come_and_go() {
        let registry = LaneRegistry::default();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..100 {
                    let lane = registry.add_lane();
                    (0..50).for_each(|_| answer(&lane, RequestKind::Write));
                }
                done.store(true, std::sync::atomic::Ordering::Release);
            });
            let mut last = 0;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                let totals = registry.totals();
                let now = totals.get(&None).map_or(0, |queue| queue.kinds[1].latency.count());
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
        });
        assert_eq!(registry.totals()[&None].kinds[1].latency.count(), 5000);
    }
}
