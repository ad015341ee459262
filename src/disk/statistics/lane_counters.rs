//! The counters of one lane. The thread of the lane writes them by plain loads and stores; any thread reads them.
//!
//! Requests are counted by kind when they are answered (`device/request_times.rs`). Bytes are counted by layer when the
//! lane pushes the operations of a request, or has made its copies (`disk/task_ops.rs`, `disk/cached_reads.rs`).

use std::sync::atomic::{AtomicU32, Ordering};

use super::counter::Counter;
use super::histogram::Histogram;
use crate::chain::{Extent, Source};
use crate::disk::request::Work;
use crate::storage::{FILE_SLOTS, FileSlot, Timestamp};

/// The queue of a lane that no queue has claimed.
const NO_QUEUE: u32 = u32::MAX;

/// Kind of a request that is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RequestKind {
    /// A read.
    #[default]
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
    /// A discard.
    Discard,
    /// A write of zeros.
    WriteZeroes,
}

impl RequestKind {
    /// All kinds, in the order of their values.
    pub const ALL: [RequestKind; 5] =
        [RequestKind::Read, RequestKind::Write, RequestKind::Flush, RequestKind::Discard, RequestKind::WriteZeroes];

    /// The name of the kind in reports.
    pub fn name(self) -> &'static str {
        match self {
            RequestKind::Read => "read",
            RequestKind::Write => "write",
            RequestKind::Flush => "flush",
            RequestKind::Discard => "discard",
            RequestKind::WriteZeroes => "write_zeroes",
        }
    }
}

/// A request that was passed to a lane and is not answered yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct TakenRequest {
    /// The kind of the request.
    pub kind: RequestKind,
    /// Sectors that it reads, writes, discards or zeroes.
    pub sectors: u32,
    /// Time at which the batch of the request was taken from the ring.
    pub taken_at: Timestamp,
}

impl TakenRequest {
    /// Describes a request of a guest.
    #[inline]
    pub fn new(work: &Work, taken_at: Timestamp) -> TakenRequest {
        let (kind, sectors) = match work {
            Work::Read { range, .. } => (RequestKind::Read, range.count()),
            Work::Write { range, .. } => (RequestKind::Write, range.count()),
            Work::Flush => (RequestKind::Flush, 0),
            Work::Discard { .. } | Work::WriteZeroes { .. } | Work::Prefetch { .. } => ranges_of(work),
        };
        // A read or write has at most 32 MiB, and any other request at most 32 ranges of 1 GiB each.
        #[expect(clippy::cast_possible_truncation)]
        let sectors = sectors as u32;
        TakenRequest { kind, sectors, taken_at }
    }
}

/// Returns the kind of a request with any number of ranges, and the sectors of the ranges. A prefetch counts as a read;
/// guests send none.
#[cold]
fn ranges_of(work: &Work) -> (RequestKind, u64) {
    match work {
        Work::Discard { ranges } => (RequestKind::Discard, ranges.iter().map(|r| r.count()).sum()),
        Work::WriteZeroes { ranges } => (RequestKind::WriteZeroes, ranges.iter().map(|r| r.range.count()).sum()),
        Work::Read { range, .. } | Work::Write { range, .. } | Work::Prefetch { range } => {
            (RequestKind::Read, range.count())
        }
        Work::Flush => (RequestKind::Flush, 0),
    }
}

/// Counters of the requests of one kind. The number of requests is the number of durations in `latency`.
#[derive(Debug)]
pub struct KindCounters {
    /// Bytes of the requests that succeeded.
    pub bytes: Counter,
    /// Requests that failed.
    pub errors: Counter,
    /// Time from the batch in which a request was taken to the batch in which its answer was found.
    pub latency: Histogram,
}

/// Counters of one file slot. They fill one line of the processor's cache.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct LayerCounters {
    /// Operations that read data for requests.
    pub reads: Counter,
    /// Bytes of these operations.
    pub read_bytes: Counter,
    /// Parts of reads that were copied from the page cache.
    pub copies: Counter,
    /// Bytes of these copies.
    pub copied_bytes: Counter,
    /// Operations that write data of requests.
    pub writes: Counter,
    /// Bytes of these operations.
    pub written_bytes: Counter,
    /// Bytes that discards deallocate, and that writes of zeros zero or deallocate.
    pub zeroed_bytes: Counter,
}

/// The counters of one lane: 18 KiB of requests, 17 KiB of layers. No other data is in their cache lines.
#[derive(Debug)]
#[repr(align(128))]
pub struct LaneCounters {
    /// Index of the queue, or `NO_QUEUE`.
    queue: AtomicU32,
    /// Requests that were passed to the lane. The number is added when a batch ends.
    pub taken: Counter,
    /// Requests that were refused because they are not valid or not supported. They are not counted as taken.
    pub refused: Counter,
    /// Bytes of reads that no layer has, so that zeros were stored.
    pub zero_filled_bytes: Counter,
    kinds: [KindCounters; RequestKind::ALL.len()],
    layers: [LayerCounters; FILE_SLOTS as usize],
}

impl LaneCounters {
    pub(super) fn new() -> LaneCounters {
        let kind = || KindCounters { bytes: Counter::new(), errors: Counter::new(), latency: Histogram::new() };
        LaneCounters {
            queue: AtomicU32::new(NO_QUEUE),
            taken: Counter::new(),
            refused: Counter::new(),
            zero_filled_bytes: Counter::new(),
            kinds: RequestKind::ALL.map(|_| kind()),
            layers: std::array::from_fn(|_| LayerCounters::default()),
        }
    }

    /// Records the index of the queue that the lane serves.
    pub fn set_queue(&self, index: usize) {
        self.queue.store(u32::try_from(index).unwrap_or(NO_QUEUE), Ordering::Relaxed);
    }

    /// The index of the queue, if the lane serves one.
    pub fn queue(&self) -> Option<u32> {
        Some(self.queue.load(Ordering::Relaxed)).filter(|queue| *queue != NO_QUEUE)
    }

    /// The counters of a kind of requests.
    #[inline]
    pub fn kind(&self, kind: RequestKind) -> &KindCounters {
        &self.kinds[kind as usize]
    }

    /// The counters of the file in a slot.
    #[inline]
    pub fn layer(&self, slot: FileSlot) -> &LayerCounters {
        &self.layers[slot.as_usize()]
    }

    /// Counts an extent whose operation is pushed, or whose zeros are stored.
    #[inline]
    pub fn count_extent(&self, work: &Work, extent: &Extent) {
        let bytes = extent.range.bytes();
        let Source::File { slot, .. } = extent.source else { return self.zero_filled_bytes.add(bytes) };
        let layer = self.layer(slot);
        match work {
            Work::Read { .. } => {
                layer.reads.add(1);
                layer.read_bytes.add(bytes);
            }
            Work::Write { .. } => {
                layer.writes.add(1);
                layer.written_bytes.add(bytes);
            }
            Work::Discard { .. } | Work::WriteZeroes { .. } => layer.zeroed_bytes.add(bytes),
            Work::Flush | Work::Prefetch { .. } => {}
        }
    }

    /// Counts a part of a read that was copied from the file in a slot.
    #[inline]
    pub fn count_copy(&self, slot: FileSlot, bytes: usize) {
        let layer = self.layer(slot);
        layer.copies.add(1);
        layer.copied_bytes.add(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::request::ZeroRange;
    use crate::units::SectorRange;

    #[test]
    fn kinds_are_in_the_order_of_their_values() {
        for (n, kind) in RequestKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, n);
        }
    }

    #[test]
    fn the_sectors_of_all_ranges_count() {
        let ranges = || [SectorRange::between(3, 5), SectorRange::between(8, 18)];
        let zeroed = ranges().map(|range| ZeroRange { range, unmap: true }).to_vec();
        for (work, kind, sectors) in [
            (Work::Discard { ranges: ranges().to_vec() }, RequestKind::Discard, 12),
            (Work::WriteZeroes { ranges: zeroed }, RequestKind::WriteZeroes, 12),
            (Work::Flush, RequestKind::Flush, 0),
        ] {
            let taken = TakenRequest::new(&work, Timestamp::default());
            assert_eq!((taken.kind, taken.sectors), (kind, sectors));
        }
    }

    #[test]
    fn extents_count_for_the_layer_that_has_them() {
        let counters = LaneCounters::new();
        let range = SectorRange::between(0, 8);
        let file = Source::File { slot: FileSlot(3), offset: 512 };
        let discard = Work::Discard { ranges: vec![range] };
        counters.count_extent(&discard, &Extent { range, source: file });
        counters.count_extent(&discard, &Extent { range, source: Source::Zero });
        counters.count_copy(FileSlot(4), 512);
        let layers = [3, 4].map(|slot| counters.layer(FileSlot(slot)));
        assert_eq!((layers[0].zeroed_bytes.get(), layers[0].reads.get()), (4096, 0));
        assert_eq!((layers[1].copies.get(), layers[1].copied_bytes.get()), (1, 512));
        assert_eq!(counters.zero_filled_bytes.get(), 4096);
        assert_eq!(std::mem::size_of::<LayerCounters>(), 64);
    }
}
