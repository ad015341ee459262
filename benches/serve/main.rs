//! The daemon under load, beside qemu-storage-daemon in the same run.
//!
//! Each comparison starts all its servers, then loads them in turn, over and over, so that whatever the machine does
//! besides hits all of them; the guest (see [`load`]) and the server have a processor each. The table gives medians;
//! ratios are medians of the ratios of neighbouring runs. `--full` takes longer and more often; words pick comparisons; `--disks`
//! only makes the chains.
//! Results: `target/bench/serve.json`, and drawings beside it.
#![allow(clippy::cast_possible_truncation, reason = "a bench's small numbers")]
#![allow(missing_docs, unreachable_pub)] // nobody else sees it

mod barriers;
mod baseline_mapped;
mod baseline_reads;
mod baseline_wakeup;
mod baseline_writes;
mod cold;
mod compare;
mod course;
mod disks;
mod load;
mod plot;
mod report;
mod sample;
mod server;
mod space;
mod start;
mod target;

use std::time::Duration;

use compare::Bench;
use course::Part;
use disks::Format;

/// How long and how often.
#[derive(Clone, Copy)]
pub struct Pace {
    /// A run whose end is a time.
    pub time: Duration,
    /// Runs of each contestant.
    pub rounds: usize,
    /// Bytes of data.
    pub size: u64,
    pub full: bool,
}

impl Pace {
    /// Writes into a fresh overlay: two for each of qcow2's clusters, whatever the size. The first has to allocate the cluster; with
    /// many more the overlay is not fresh.
    pub fn writes(&self) -> u64 {
        self.size / disks::CHUNK * 2
    }
}

fn main() {
    let full = course::is_full();
    let pace = if full {
        Pace { time: Duration::from_secs(2), rounds: 7, size: 1 << 30, full }
    } else {
        Pace { time: Duration::from_millis(300), rounds: 3, size: 512 << 20, full }
    };
    let mut bench = Bench::new(pace);
    if std::env::args().any(|a| a == "--disks") {
        // For fio in the guest: the chains, and where they are.
        for format in [Format::Vhd, Format::Qcow2] {
            bench.disks.striped_chain(format, 16);
        }
        let raw = bench.disks.striped_chain(Format::Raw, 1);
        return println!("{}", raw.parent().expect("it is in a folder").display());
    }
    server::pin_this_thread(server::processors() - 1);
    let parts: &[Part<Bench>] = &[
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
    let course = course::run(&mut bench, parts);
    report::report(&bench, &course);
}
