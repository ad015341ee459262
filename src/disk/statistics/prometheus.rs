//! Statistics as Prometheus text (exposition format, version 0.0.4).
//!
//! The text is written here, without the crate `prometheus-client`: that brings 18 packages, and its metrics keep their
//! own values, while these are sums that exist only in a report. All samples of a metric must follow each other, so the
//! text is written metric by metric, over all disks.

use std::fmt::{self, Display, Write};

use super::report::{DiskStatistics, LayerStatistics, QueueStatistics};

/// Name and value of a label.
type Label<'a> = (&'a str, &'a dyn Display);

/// Returns the statistics of disks, each with its name, as Prometheus text.
pub fn prometheus_text(disks: &[(&str, &DiskStatistics)]) -> String {
    let mut text = MetricText(String::new());
    requests(&mut text, disks);
    queues(&mut text, disks);
    durations(&mut text, disks);
    layers(&mut text, disks);
    totals(&mut text, disks);
    gauges(&mut text, disks);
    text.0
}

/// Returns a gauge with one value for each disk, as Prometheus text: for numbers that other floors have.
pub fn prometheus_gauge(name: &str, help: &str, disks: &[(&str, u64)]) -> String {
    let mut text = MetricText(String::new());
    text.metric(name, "gauge", help);
    disks.iter().for_each(|(disk, value)| text.sample(name, &[("disk", disk)], value));
    text.0
}

fn requests(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    type Field = fn(&super::report::KindStatistics) -> u64;
    let fields: [(&str, &str, Field); 3] = [
        ("diffdisk_requests_total", "Requests that were answered.", |kind| kind.requests),
        ("diffdisk_request_bytes_total", "Bytes of the requests that succeeded.", |kind| kind.bytes),
        ("diffdisk_request_errors_total", "Requests that failed.", |kind| kind.errors),
    ];
    for (name, help, field) in fields {
        text.metric(name, "counter", help);
        for (disk, queue) in each_queue(disks) {
            let index = QueueIndex(queue.queue);
            for (kind, statistics) in queue.requests.by_kind() {
                text.sample(name, &[("disk", &disk), ("queue", &index), ("kind", &kind.name())], field(statistics));
            }
        }
    }
}

fn queues(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    type Field = fn(&QueueStatistics) -> u64;
    let fields: [(&str, &str, &str, Field); 3] = [
        ("diffdisk_requests_in_flight", "gauge", "Requests that are not answered yet.", |queue| queue.in_flight),
        ("diffdisk_requests_refused_total", "counter", "Requests that are not valid or not supported.", |q| q.refused),
        ("diffdisk_zero_filled_bytes_total", "counter", "Bytes of reads that no layer has.", |q| q.zero_filled_bytes),
    ];
    for (name, of, help, field) in fields {
        text.metric(name, of, help);
        for (disk, queue) in each_queue(disks) {
            text.sample(name, &[("disk", &disk), ("queue", &QueueIndex(queue.queue))], field(queue));
        }
    }
}

fn durations(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    let name = "diffdisk_request_duration_seconds";
    text.metric(name, "histogram", "Time that the daemon took to answer requests, from the ring to the answer.");
    for (disk, statistics) in disks {
        for (kind, of_kind) in statistics.total.requests.by_kind() {
            let labels: [Label<'_>; 2] = [("disk", disk), ("kind", &kind.name())];
            let count = of_kind.latency.count();
            for (nanos, below) in of_kind.latency.cumulative_octaves() {
                text.bucket(name, &labels, &seconds(nanos), below);
            }
            text.bucket(name, &labels, &"+Inf", count);
            text.sample(&format!("{name}_sum"), &labels, seconds(of_kind.latency.sum_nanos));
            text.sample(&format!("{name}_count"), &labels, count);
        }
    }
}

fn layers(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    type Field = fn(&LayerStatistics) -> Option<u64>;
    let fields: [(&str, &str, &str, Field); 9] = [
        ("reads_total", "counter", "Operations that read data for requests.", |layer| Some(layer.reads)),
        ("read_bytes_total", "counter", "Bytes of read operations.", |layer| Some(layer.read_bytes)),
        ("copies_total", "counter", "Parts of reads that were copied from the page cache.", |l| Some(l.copies)),
        ("copied_bytes_total", "counter", "Bytes that were copied from the page cache.", |l| Some(l.copied_bytes)),
        ("writes_total", "counter", "Operations that write data of requests.", |layer| Some(layer.writes)),
        ("written_bytes_total", "counter", "Bytes of write operations.", |layer| Some(layer.written_bytes)),
        ("zeroed_bytes_total", "counter", "Bytes that were deallocated or zeroed.", |layer| Some(layer.zeroed_bytes)),
        ("allocated_bytes", "gauge", "Bytes that the file allocates.", |layer| layer.allocated_bytes),
        ("mapped_bytes", "gauge", "Address space in which the file is mapped.", |layer| Some(layer.mapped_bytes)),
    ];
    for (suffix, of, help, field) in fields {
        let name = format!("diffdisk_layer_{suffix}");
        text.metric(&name, of, help);
        for (disk, statistics) in disks {
            for layer in &statistics.layers {
                if let Some(value) = field(layer) {
                    text.sample(&name, &[("disk", disk), ("layer", &layer.path.display())], value);
                }
            }
        }
    }
}

fn totals(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    type Field = fn(&DiskStatistics) -> u64;
    let fields: [(&str, &str, Field); 4] = [
        ("diffdisk_commits_total", "Commits that succeeded.", |disk| disk.commits),
        ("diffdisk_syncs_total", "Syncs of commits.", |disk| disk.syncs),
        ("diffdisk_readahead_bytes_total", "Bytes prefetched for sequential reads.", |disk| disk.readahead_bytes),
        ("diffdisk_early_writebacks_total", "Hints to start writeback before a flush.", |disk| disk.early_writebacks),
    ];
    for (name, help, field) in fields {
        text.metric(name, "counter", help);
        disks.iter().for_each(|(disk, statistics)| text.sample(name, &[("disk", disk)], field(statistics)));
    }
}

fn gauges(text: &mut MetricText, disks: &[(&str, &DiskStatistics)]) {
    type Field = fn(&DiskStatistics) -> Option<u64>;
    let fields: [(&str, &str, Field); 12] = [
        ("size_bytes", "Size of the disk.", |disk| Some(disk.size_bytes)),
        ("depth", "Number of files in the chain.", |disk| Some(disk.layers.len() as u64)),
        ("read_only", "1 if the disk refuses writes.", |disk| Some(disk.read_only.into())),
        ("full", "1 if writes wait or fail because the file system is full.", |disk| Some(disk.full.into())),
        ("poisoned", "1 if a failed sync made the disk refuse writes.", |disk| Some(disk.poisoned.into())),
        ("journal_slots_used", "Slots of the live journal in use.", |disk| disk.gauges.journal_slots_used),
        ("journal_slots", "Slots of the live journal.", |disk| disk.gauges.journal_slots),
        ("dirty_bitmap_sectors", "Bitmap sectors with bits that are not in the file.", |disk| {
            Some(disk.gauges.dirty_bitmap_sectors)
        }),
        ("reserved_bytes", "Space for new blocks before the file has to grow.", |disk| disk.gauges.reserved_bytes),
        ("file_system_available_bytes", "Available space of the top's file system.", |disk| {
            disk.gauges.file_system_available_bytes
        }),
        ("stalled_writes", "Writes that wait for space on the file system.", |disk| Some(disk.gauges.stalled_writes)),
        ("merge_debt_bytes", "Bytes that the layers above the root allocate.", |disk| {
            Some(disk.gauges.merge_debt_bytes)
        }),
    ];
    for (suffix, help, field) in fields {
        let name = format!("diffdisk_{suffix}");
        text.metric(&name, "gauge", help);
        for (disk, statistics) in disks {
            if let Some(value) = field(statistics) {
                text.sample(&name, &[("disk", disk)], value);
            }
        }
    }
}

fn each_queue<'a>(disks: &[(&'a str, &'a DiskStatistics)]) -> impl Iterator<Item = (&'a str, &'a QueueStatistics)> {
    disks.iter().flat_map(|(disk, statistics)| statistics.queues.iter().map(|queue| (*disk, queue)))
}

#[expect(clippy::cast_precision_loss, reason = "53 bits are enough for a sum of durations")]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// The index of a queue as a label; empty for lanes that serve no queue.
struct QueueIndex(Option<u32>);

impl Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |index| write!(f, "{index}"))
    }
}

/// Text in the exposition format.
struct MetricText(String);

impl MetricText {
    /// Begins a metric. `kind` is counter, gauge or histogram. The help text has neither backslashes nor line feeds.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: impl Display) {
        self.push(format_args!("{name}{{"));
        for (n, (label, text)) in labels.iter().enumerate() {
            let comma = if n > 0 { "," } else { "" };
            self.push(format_args!("{comma}{label}=\"{}\"", escape(&text.to_string())));
        }
        self.push(format_args!("}} {value}\n"));
    }

    fn bucket(&mut self, name: &str, labels: &[Label<'_>; 2], bound: &dyn Display, below: u64) {
        self.sample(&format!("{name}_bucket"), &[labels[0], labels[1], ("le", bound)], below);
    }

    fn push(&mut self, text: fmt::Arguments<'_>) {
        self.0.write_fmt(text).expect("writing to a string cannot fail");
    }
}

/// Escapes a label's value.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::super::report::{KindStatistics, RequestStatistics};
    use super::*;
    use crate::disk::statistics::histogram::{Histogram, HistogramSnapshot};

    fn example() -> DiskStatistics {
        let histogram = Histogram::new();
        [(300, 2), (5_000, 3), (u64::from(u32::MAX) * 100, 1)].into_iter().for_each(|(t, n)| histogram.record(t, n));
        let mut latency = HistogramSnapshot::default();
        histogram.add_to(&mut latency);
        let read = KindStatistics { requests: 6, bytes: 24_576, errors: 1, latency };
        let requests = RequestStatistics { read, ..RequestStatistics::default() };
        let queue = |queue| QueueStatistics {
            queue,
            in_flight: 4,
            refused: 0,
            zero_filled_bytes: 512,
            requests: requests.clone(),
        };
        let layer = LayerStatistics {
            path: PathBuf::from("/disks/a \"b\"\\c\nd.vhd"),
            reads: 1,
            read_bytes: 4096,
            copies: 2,
            copied_bytes: 8192,
            writes: 0,
            written_bytes: 0,
            zeroed_bytes: 0,
            allocated_bytes: None,
            mapped_bytes: 0,
        };
        DiskStatistics {
            size_bytes: 1 << 30,
            full: true,
            total: queue(None),
            queues: vec![queue(Some(3))],
            layers: vec![layer],
            commits: 7,
            ..DiskStatistics::default()
        }
    }

    #[test]
    fn the_text_has_the_numbers_of_the_report() {
        let report = example();
        let text = prometheus_text(&[("a", &report), ("b", &report)]);
        for line in [
            "# TYPE diffdisk_requests_total counter",
            "diffdisk_requests_total{disk=\"a\",queue=\"3\",kind=\"read\"} 6",
            "diffdisk_request_errors_total{disk=\"b\",queue=\"3\",kind=\"read\"} 1",
            "diffdisk_requests_in_flight{disk=\"a\",queue=\"3\"} 4",
            "diffdisk_request_duration_seconds_bucket{disk=\"a\",kind=\"read\",le=\"0.000000512\"} 2",
            "diffdisk_request_duration_seconds_bucket{disk=\"a\",kind=\"read\",le=\"0.000008192\"} 5",
            "diffdisk_request_duration_seconds_bucket{disk=\"a\",kind=\"read\",le=\"34.359738368\"} 5",
            "diffdisk_request_duration_seconds_bucket{disk=\"a\",kind=\"read\",le=\"+Inf\"} 6",
            "diffdisk_request_duration_seconds_count{disk=\"a\",kind=\"read\"} 6",
            "diffdisk_request_duration_seconds_sum{disk=\"a\",kind=\"read\"} 429.4967451",
            "diffdisk_layer_copied_bytes_total{disk=\"a\",layer=\"/disks/a \\\"b\\\"\\\\c\\nd.vhd\"} 8192",
            "diffdisk_commits_total{disk=\"b\"} 7",
            "diffdisk_full{disk=\"b\"} 1",
            "diffdisk_depth{disk=\"a\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("allocated_bytes{") && !text.contains("journal_slots{"), "unknown values are omitted");
    }

    /// Checks what the format requires of every text: each metric is declared once, before its samples, which follow
    /// each other, and no sample occurs twice.
    #[test]
    fn the_text_follows_the_format() {
        let report = example();
        let text = prometheus_text(&[("a", &report), ("b", &report)]);
        let (mut declared, mut samples, mut current) = (BTreeSet::new(), BTreeSet::new(), "");
        for line in text.lines() {
            if let Some(metric) = line.strip_prefix("# TYPE ") {
                current = metric.split(' ').next().unwrap();
                assert!(declared.insert(current), "{current} is declared twice");
            } else if !line.starts_with("# HELP ") {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                let name = sample.split('{').next().unwrap();
                let suffix = name.strip_prefix(current).unwrap_or("?");
                assert!(["", "_bucket", "_sum", "_count"].contains(&suffix), "{line} after {current}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(samples.insert(sample), "{sample} occurs twice");
            }
        }
        assert!(declared.len() > 20 && text.ends_with('\n'));
    }
}
