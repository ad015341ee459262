//! Output of the results: a table and JSON.

use serde_json::{Value, json};

use crate::bench::Bench;
use crate::harness::{self, RunReport};

pub fn report(bench: &Bench, run: &RunReport) {
    table(bench);
    run.print(&bench.results.targets);
    harness::write(
        &bench.folder.with_file_name("tools.json"),
        run.as_json(bench.pace.full, bench.pace.size, rows(bench), &bench.results.targets),
    );
}

fn table(bench: &Bench) {
    let mut last = "";
    for row in &bench.results.rows {
        if row.load != last {
            println!("\n{:<58}{:>9}{:>7}{:>9}{:>9}{:>9}", row.load, "seconds", "+-", "MiB/s", "CPU s", "MiB");
            last = &row.load;
        }
        let seconds = row.median(|r| r.seconds);
        let bytes = row.samples[0].bytes;
        let speed = (bytes > 0).then(|| format!("{:.0}", bytes as f64 / f64::from(1 << 20) / seconds));
        println!(
            "  {:<56}{seconds:>9.3}{:>6.0}%{:>9}{:>9.3}{:>9.1}",
            row.system,
            row.spread(|r| r.seconds) * 100.0,
            speed.unwrap_or_default(),
            row.median(|r| r.cpu),
            row.median(|r| r.mebibytes),
        );
    }
}

fn rows(bench: &Bench) -> Vec<Value> {
    let rows = bench.results.rows.iter().map(|row| {
        let runs =
            row.samples.iter().map(|r| json!({ "seconds": r.seconds, "cpu_seconds": r.cpu, "peak_mib": r.mebibytes }));
        json!({ "work": row.load, "system": row.system, "bytes": row.samples[0].bytes, "runs": runs.collect::<Vec<_>>() })
    });
    rows.collect()
}
