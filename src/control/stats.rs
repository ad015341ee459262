//! The method `stats`: the statistics of the disks as JSON, or as text in Prometheus' format.
//!
//! The numbers are those of [`DiskStatistics`]; this file only adds what the server of a disk reports. The schema is
//! derived from examples of the report, so a new number needs no change here.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::registry::ServedDisk;
use super::schema::{self, array, object, text};
use crate::disk::statistics::{DiskStatistics, prometheus_gauge, prometheus_text};

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

/// The statistics of a disk, as clients receive them.
#[derive(Serialize)]
struct NamedStatistics<'a> {
    /// Name of the disk.
    disk: &'a str,
    front_end_connected: bool,
    #[serde(flatten)]
    statistics: DiskStatistics,
}

/// Returns the statistics of the disks. Waits for the file systems of their files.
pub(super) fn collect(disks: &[Arc<ServedDisk>], format: StatsFormat) -> Value {
    let reports: Vec<NamedStatistics<'_>> = disks
        .iter()
        .map(|served| NamedStatistics {
            disk: &served.name,
            front_end_connected: served.server.front_end().is_some(),
            statistics: served.disk.statistics(),
        })
        .collect();
    match format {
        StatsFormat::Json => json!({"disks": reports}),
        StatsFormat::Prometheus => prometheus(&reports).into(),
    }
}

fn prometheus(reports: &[NamedStatistics<'_>]) -> String {
    let statistics: Vec<_> = reports.iter().map(|report| (report.disk, &report.statistics)).collect();
    let connected: Vec<_> = reports.iter().map(|report| (report.disk, report.front_end_connected.into())).collect();
    let help = "1 if a front-end is connected.";
    prometheus_text(&statistics) + &prometheus_gauge("diffdisk_front_end_connected", help, &connected)
}

pub(super) fn params_schema() -> Value {
    object(&[], &[("disk", text()), ("format", json!({"enum": ["json", "prometheus"]}))])
}

pub(super) fn result_schema() -> Value {
    let examples = DiskStatistics::examples().map(|statistics| {
        let example = NamedStatistics { disk: "", front_end_connected: false, statistics };
        serde_json::to_value(example).expect("names and numbers can be JSON")
    });
    let disk = schema::of_examples(&examples.iter().collect::<Vec<_>>());
    json!({"oneOf": [object(&[("disks", array(disk))], &[]), text()]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_has_all_numbers_and_what_may_be_missing() {
        let schema = result_schema();
        let disk = &schema["oneOf"][0]["properties"]["disks"]["items"];
        let members = &disk["properties"];
        let (gauges, queue) = (&members["gauges"]["properties"], &members["queues"]["items"]["properties"]);
        assert_eq!(gauges["reserved_bytes"]["type"], json!(["integer", "null"]));
        assert_eq!(gauges["stalled_writes"], json!({"type": "integer", "minimum": 0}));
        assert_eq!(queue["queue"]["type"], json!(["integer", "null"]));
        let latency = &queue["requests"]["properties"]["write_zeroes"]["properties"]["latency"]["properties"];
        assert_eq!(latency["p999_us"]["type"], json!(["number", "null"]));
        assert_eq!(latency["steps"]["items"]["items"]["type"], "number");
        assert_eq!(members["layers"]["items"]["properties"]["path"]["type"], "string");
    }
}
