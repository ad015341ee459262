//! Output of `diffdisk ctl stats` for people: for each disk its requests by kind, queues, layers, and other numbers.
//! Members that are missing or of another type are no error, since the daemon may be of another version: for such a
//! member a placeholder, its value, or nothing is printed.

use std::io::{Result, Write};

use serde_json::Value;

use super::ctl_print::{plain, size, table};

/// Kinds of requests, as the daemon names them.
const KINDS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

/// Prints the result of `stats` in JSON.
pub(super) fn statistics(out: &mut dyn Write, result: &Value) -> Result<()> {
    for (n, disk) in items(&result["disks"]).enumerate() {
        if n > 0 {
            writeln!(out)?;
        }
        let front_end = if disk["front_end_connected"] == true { "connected" } else { "none" };
        let states = ["read_only", "full", "poisoned"].into_iter().filter(|state| disk[state] == true);
        let states: String = states.map(|state| format!(", {}", state.replace('_', "-"))).collect();
        writeln!(out, "{}: {}, front-end: {front_end}{states}", plain(&disk["disk"]), size(&disk["size_bytes"]))?;
        for part in [requests, queues, layers, others] {
            let rows = part(disk);
            if rows.len() > 1 {
                writeln!(out)?;
                table(out, &rows)?;
            }
        }
    }
    Ok(())
}

/// The sums over all queues, by kind. Times are in microseconds.
fn requests(disk: &Value) -> Vec<Vec<String>> {
    let mut rows = vec![row(["KIND", "REQUESTS", "MIB", "ERRORS", "P50 US", "P99 US", "P99.9 US"])];
    for kind in KINDS {
        let of_kind = &disk["total"]["requests"][kind];
        let time = |name: &str| of_kind["latency"][name].as_f64().map_or_else(|| "-".into(), |us| format!("{us:.1}"));
        if of_kind.is_object() {
            rows.push(vec![
                kind.replace('_', "-"),
                plain(&of_kind["requests"]),
                mib(&of_kind["bytes"]),
                plain(&of_kind["errors"]),
                time("p50_us"),
                time("p99_us"),
                time("p999_us"),
            ]);
        }
    }
    rows
}

fn queues(disk: &Value) -> Vec<Vec<String>> {
    let titles = ["QUEUE", "READS", "WRITES", "FLUSHES", "DISCARDS", "ZEROINGS", "IN FLIGHT", "REFUSED", "ZEROS MIB"];
    let mut rows = vec![row(titles)];
    for queue in items(&disk["queues"]) {
        let counts = KINDS.map(|kind| plain(&queue["requests"][kind]["requests"]));
        let rest = [plain(&queue["in_flight"]), plain(&queue["refused"]), mib(&queue["zero_filled_bytes"])];
        rows.push([plain(&queue["queue"])].into_iter().chain(counts).chain(rest).collect());
    }
    rows
}

/// The files, youngest first: operations and copies that found data in them, and their bytes.
fn layers(disk: &Value) -> Vec<Vec<String>> {
    let titles =
        ["LAYER", "READS", "MIB", "COPIES", "MIB", "WRITES", "MIB", "ZEROED MIB", "ALLOCATED", "MAPPED", "PATH"];
    let mut rows = vec![row(titles)];
    for (depth, layer) in items(&disk["layers"]).enumerate() {
        rows.push(vec![
            depth.to_string(),
            plain(&layer["reads"]),
            mib(&layer["read_bytes"]),
            plain(&layer["copies"]),
            mib(&layer["copied_bytes"]),
            plain(&layer["writes"]),
            mib(&layer["written_bytes"]),
            mib(&layer["zeroed_bytes"]),
            size(&layer["allocated_bytes"]),
            size(&layer["mapped_bytes"]),
            plain(&layer["path"]),
        ]);
    }
    rows
}

/// All numbers of the disk itself and all gauges, those of later versions included.
fn others(disk: &Value) -> Vec<Vec<String>> {
    let members = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let mut rows = vec![row(["OTHER", "VALUE"])];
    for (name, value) in members(disk).into_iter().chain(members(&disk["gauges"])) {
        if value.is_number() && name != "size_bytes" {
            let title = plain(&Value::String(name.trim_end_matches("_bytes").replace('_', " ")));
            rows.push(vec![title, if name.ends_with("_bytes") { size(&value) } else { plain(&value) }]);
        }
    }
    rows
}

fn row<const N: usize>(titles: [&str; N]) -> Vec<String> {
    titles.map(str::to_owned).into()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Formats a number of bytes as MiB.
#[expect(clippy::cast_precision_loss, reason = "one digit after the point is printed")]
fn mib(bytes: &Value) -> String {
    bytes.as_u64().map_or_else(|| "-".into(), |bytes| format!("{:.1}", bytes as f64 / f64::from(1 << 20)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed(result: &Value) -> String {
        let mut out = Vec::new();
        statistics(&mut out, result).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_report_is_printed_as_tables() {
        let latency = json!({"count": 3, "p50_us": 12.34, "p99_us": 800.0, "p999_us": null});
        let read = json!({"requests": 3, "bytes": 3 << 19, "errors": 0, "latency": latency});
        let disk = json!({
            "disk": "a\u{1b}", "size_bytes": 1 << 30, "front_end_connected": true, "full": true, "poisoned": false,
            "total": {"requests": {"read": read}},
            "layers": [{"path": "/a.vhd", "reads": 1, "copies": 2, "copied_bytes": 1 << 20, "allocated_bytes": null}],
            "commits": 4,
            "gauges": {"reserved_bytes": 4096, "journal_slots": null, "stalled_writes": 1},
        });
        let text = printed(&json!({"disks": [disk]}));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "a\\u{1b}: 1 GiB, front-end: connected, full");
        assert_eq!(lines[2], "KIND  REQUESTS  MIB  ERRORS  P50 US  P99 US  P99.9 US");
        assert_eq!(lines[3], "read  3         1.5  0       12.3    800.0   -");
        let layer = lines.iter().find(|line| line.ends_with("/a.vhd")).unwrap();
        assert_eq!(layer.split_whitespace().take(5).collect::<Vec<_>>(), ["0", "1", "-", "2", "1.0"]);
        for row in ["commits         4", "reserved        4 KiB", "stalled writes  1"] {
            assert!(lines.contains(&row), "{row} is missing in\n{text}");
        }
        assert!(!text.contains("QUEUE") && !text.contains("journal"), "{text}");
    }

    #[test]
    fn answers_of_other_versions_are_printed() {
        for odd in [json!(null), json!({"disks": 1}), json!({"disks": [3, {"layers": [1], "total": [], "gauges": 2}]})]
        {
            assert!(!printed(&odd).contains('\u{1b}'));
        }
    }
}
