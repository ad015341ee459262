//! The image tool compared with `dd`, `cmp` and `qemu-img`: copying, comparing and merging dense disks, and the cost of
//! a sparse disk and of inspecting a deep chain.
//!
//! All files are in one folder below `target/bench`, and dense source files are in the page cache before a run. Every
//! writer makes its output durable: `dd` with `conv=fsync`, `qemu-img` with `-t writeback`. The file system is synced
//! before each run, so that no run includes the writeback of another. The programs run in rounds. The table shows
//! medians. Ratios are medians of the ratios of two runs in the same round. `--full` uses more rounds and more data.
//! Arguments without `--` select parts. The results are written to `target/bench/tools.json`.
#![allow(clippy::cast_possible_truncation, reason = "a bench's small numbers")]
#![allow(missing_docs, unreachable_pub)] // no other crate uses it

mod bench;
mod dense;
mod disks;
#[path = "../harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "a part of it is used here")]
mod harness;
mod inspect;
mod layer;
mod report;
mod run;

use bench::Bench;
use harness::{Pace, Section};

fn main() {
    let full = harness::is_full();
    let pace = if full { Pace { rounds: 5, size: 1 << 30, full } } else { Pace { rounds: 3, size: 512 << 20, full } };
    let mut bench = Bench::new(pace);
    let parts: &[Section<Bench>] = &[
        ("convert", dense::convert),
        ("chain", dense::chain),
        ("merge", dense::merge),
        ("flatten", dense::flatten),
        ("compare", dense::compare),
        ("sparse", inspect::sparse),
        ("look", inspect::deep),
    ];
    let run = harness::run(&mut bench, parts);
    report::report(&bench, &run);
}
