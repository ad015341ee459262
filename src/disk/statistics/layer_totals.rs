//! The counts of the files of the chain.
//!
//! Lanes count by file slot. A slot is given to one file after the other, and a file may move to another slot. The
//! counters of lanes have one writer, so they are not reset. Instead, each slot has a baseline: what had been counted
//! when the slot was taken. A file that moves takes its counts to the new slot.

use std::collections::BTreeMap;

use super::lane_counters::LayerCounters;
use crate::storage::FileSlot;

/// The sums of one file of the chain, or of one file slot.
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

impl LayerTotals {
    pub(super) fn add_counters(&mut self, layer: &LayerCounters) {
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

    pub(super) fn add(&mut self, other: &LayerTotals) {
        *self = self.combine(other, u64::wrapping_add);
    }

    fn minus(&self, other: &LayerTotals) -> LayerTotals {
        self.combine(other, u64::saturating_sub)
    }

    fn combine(&self, other: &LayerTotals, f: fn(u64, u64) -> u64) -> LayerTotals {
        LayerTotals {
            reads: f(self.reads, other.reads),
            read_bytes: f(self.read_bytes, other.read_bytes),
            copies: f(self.copies, other.copies),
            copied_bytes: f(self.copied_bytes, other.copied_bytes),
            writes: f(self.writes, other.writes),
            written_bytes: f(self.written_bytes, other.written_bytes),
            zeroed_bytes: f(self.zeroed_bytes, other.zeroed_bytes),
        }
    }
}

/// How the counts of the file in a slot differ from the counts of the slot.
#[derive(Clone, Copy, Debug, Default)]
struct SlotBaseline {
    /// Counts of the slot when the file got it: those of earlier files.
    start: LayerTotals,
    /// Counts of the file in slots that it had before and that are free now.
    carried: LayerTotals,
    /// The slot that the file had before, while operations may still use that slot.
    previous: Option<FileSlot>,
}

/// The baselines of file slots. A slot in use that is not in the map has had no other file.
#[derive(Debug, Default)]
pub(super) struct SlotBaselines(BTreeMap<FileSlot, SlotBaseline>);

impl SlotBaselines {
    /// Begins the counts of another file in a slot in which `counted` has been counted.
    pub(super) fn begin(&mut self, slot: FileSlot, counted: LayerTotals) {
        self.0.insert(slot, SlotBaseline { start: counted, ..SlotBaseline::default() });
    }

    /// Records that the file in slot `from` moves to slot `to`. Operations may use slot `from` until it is freed.
    pub(super) fn move_file(&mut self, from: FileSlot, to: FileSlot) {
        self.0.entry(to).or_default().previous = Some(from);
    }

    /// Ends the counts of a file in a slot in which `counted` has been counted. If the file has moved, its counts pass
    /// to its present slot.
    pub(super) fn end(&mut self, slot: FileSlot, counted: LayerTotals) {
        let ended = self.0.remove(&slot).unwrap_or_default();
        if let Some(next) = self.0.values_mut().find(|baseline| baseline.previous == Some(slot)) {
            next.carried.add(&ended.carried);
            next.carried.add(&counted.minus(&ended.start));
            next.previous = ended.previous;
        }
    }

    /// Returns the counts of the file in a slot, with those in its earlier slots. `counted` returns what was counted in
    /// a slot.
    pub(super) fn of_file(&self, slot: FileSlot, counted: impl Fn(FileSlot) -> LayerTotals) -> LayerTotals {
        let (mut total, mut next) = (LayerTotals::default(), Some(slot));
        while let Some(slot) = next {
            let baseline = self.0.get(&slot).copied().unwrap_or_default();
            total.add(&counted(slot).minus(&baseline.start));
            total.add(&baseline.carried);
            next = baseline.previous;
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_counts_over_several_moves_in_any_order_of_release() {
        for freed_first in [0, 1] {
            let mut baselines = SlotBaselines::default();
            let mut counted = [0u64; 3];
            let totals = |reads| LayerTotals { reads, ..LayerTotals::default() };
            counted[0] = 10;
            for [from, to] in [[0, 1], [1, 2]].map(|slots| slots.map(FileSlot)) {
                // An earlier file left 100 in the slot.
                counted[to.as_usize()] = 100;
                baselines.begin(to, totals(100));
                baselines.move_file(from, to);
                counted[to.as_usize()] += 5;
                // An operation of the older version.
                counted[from.as_usize()] += 1;
            }
            let of_file = |baselines: &SlotBaselines, counted: &[u64; 3]| {
                baselines.of_file(FileSlot(2), |slot| totals(counted[slot.as_usize()])).reads
            };
            let before = of_file(&baselines, &counted);
            assert_eq!(before, 10 + 5 + 5 + 2);
            for slot in [freed_first, 1 - freed_first].map(FileSlot) {
                baselines.end(slot, totals(counted[slot.as_usize()]));
                assert_eq!(of_file(&baselines, &counted), before, "{slot:?} is free, {freed_first} was first");
                // Another file takes the slot.
                baselines.begin(slot, totals(counted[slot.as_usize()]));
                counted[slot.as_usize()] += 1000;
                assert_eq!(of_file(&baselines, &counted), before, "{slot:?} is taken, {freed_first} was first");
            }
        }
    }
}
