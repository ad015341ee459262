//! Output of the results: a table, JSON and plots.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::compare::{Bench, QUEUE_DEPTHS};
use crate::harness::{self, RunReport};
use crate::plot::{Bar, Line, bars, lines};

pub fn report(bench: &Bench, run: &RunReport) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target folder").join("bench");
    fs::create_dir_all(&folder).expect("the target folder can be written");
    table(bench);
    run.print(&bench.results.targets);
    harness::write(
        &folder.join("serve.json"),
        run.as_json(bench.pace.full, bench.pace.size, rows(bench), &bench.results.targets),
    );
    for (name, text) in charts(bench) {
        harness::write(&folder.join(name), text);
    }
}

fn table(bench: &Bench) {
    let mut last = "";
    for row in &bench.results.rows {
        if row.load != last {
            println!("\n{:<46}{:>10}{:>7}{:>10}{:>10}{:>10}", row.load, "a second", "+-", "p50 us", "p99 us", "CPU us");
            last = &row.load;
        }
        let cpu = if row.load.contains("exec") {
            format!("{:.1} MiB", row.median(|s| s.cpu) / 1024.0)
        } else {
            format!("{:.2}", row.median(|s| s.cpu))
        };
        println!(
            "  {:<44}{:>10.0}{:>6.0}%{:>10.1}{:>10.1}{:>10}",
            row.system,
            row.median(|s| s.iops),
            row.spread(|s| s.iops) * 100.0,
            row.median(|s| s.p50),
            row.median(|s| s.p99),
            cpu,
        );
    }
}

fn rows(bench: &Bench) -> Vec<Value> {
    let rows = bench.results.rows.iter().map(|row| {
        let samples = row.samples.iter().map(|s| {
            json!({ "iops": s.iops, "requests": s.count, "mean_us": s.mean, "p50_us": s.p50, "p99_us": s.p99,
                    "server_cpu_us": s.cpu })
        });
        json!({ "load": row.load, "system": row.system, "samples": samples.collect::<Vec<_>>() })
    });
    rows.collect()
}

fn charts(bench: &Bench) -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    let reads: Vec<_> = bench.results.rows.iter().filter(|r| r.load == "rand read 4 KiB, qd 32").collect();
    if !reads.is_empty() {
        let of = |name: &str| {
            let point = |depth: f64| {
                let row = reads.iter().find(|r| r.system == format!("{name}, {depth} layers"))?;
                Some((depth, row.median(|s| s.iops)))
            };
            Line { name: name.to_owned(), points: [1.0, 4.0, 16.0, 64.0].into_iter().filter_map(point).collect() }
        };
        let mut both = vec![of("diffdiskd"), of("QSD qcow2")];
        if let Some(raw) = reads.iter().find(|r| r.system == "QSD raw") {
            let iops = raw.median(|s| s.iops);
            both.push(Line { name: "QSD raw (flat)".into(), points: vec![(1.0, iops), (64.0, iops)] });
        }
        let title = "Random reads of 4 KiB, 32 in flight: reads a second by layers of the chain";
        all.push(("depth.svg", lines(title, "layers", &both)));
        let bar = |of: fn(&crate::sample::Sample) -> f64| {
            reads.iter().map(|r| Bar { name: r.system.clone(), value: r.median(of) }).collect::<Vec<_>>()
        };
        all.push(("iops.svg", bars("Random reads of 4 KiB, 32 in flight: reads a second", &bar(|s| s.iops))));
        all.push(("cpu.svg", bars("The same: microseconds of the server's processor a read", &bar(|s| s.cpu))));
    }
    let by_depth = |system: &str| {
        let point = |depth: &usize| {
            let name = format!("rand read 4 KiB, by depth, qd {depth}");
            let row = bench.results.rows.iter().find(|r| r.load == name && r.system == system)?;
            Some((*depth as f64, row.median(|s| s.p50)))
        };
        Line { name: system.to_owned(), points: QUEUE_DEPTHS.iter().filter_map(point).collect() }
    };
    let latency = ["diffdiskd, 16 layers", "QSD qcow2, 16 layers", "QSD raw"].map(by_depth);
    if !latency[0].points.is_empty() {
        let title = "Random reads of 4 KiB: median latency in microseconds by requests in flight";
        all.push(("latency.svg", lines(title, "requests in flight", &latency)));
    }
    all
}
