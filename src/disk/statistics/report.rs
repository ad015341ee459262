//! The report of a disk's statistics: plain data, for JSON and for Prometheus. `docs/statistics.md` describes each
//! number.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::histogram::{Histogram, HistogramSnapshot};
use super::lane_counters::RequestKind;

/// The statistics of a disk since it was opened, and its gauges.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DiskStatistics {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Whether the disk refuses writes.
    pub read_only: bool,
    /// Whether writes or commits wait, or writes fail, because the file system is full.
    pub full: bool,
    /// Whether the top is poisoned, so that the disk refuses writes.
    pub poisoned: bool,
    /// Sums over all queues.
    pub total: QueueStatistics,
    /// Each queue.
    pub queues: Vec<QueueStatistics>,
    /// Each file of the chain, youngest first.
    pub layers: Vec<LayerStatistics>,
    /// Commits that succeeded.
    pub commits: u64,
    /// Syncs of all commits, also of those that failed, except commits of lanes that wait for space and are repeated.
    pub syncs: u64,
    /// Bytes that were prefetched for sequential reads.
    pub readahead_bytes: u64,
    /// Hints to the kernel to start writeback before a flush.
    pub early_writebacks: u64,
    /// The state at the time of the report.
    pub gauges: DiskGauges,
}

/// The statistics of a queue, or the sums of all queues.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueueStatistics {
    /// Index of the queue. `None` in the sums, and for lanes that serve no queue.
    pub queue: Option<u32>,
    /// Requests that were passed to lanes that run, and are not answered yet.
    pub in_flight: u64,
    /// Requests that were refused because they are not valid or not supported.
    pub refused: u64,
    /// Bytes of reads that no layer has.
    pub zero_filled_bytes: u64,
    /// Requests by kind.
    pub requests: RequestStatistics,
}

/// The statistics of requests, by kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RequestStatistics {
    /// Reads.
    pub read: KindStatistics,
    /// Writes.
    pub write: KindStatistics,
    /// Flushes.
    pub flush: KindStatistics,
    /// Discards.
    pub discard: KindStatistics,
    /// Writes of zeros.
    pub write_zeroes: KindStatistics,
}

/// The statistics of the requests of one kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KindStatistics {
    /// Requests that were answered, including those that failed.
    pub requests: u64,
    /// Bytes of the requests that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Time that the requests took.
    pub latency: HistogramSnapshot,
}

/// The statistics of one file of the chain.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LayerStatistics {
    /// Path of the file. In JSON, bytes that are not UTF-8 become replacement characters.
    #[serde(serialize_with = "path_as_text")]
    pub path: PathBuf,
    /// Operations that read data for requests.
    pub reads: u64,
    /// Bytes of these operations.
    pub read_bytes: u64,
    /// Parts of reads that were copied from the page cache.
    pub copies: u64,
    /// Bytes of these copies.
    pub copied_bytes: u64,
    /// Operations that write data of requests.
    pub writes: u64,
    /// Bytes of these operations.
    pub written_bytes: u64,
    /// Bytes that discards and writes of zeros deallocate or zero.
    pub zeroed_bytes: u64,
    /// Bytes that the file allocates on the file system; `None` if they cannot be queried.
    pub allocated_bytes: Option<u64>,
    /// Bytes of address space in which the file is mapped for reads from the page cache.
    pub mapped_bytes: u64,
}

/// Numbers that are computed for the report, not counted. A number is `None` if the disk has no such thing, or
/// the number cannot be queried.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct DiskGauges {
    /// Slots of the live journal that are in use.
    pub journal_slots_used: Option<u64>,
    /// Slots of the live journal.
    pub journal_slots: Option<u64>,
    /// Bitmap sectors of the top with bits that are not in the file.
    pub dirty_bitmap_sectors: u64,
    /// Bytes at the end of the top in which new blocks can be placed before the file has to grow.
    pub reserved_bytes: Option<u64>,
    /// Bytes that the file system of the top has available.
    pub file_system_available_bytes: Option<u64>,
    /// Writes that wait for space on the file system.
    pub stalled_writes: u64,
    /// Bytes of address space in which the files are mapped for reads from the page cache.
    pub mapped_bytes: u64,
    /// Bytes that the layers above the root allocate, as far as these can be queried: the most that a merge of all
    /// layers copies.
    pub merge_debt_bytes: u64,
}

impl DiskStatistics {
    /// Returns two reports: one without a value that may be missing, and one with all values. A schema of the report
    /// can be derived from both.
    pub fn examples() -> [DiskStatistics; 2] {
        let histogram = Histogram::new();
        histogram.record(300, 1);
        let mut latency = HistogramSnapshot::default();
        histogram.add_to(&mut latency);
        let kind = || KindStatistics { latency: latency.clone(), ..KindStatistics::default() };
        let requests = || {
            let [read, write, flush, discard, write_zeroes] = std::array::from_fn(|_| kind());
            RequestStatistics { read, write, flush, discard, write_zeroes }
        };
        let queue = |queue| QueueStatistics { queue, requests: requests(), ..QueueStatistics::default() };
        let empty = DiskStatistics {
            queues: vec![QueueStatistics::default()],
            layers: vec![LayerStatistics::default()],
            ..DiskStatistics::default()
        };
        let full = DiskStatistics {
            total: queue(None),
            queues: vec![queue(Some(0))],
            layers: vec![LayerStatistics { allocated_bytes: Some(0), ..LayerStatistics::default() }],
            gauges: DiskGauges {
                journal_slots_used: Some(0),
                journal_slots: Some(0),
                dirty_bitmap_sectors: 0,
                reserved_bytes: Some(0),
                file_system_available_bytes: Some(0),
                stalled_writes: 0,
                mapped_bytes: 0,
                merge_debt_bytes: 0,
            },
            ..DiskStatistics::default()
        };
        [empty, full]
    }
}

fn path_as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

impl RequestStatistics {
    /// The statistics of one kind.
    pub fn kind(&self, kind: RequestKind) -> &KindStatistics {
        match kind {
            RequestKind::Read => &self.read,
            RequestKind::Write => &self.write,
            RequestKind::Flush => &self.flush,
            RequestKind::Discard => &self.discard,
            RequestKind::WriteZeroes => &self.write_zeroes,
        }
    }

    /// The statistics of all kinds.
    pub fn by_kind(&self) -> impl Iterator<Item = (RequestKind, &KindStatistics)> {
        RequestKind::ALL.into_iter().map(|kind| (kind, self.kind(kind)))
    }
}
