//! The method `stats`: the figures of the disks as JSON, or as text in Prometheus' format.
//!
//! A figure of a disk is one row of [`METRICS`]; both formats and the schema follow from the row. Figures that a disk has
//! several times (of queues, of layers) are one more member in [`disk_stats`] and one more section in [`prometheus`].

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::disk_info::DiskState;
use super::registry::ServedDisk;
use super::schema::{array, integer, object, text};
use crate::units::SECTOR;

/// Parameters of `stats`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StatsParams {
    /// Name of the disk. `None` selects all disks.
    pub(super) disk: Option<String>,
    #[serde(default)]
    pub(super) format: StatsFormat,
}

/// Formats of statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum StatsFormat {
    #[default]
    Json,
    Prometheus,
}

/// Kinds of metrics, as Prometheus distinguishes them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MetricKind {
    /// Only grows while the disk is served.
    Counter,
    Gauge,
}

/// A figure of a disk.
struct Metric {
    /// Name in JSON. In Prometheus' format it is preceded by `diffdisk_`, and that of a counter is followed by `_total`.
    name: &'static str,
    kind: MetricKind,
    help: &'static str,
    read: fn(&ServedDisk) -> u64,
}

const METRICS: &[Metric] = &[
    Metric {
        name: "commits",
        kind: MetricKind::Counter,
        help: "Commits that succeeded.",
        read: |served| served.disk.counters().commits.load(Ordering::Relaxed),
    },
    Metric {
        name: "syncs",
        kind: MetricKind::Counter,
        help: "Syncs of commits.",
        read: |served| served.disk.counters().syncs.load(Ordering::Relaxed),
    },
    Metric {
        name: "readahead_bytes",
        kind: MetricKind::Counter,
        help: "Bytes that were prefetched for sequential reads.",
        read: |served| served.disk.counters().readahead_bytes.load(Ordering::Relaxed),
    },
    Metric {
        name: "early_writebacks",
        kind: MetricKind::Counter,
        help: "Hints to the kernel to start writeback before a flush.",
        read: |served| served.disk.counters().early_writebacks.load(Ordering::Relaxed),
    },
    Metric {
        name: "size_bytes",
        kind: MetricKind::Gauge,
        help: "Size of the disk.",
        read: |served| served.disk.capacity().saturating_mul(SECTOR),
    },
    Metric {
        name: "depth",
        kind: MetricKind::Gauge,
        help: "Number of files in the chain.",
        read: |served| served.disk.version().depth() as u64,
    },
    Metric {
        name: "front_end_connected",
        kind: MetricKind::Gauge,
        help: "1 if a front-end is connected.",
        read: |served| served.server.front_end().is_some().into(),
    },
    Metric {
        name: "full",
        kind: MetricKind::Gauge,
        help: "1 if writes wait or fail because the file system is full.",
        read: |served| (DiskState::of(served) == DiskState::Full).into(),
    },
    Metric {
        name: "poisoned",
        kind: MetricKind::Gauge,
        help: "1 if a failed sync made the disk refuse writes.",
        read: |served| (DiskState::of(served) == DiskState::Poisoned).into(),
    },
];

/// Returns the statistics of the disks.
pub(super) fn collect(disks: &[Arc<ServedDisk>], format: StatsFormat) -> Value {
    match format {
        StatsFormat::Json => json!({"disks": disks.iter().map(|served| disk_stats(served)).collect::<Vec<_>>()}),
        StatsFormat::Prometheus => prometheus(disks).into(),
    }
}

fn disk_stats(served: &ServedDisk) -> Value {
    json!({
        "disk": served.name,
        "counters": figures(served, MetricKind::Counter),
        "gauges": figures(served, MetricKind::Gauge),
    })
}

fn figures(served: &ServedDisk, kind: MetricKind) -> Map<String, Value> {
    let of_kind = METRICS.iter().filter(|metric| metric.kind == kind);
    of_kind.map(|metric| (metric.name.to_owned(), (metric.read)(served).into())).collect()
}

fn prometheus(disks: &[Arc<ServedDisk>]) -> String {
    let mut text = String::new();
    for metric in METRICS {
        let (suffix, kind) = match metric.kind {
            MetricKind::Counter => ("_total", "counter"),
            MetricKind::Gauge => ("", "gauge"),
        };
        let name = format!("diffdisk_{}{suffix}", metric.name);
        let _ = write!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n", metric.help);
        for served in disks {
            let _ = writeln!(text, "{name}{{disk=\"{}\"}} {}", escape_label(&served.name), (metric.read)(served));
        }
    }
    text
}

/// Escapes the value of a label, as Prometheus' text format requires.
fn escape_label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

pub(super) fn params_schema() -> Value {
    object(&[], &[("disk", text()), ("format", json!({"enum": ["json", "prometheus"]}))])
}

pub(super) fn result_schema() -> Value {
    let group = |kind| {
        let of_kind = METRICS.iter().filter(|metric| metric.kind == kind);
        object(&of_kind.map(|metric| (metric.name, integer())).collect::<Vec<_>>(), &[])
    };
    let disk = object(
        &[("disk", text()), ("counters", group(MetricKind::Counter)), ("gauges", group(MetricKind::Gauge))],
        &[],
    );
    json!({"oneOf": [object(&[("disks", array(disk))], &[]), text()]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escape_label("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
