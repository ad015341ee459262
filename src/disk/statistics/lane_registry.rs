//! The counters of all lanes of a disk, with those of lanes that have ended, so that no sum ever decreases.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::histogram::HistogramSnapshot;
use super::lane_counters::{LaneCounters, RequestKind};
use super::layer_totals::{LayerTotals, SlotBaselines};
use crate::storage::{FILE_SLOTS, FileSlot};

/// The counters of the lanes of a disk.
#[derive(Debug, Default)]
pub(in crate::disk) struct LaneRegistry(Mutex<RegisteredLanes>);

#[derive(Debug, Default)]
struct RegisteredLanes {
    running: Vec<Arc<LaneCounters>>,
    /// The sums of lanes that have ended, by queue.
    ended: BTreeMap<Option<u32>, QueueTotals>,
    /// Which counts of the file slots belong to their present files.
    baselines: SlotBaselines,
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

/// The sums of all lanes.
#[derive(Debug)]
pub(super) struct LaneTotals {
    /// Each queue. Lanes without a queue come first, under `None`.
    pub(super) queues: BTreeMap<Option<u32>, QueueTotals>,
    /// The sum over the queues.
    pub(super) sum: QueueTotals,
    /// The counts of the present file of each file slot, with those from the slots that the file had before. The counts
    /// of a slot in `sum` include earlier files of the slot.
    pub(super) files: Vec<LayerTotals>,
}

impl LaneRegistry {
    /// Creates the counters of a new lane. A lane counts as ended when all other references to its counters are
    /// dropped.
    pub(in crate::disk) fn add_lane(&self) -> Arc<LaneCounters> {
        let counters = Arc::new(LaneCounters::new());
        let mut lanes = self.lock();
        lanes.fold_ended();
        lanes.running.push(counters.clone());
        counters
    }

    /// Begins the counts of the file that gets a free slot.
    pub(in crate::disk) fn slot_taken(&self, slot: FileSlot) {
        let mut lanes = self.lock();
        let counted = lanes.counted(slot);
        lanes.baselines.begin(slot, counted);
    }

    /// Records that the file in slot `from` moves to the slot `to`, which was taken for it.
    pub(in crate::disk) fn file_moves(&self, from: FileSlot, to: FileSlot) {
        self.lock().baselines.move_file(from, to);
    }

    /// Ends the counts of the file in a slot that no operation uses. If the file has moved to another slot, its counts
    /// pass to that slot.
    pub(in crate::disk) fn slot_freed(&self, slot: FileSlot) {
        let mut lanes = self.lock();
        let counted = lanes.counted(slot);
        lanes.baselines.end(slot, counted);
    }

    /// Returns the sums of the lanes.
    pub(super) fn totals(&self) -> LaneTotals {
        let mut lanes = self.lock();
        lanes.fold_ended();
        let mut queues = lanes.ended.clone();
        for lane in &lanes.running {
            let queue = queues.entry(lane.queue()).or_default();
            // Answers are counted after their requests were taken, so they are read first.
            let answered = queue.add_lane(lane);
            queue.in_flight += lane.taken.get().saturating_sub(answered);
        }
        let mut sum = QueueTotals::default();
        queues.values().for_each(|queue| sum.add(queue));
        let counted = |slot: FileSlot| sum.layers[slot.as_usize()];
        let files = (0..FILE_SLOTS).map(|slot| lanes.baselines.of_file(FileSlot(slot), counted)).collect();
        LaneTotals { queues, sum, files }
    }

    fn lock(&self) -> MutexGuard<'_, RegisteredLanes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegisteredLanes {
    /// Moves the counts of lanes that have ended to the sums.
    fn fold_ended(&mut self) {
        let RegisteredLanes { running, ended, .. } = self;
        // `get_mut` succeeds if no other reference is left, and then all stores of the lane are visible here.
        for lane in running.extract_if(.., |lane| Arc::get_mut(lane).is_some()) {
            ended.entry(lane.queue()).or_default().add_lane(&lane);
        }
    }

    /// Returns the counts of all lanes in a file slot.
    fn counted(&self, slot: FileSlot) -> LayerTotals {
        let mut total = LayerTotals::default();
        self.ended.values().for_each(|queue| total.add(&queue.layers[slot.as_usize()]));
        self.running.iter().for_each(|lane| total.add_counters(lane.layer(slot)));
        total
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
        let count =
            |queue, kind: RequestKind| registry.totals().queues[&Some(queue)].kinds[kind as usize].latency.count();
        assert_eq!((count(0, RequestKind::Read), count(1, RequestKind::Flush)), (1, 1));
        assert_eq!(registry.totals().queues[&Some(1)].in_flight, 2);
        drop(lanes);
        // A queue that is served again has the counts of both lanes. Requests that a lane lost are not in flight.
        let again = registry.add_lane();
        again.set_queue(1);
        answer(&again, RequestKind::Flush);
        assert_eq!((count(0, RequestKind::Read), count(1, RequestKind::Flush)), (1, 2));
        assert_eq!(registry.totals().queues[&Some(1)].in_flight, 0);
        let sum = registry.totals().sum;
        assert_eq!(sum.kinds.iter().map(|kind| kind.bytes).sum::<u64>(), 3 * 512);
    }

    #[test]
    fn the_next_file_of_a_slot_begins_at_zero_and_a_file_that_moves_keeps_its_counts() {
        let registry = LaneRegistry::default();
        let (ended, lane) = (registry.add_lane(), registry.add_lane());
        let (top, other) = (FileSlot(0), FileSlot(1));
        let reads = |slot: FileSlot| registry.totals().files[slot.as_usize()].reads;
        lane.layer(top).reads.add(3);
        ended.layer(top).reads.add(4);
        drop(ended);
        // The top moves. Until its old slot is freed, operations of the older version count there.
        registry.slot_taken(other);
        assert_eq!((reads(top), reads(other)), (7, 0));
        registry.file_moves(top, other);
        lane.layer(top).reads.add(1);
        lane.layer(other).reads.add(10);
        assert_eq!(reads(other), 18);
        registry.slot_freed(top);
        assert_eq!(reads(other), 18);
        // The slot is given to another file, and the top moves back after that file has gone.
        registry.slot_taken(top);
        assert_eq!(reads(top), 0);
        lane.layer(top).reads.add(100);
        assert_eq!((reads(top), reads(other)), (100, 18));
        registry.slot_freed(top);
        registry.slot_taken(top);
        registry.file_moves(other, top);
        registry.slot_freed(other);
        lane.layer(top).reads.add(2);
        drop(lane);
        assert_eq!(reads(top), 20);
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
                let now = totals.queues.get(&None).map_or(0, |queue| queue.kinds[1].latency.count());
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
        });
        assert_eq!(registry.totals().queues[&None].kinds[1].latency.count(), 5000);
    }
}
