//! The table and the JSON.

use serde_json::{Value, json};

use crate::bench::{Bench, Row};
use crate::course::{self, Course};

pub fn report(bench: &Bench, course: &Course) {
    table(bench);
    course.print(&bench.targets);
    course::write(
        &bench.folder.with_file_name("tools.json"),
        course.as_json(bench.pace.full, bench.pace.size, rows(bench), &bench.targets),
    );
}

fn table(bench: &Bench) {
    let mut last = "";
    for row in &bench.rows {
        if row.work != last {
            println!("\n{:<58}{:>9}{:>7}{:>9}{:>9}{:>9}", row.work, "seconds", "+-", "MiB/s", "CPU s", "MiB");
            last = &row.work;
        }
        let seconds = row.median(|r| r.seconds);
        let speed = (row.bytes > 0).then(|| format!("{:.0}", row.bytes as f64 / f64::from(1 << 20) / seconds));
        println!(
            "  {:<56}{seconds:>9.3}{:>6.0}%{:>9}{:>9.3}{:>9.1}",
            row.system,
            spread(row) * 100.0,
            speed.unwrap_or_default(),
            row.median(|r| r.cpu),
            row.median(|r| r.mebibytes),
        );
    }
}

/// Half the distance of the outermost runs, as a share of the median.
fn spread(row: &Row) -> f64 {
    let all = || row.runs.iter().map(|r| r.seconds);
    (all().fold(0.0, f64::max) - all().fold(f64::MAX, f64::min)) / 2.0 / row.median(|r| r.seconds)
}

fn rows(bench: &Bench) -> Vec<Value> {
    let rows = bench.rows.iter().map(|row| {
        let runs =
            row.runs.iter().map(|r| json!({ "seconds": r.seconds, "cpu_seconds": r.cpu, "peak_mib": r.mebibytes }));
        json!({ "work": row.work, "system": row.system, "bytes": row.bytes, "runs": runs.collect::<Vec<_>>() })
    });
    rows.collect()
}
