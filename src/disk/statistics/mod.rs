//! Statistics of a disk: counters and histograms of its lanes, and the report of their sums.
//!
//! ```text
//!   device/request_times ──┐                                   ┌── prometheus   text
//!   task_ops, cached_reads ┴─> lane_counters ─> lane_registry ─> gather ─> report ── serde   JSON
//!                              (histogram, counter)  │           └── gauges of image and storage
//!   version_change ──────────────> layer_totals ──────┘
//! ```
//!
//! Counting must not slow down reads from the page cache. So each lane has its own counters, which only its
//! thread writes, without atomic additions; a reader sums over the lanes. All requests of a batch share the timestamps
//! of the batch. `docs/statistics.md` lists each number, its costs and its caveats.

mod counter;
mod gather;
mod histogram;
mod lane_counters;
pub(super) mod lane_registry;
mod layer_totals;
mod prometheus;
mod report;

pub use counter::Counter;
pub use histogram::{Histogram, HistogramSnapshot};
pub use lane_counters::{KindCounters, LaneCounters, LayerCounters, RequestKind, TakenRequest};
pub use prometheus::{prometheus_gauge, prometheus_text};
pub use report::{DiskGauges, DiskStatistics, KindStatistics, LayerStatistics, QueueStatistics, RequestStatistics};
