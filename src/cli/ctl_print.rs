//! Output of `diffdisk ctl` for people. Members that are missing or of another type are no error, since the daemon may
//! be of another version: for such a member a placeholder, its value, or nothing is printed.

use std::io::{Result, Write};

use serde_json::Value;

use super::print::escape_controls;
use super::size::human_size;

/// Prints the result of `version`.
pub(super) fn version(out: &mut dyn Write, result: &Value) -> Result<()> {
    let (program, version) = (plain(&result["program"]), plain(&result["version"]));
    writeln!(out, "{program} {version}, protocol {}", plain(&result["protocol"]))
}

/// Prints the result of `disks` as a table.
pub(super) fn disks(out: &mut dyn Write, result: &Value) -> Result<()> {
    let mut rows = vec![["NAME", "SIZE", "STATE", "FRONT-END", "QUEUES", "DEPTH", "PATH"].map(str::to_owned)];
    for disk in result.as_array().into_iter().flatten() {
        let depth = disk["chain"].as_array().map_or(0, Vec::len).to_string();
        let state = if disk["read_only"] == true { "read-only".into() } else { plain(&disk["state"]) };
        let name = plain(&disk["name"]);
        rows.push([
            name,
            size(&disk["size"]),
            state,
            front_end(disk),
            plain(&disk["queues"]),
            depth,
            plain(&disk["path"]),
        ]);
    }
    table(out, &rows)
}

/// Prints the result of `disk`.
pub(super) fn disk(out: &mut dyn Write, disk: &Value) -> Result<()> {
    let mut field = |name: &str, text: &str| writeln!(out, "{:<12} {text}", format!("{name}:"));
    field("name", &plain(&disk["name"]))?;
    field("size", &format!("{} ({} bytes)", size(&disk["size"]), plain(&disk["size"])))?;
    field("state", &plain(&disk["state"]))?;
    field("read-only", if disk["read_only"] == true { "yes" } else { "no" })?;
    field("front-end", &front_end(disk))?;
    field("socket", &plain(&disk["socket"]))?;
    field("queues", &format!("{} of {}", plain(&disk["queues"]), plain(&disk["queue_size"])))?;
    field("serial", &plain(&disk["serial"]))?;
    field("cache", &plain(&disk["cache"]))?;
    field("engine", &plain(&disk["engine"]))?;
    let mut rows = vec![["DEPTH", "ALLOCATED", "UUID", "PATH"].map(str::to_owned)];
    for (depth, layer) in disk["chain"].as_array().into_iter().flatten().enumerate() {
        rows.push([depth.to_string(), size(&layer["allocated"]), plain(&layer["uuid"]), plain(&layer["path"])]);
    }
    table(out, &rows)
}

/// Prints the result of `resize` on one line.
pub(super) fn resized(out: &mut dyn Write, disk: &str, result: &Value) -> Result<()> {
    let told = match result["front_end_told"] == true {
        true => "the front-end was told",
        false if result["pause_us"] == 0 => "the disk has this size already",
        false => {
            "the front-end was not told: tell the guest by device-sync-config (QEMU) or PATCH /drives (Firecracker), or \
             restart it"
        }
    };
    let (name, size) = (escape_controls(disk), size(&result["size"]));
    let pause = result["pause_us"].as_u64().map_or_else(|| "-".into(), |us| format!("{}.{:03}", us / 1000, us % 1000));
    writeln!(out, "{name}: {size} ({} bytes); writes waited for {pause} ms; {told}", plain(&result["size"]))
}

/// Prints a text that the daemon has formatted.
pub(super) fn text(out: &mut dyn Write, result: &Value) -> Result<()> {
    let lines = result.as_str().unwrap_or_default().lines();
    lines.into_iter().try_for_each(|line| writeln!(out, "{}", escape_controls(line)))
}

/// Returns the result of `snapshot` as one line.
pub(super) fn snapshot(result: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let kept = |member: &Value| format!("of {} kept as {}", text(&member["disk"]), text(&member["kept"]));
    let members: Vec<String> = result["members"].as_array().into_iter().flatten().map(kept).collect();
    let (pause, flush) = (milliseconds(&result["pause_us"]), milliseconds(&result["held_flush_us"]));
    format!("snapshot {}; writes waited {pause}, flushes at most {flush}", members.join(", "))
}

/// Formats a number of microseconds in milliseconds, rounded up to a tenth.
fn milliseconds(micros: &Value) -> String {
    let tenths = |micros: u64| micros.div_ceil(100);
    micros.as_u64().map(tenths).map_or_else(|| "-".into(), |tenths| format!("{}.{} ms", tenths / 10, tenths % 10))
}

/// Prints an event on one line: its time, kind and disk, then its other members.
pub(super) fn event(out: &mut dyn Write, event: &Value) -> Result<()> {
    write!(out, "{} {}", plain(&event["time"]), plain(&event["kind"]))?;
    if let Some(disk) = event.get("disk") {
        write!(out, " {}", plain(disk))?;
    }
    for (name, value) in event.as_object().into_iter().flatten() {
        if !["seq", "time", "kind", "disk"].contains(&name.as_str()) && !value.is_null() {
            write!(out, " {}={}", escape_controls(name), plain(value))?;
        }
    }
    writeln!(out)
}

/// Prints rows with aligned columns. The last column may be of any width.
pub(super) fn table(out: &mut dyn Write, rows: &[impl AsRef<[String]>]) -> Result<()> {
    let width =
        |column: usize| rows.iter().filter_map(|row| row.as_ref().get(column)).map(|cell| cell.chars().count()).max();
    for row in rows {
        let cells = row.as_ref().iter().enumerate();
        let line: Vec<String> =
            cells.map(|(column, cell)| format!("{cell:<width$}", width = width(column).unwrap_or(0))).collect();
        writeln!(out, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

fn front_end(disk: &Value) -> String {
    match (&disk["front_end"]["connected"], &disk["front_end"]["pid"]) {
        (Value::Bool(true), Value::Number(pid)) => format!("process {pid}"),
        (Value::Bool(true), _) => "connected".into(),
        _ => "none".into(),
    }
}

pub(super) fn size(bytes: &Value) -> String {
    bytes.as_u64().map_or_else(|| "-".into(), human_size)
}

/// Formats a value without quotes and with control characters escaped.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => escape_controls(text).into_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed(print: impl FnOnce(&mut dyn Write) -> Result<()>) -> String {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn events_are_one_line_each() {
        let front_end =
            json!({"seq": 3, "time": "T", "kind": "front_end", "disk": "a\n", "connected": true, "pid": null});
        assert_eq!(printed(|out| event(out, &front_end)), "T front_end a\\n connected=true\n");
        assert_eq!(printed(|out| event(out, &json!({"time": "T", "kind": "lost", "lost": 7}))), "T lost lost=7\n");
    }

    #[test]
    fn a_snapshot_is_one_line() {
        let of = |disk: &str| json!({"disk": disk, "kept": format!("/x/{disk}.vhd"), "uuid": "7"});
        let mut result = json!({"pause_us": 312, "held_flush_us": 13_100, "members": [of("a")]});
        let line = "snapshot of a kept as /x/a.vhd; writes waited 0.4 ms, flushes at most 13.1 ms";
        assert_eq!(snapshot(&result), line);
        result["members"] = json!([of("a"), of("b")]);
        assert!(snapshot(&result).starts_with("snapshot of a kept as /x/a.vhd, of b kept as /x/b.vhd; writes"));
        assert_eq!(snapshot(&json!({})), "snapshot ; writes waited -, flushes at most -");
    }

    #[test]
    fn answers_of_other_versions_are_printed() {
        for odd in [json!(null), json!([1, {"chain": 3}]), json!({"disks": [{"counters": {"x": 1}}], "chain": [1]})] {
            for print in [version, disks, disk, text, event, |out: &mut dyn Write, odd: &Value| resized(out, "a", odd)]
            {
                assert!(!printed(|out| print(out, &odd)).contains('\u{1b}'));
            }
        }
    }
}
