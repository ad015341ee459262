//! Gathers the statistics of a disk: sums the counters of its lanes, and queries its gauges.

use std::sync::atomic::Ordering;

use super::lane_registry::{KindTotals, QueueTotals};
use super::layer_totals::LayerTotals;
use super::report::{DiskGauges, DiskStatistics, KindStatistics, LayerStatistics, QueueStatistics, RequestStatistics};
use crate::disk::served_version::ServedVersion;
use crate::disk::shared::Disk;
use crate::storage::File;
use crate::units::SECTOR;

impl Disk {
    /// Returns the statistics since the disk was opened.
    ///
    /// Lanes that have ended keep their counts, so no count ever decreases. Counts of requests that are being answered
    /// may be a few requests apart. For the gauges the call makes a system call for each file of the chain and for the
    /// file system of the top, which waits if the file system does not respond.
    pub fn statistics(&self) -> DiskStatistics {
        // While this lock is held, no version is published, so the slots of the version and of the totals agree.
        let current = self.current_locked();
        let (version, totals) = (current.clone(), self.lane_counters.totals());
        drop(current);
        let layers: Vec<LayerStatistics> =
            version.files().map(|(slot, file)| layer(file, &totals.files[slot.as_usize()])).collect();
        let counters = self.counters();
        DiskStatistics {
            size_bytes: self.capacity() * SECTOR,
            read_only: self.is_read_only(),
            full: self.is_full(),
            poisoned: self.is_poisoned(),
            queues: totals.queues.iter().map(|(index, queue)| queue_report(*index, queue)).collect(),
            total: queue_report(None, &totals.sum),
            commits: counters.commits.load(Ordering::Relaxed),
            syncs: counters.syncs.load(Ordering::Relaxed),
            readahead_bytes: counters.readahead_bytes.load(Ordering::Relaxed),
            early_writebacks: counters.early_writebacks.load(Ordering::Relaxed),
            gauges: self.gauges(&version, &layers),
            layers,
        }
    }

    fn gauges(&self, version: &ServedVersion, layers: &[LayerStatistics]) -> DiskGauges {
        let above_root = &layers[..layers.len().saturating_sub(1)];
        let gauges = DiskGauges {
            stalled_writes: self.stalled_writes.count(),
            mapped_bytes: layers.iter().map(|layer| layer.mapped_bytes).sum(),
            merge_debt_bytes: above_root.iter().filter_map(|layer| layer.allocated_bytes).sum(),
            ..DiskGauges::default()
        };
        let Some(top) = version.top() else { return gauges };
        let image = top.image.gauges();
        DiskGauges {
            journal_slots_used: image.journal_slots_used,
            journal_slots: image.journal_slots,
            dirty_bitmap_sectors: image.dirty_bitmap_sectors,
            reserved_bytes: image.reserved_bytes,
            file_system_available_bytes: top.image.file().file_system_space().ok().map(|space| space.available),
            ..gauges
        }
    }
}

fn layer(file: &File, totals: &LayerTotals) -> LayerStatistics {
    LayerStatistics {
        path: file.path().to_path_buf(),
        reads: totals.reads,
        read_bytes: totals.read_bytes,
        copies: totals.copies,
        copied_bytes: totals.copied_bytes,
        writes: totals.writes,
        written_bytes: totals.written_bytes,
        zeroed_bytes: totals.zeroed_bytes,
        allocated_bytes: file.stat().ok().map(|stat| stat.allocated),
        mapped_bytes: file.mapped_bytes(),
    }
}

fn queue_report(queue: Option<u32>, totals: &QueueTotals) -> QueueStatistics {
    let [read, write, flush, discard, write_zeroes] = totals.kinds.each_ref().map(kind_report);
    QueueStatistics {
        queue,
        in_flight: totals.in_flight,
        refused: totals.refused,
        zero_filled_bytes: totals.zero_filled_bytes,
        requests: RequestStatistics { read, write, flush, discard, write_zeroes },
    }
}

fn kind_report(totals: &KindTotals) -> KindStatistics {
    let KindTotals { bytes, errors, ref latency } = *totals;
    KindStatistics { requests: latency.count(), bytes, errors, latency: latency.clone() }
}
