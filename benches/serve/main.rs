//! The daemon under load, compared with qemu-storage-daemon in the same run.
//!
//! Each comparison loads its servers in rounds, so that other load of the machine affects all servers. Most comparisons
//! start all servers before the first round; the others start a server for each round or run. The guest ([`load`]) and
//! the server have a processor each, except in the comparison of two queues. The table shows medians. Ratios are
//! medians of the ratios of two runs in the same round. `--full` measures longer and more often. Arguments without `--`
//! select comparisons. `--disks` only creates the chains. The results are written to `target/bench/serve.json`, with
//! plots in the same folder.
#![allow(clippy::cast_possible_truncation, reason = "a bench's small numbers")]
#![allow(missing_docs, unreachable_pub)] // no other crate uses it

mod barriers;
mod baseline_mapped;
mod baseline_reads;
mod baseline_wakeup;
mod baseline_writes;
mod cold;
mod compare;
mod disks;
#[path = "../harness/mod.rs"]
mod harness;
mod load;
mod plot;
mod processors;
mod report;
mod sample;
mod server;
mod space;
mod start;

use std::time::Duration;

use compare::Bench;
use disks::Format;
use harness::{Pace, Section};

fn main() {
    let full = harness::is_full();
    let (pace, time) = if full {
        (Pace { rounds: 7, size: 1 << 30, full }, Duration::from_secs(2))
    } else {
        (Pace { rounds: 3, size: 512 << 20, full }, Duration::from_millis(300))
    };
    let mut bench = Bench::new(pace, time);
    if std::env::args().any(|a| a == "--disks") {
        // `benches/fio` uses these chains and reads their paths from the output.
        for format in [Format::Vhd, Format::Qcow2] {
            bench.disks.striped_chain(format, 16);
        }
        let raw = bench.disks.striped_chain(Format::Raw, 1);
        return println!("{}", raw.parent().expect("it is in a folder").display());
    }
    processors::pin_this_thread(processors::processors() - 1);
    let parts: &[Section<Bench>] = &[
        ("read", compare::random_reads),
        ("latency", compare::latency),
        ("depth", compare::queue_depths),
        ("fresh", compare::fresh_writes),
        ("flush", compare::flushed_writes),
        ("write", compare::allocated_writes),
        ("seq", compare::sequential),
        ("cold", cold::cold),
        ("queues", compare::two_queues),
        ("start", start::start),
        ("barriers", barriers::barriers),
        ("space", space::space),
        ("allocation", space::allocation),
    ];
    let run = harness::run(&mut bench, parts);
    report::report(&bench, &run);
}
