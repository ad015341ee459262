//! The image tool beside `dd`, `cmp` and `qemu-img`: copying, comparing and folding dense disks, what a sparse disk and a
//! look at a deep chain cost.
//!
//! All files lie in one folder below `target/bench`, and those that are read are in memory before. What writes makes its
//! work durable: `dd` by `conv=fsync`, `qemu-img` by `-t writeback`. Before each run the file system is synced, so that
//! nobody pays for another. The contestants take turns; the table gives medians, and ratios are medians of the ratios of
//! neighbouring runs. `--full` takes longer; words pick parts. Results: `target/bench/tools.json`.
#![allow(clippy::cast_possible_truncation, reason = "a bench's small numbers")]
#![allow(missing_docs, unreachable_pub)] // nobody else sees it

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
