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
#[path = "../serve/course.rs"]
mod course;
mod dense;
mod disks;
mod inspect;
mod layer;
mod report;
mod run;
#[path = "../serve/sample.rs"]
#[allow(dead_code, reason = "of it only the median is used here")]
mod sample;
#[path = "../serve/target.rs"]
#[allow(dead_code, reason = "no bound is exact here")]
mod target;

use bench::Bench;
use course::Part;

/// How long and how often.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Runs of each contestant.
    pub rounds: usize,
    /// Bytes of a dense disk.
    pub size: u64,
    pub full: bool,
}

fn main() {
    let full = course::is_full();
    let pace = if full { Pace { rounds: 5, size: 1 << 30, full } } else { Pace { rounds: 3, size: 512 << 20, full } };
    let mut bench = Bench::new(pace);
    let parts: &[Part<Bench>] = &[
        ("convert", dense::convert),
        ("chain", dense::chain),
        ("merge", dense::merge),
        ("flatten", dense::flatten),
        ("compare", dense::compare),
        ("sparse", inspect::sparse),
        ("look", inspect::deep),
    ];
    let course = course::run(&mut bench, parts);
    report::report(&bench, &course);
}
