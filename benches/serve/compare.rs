//! The comparisons: the servers, the loads, and the targets.

use std::path::Path;
use std::time::Duration;

use crate::baseline_mapped;
use crate::baseline_reads;
use crate::baseline_wakeup;
use crate::baseline_writes;
use crate::disks::{self, Disks, Format, ReadOrder};
use crate::harness::{self, Bound, Pace, Results};
use crate::load::{Guest, Load, Order, Until};
use crate::processors::processors;
use crate::sample::Sample;
use crate::server::{Kind, Server};

/// A system that takes part in a comparison of servers.
pub type Candidate<'a> = harness::Candidate<'a, Sample>;

/// The disks to serve, and all measurements.
pub struct Bench {
    pub pace: Pace,
    /// Duration of a run that ends after a time.
    pub time: Duration,
    pub disks: Disks,
    pub results: Results<Sample>,
}

/// Starts a server that runs for the whole comparison. Returns the candidate that measures this server.
fn served<'a>(system: &str, kind: &Kind, image: &Path, load: Load) -> Candidate<'a> {
    let server = Server::start(kind, image);
    let mut guest = server.connect(1);
    Candidate::new(system, move || measure(&server, &mut guest, &load))
}

/// Measures one run, with the processor time of the server. If the load reads, the data is read once before the
/// measurement, because the kernel may have reclaimed pages of the page cache.
pub fn measure(server: &Server, guest: &mut Guest, load: &Load) -> Sample {
    if !load.write {
        guest.warm(load.region).unwrap_or_else(|e| panic!("a request failed: {e}"));
    }
    let before = server.processor_time();
    let mut sample = guest.run(load).unwrap_or_else(|e| panic!("a request failed: {e}"));
    let used = server.processor_time().saturating_sub(before);
    sample.cpu = used.as_secs_f64() * 1e6 / sample.count.max(1) as f64;
    sample
}

impl Bench {
    pub fn new(pace: Pace, time: Duration) -> Bench {
        Bench { pace, time, disks: Disks::new(pace.size), results: Results::default() }
    }

    /// Runs each candidate once without recording the result, then measures all candidates in rounds.
    pub fn compare(&mut self, load: &str, mut candidates: Vec<Candidate<'_>>) {
        for candidate in &mut candidates {
            candidate.measure();
        }
        self.results.compare(load, self.pace.rounds, candidates);
    }

    /// Returns the number of writes into a fresh overlay: two per cluster of qcow2, for any size of the data. The first
    /// write to a cluster allocates the cluster. With many more writes, most of them would be overwrites.
    pub fn writes(&self) -> u64 {
        self.pace.size / disks::CHUNK * 2
    }

    fn require_iops(&mut self, load: &str, a: &str, b: &str, least: f64) {
        let ratio = self.results.ratio(load, a, b, |s| s.iops);
        self.results.target(format!("{load}: {a} / {b}"), ratio, Bound::AtLeast(least));
    }

    fn random_read(&self) -> Load {
        Load::random_read(self.disks.size, self.time)
    }
}

const OURS_16: &str = "diffdiskd, 16 layers";
const QCOW2_16: &str = "QSD qcow2, 16 layers";
const READ: &str = "rand read 4 KiB, qd 32";

/// Measures random reads at queue depth 32, by depth of the chain. In each round the files are read into the page cache
/// again, and new servers are started.
pub fn random_reads(bench: &mut Bench) {
    for round in 0..bench.pace.rounds {
        bench.disks.invalidate_cache(ReadOrder::Interleaved);
        let files = [1, 16, 64].map(|layers| bench.disks.files(Format::Vhd, layers));
        let raw = bench.disks.striped_chain(Format::Raw, 1);
        let (size, time) = (bench.disks.size, bench.time);
        let mut all = read_servers(bench);
        for files in &files {
            let name = format!("mapped copies of {} files, no server", files.len());
            all.push(Candidate::new(&name, move || baseline_mapped::copies(files, time)));
        }
        all.push(Candidate::new("io_uring, no server", || baseline_reads::io_uring(&raw, size, time, false)));
        all.push(Candidate::new("io_uring, no server, deferred", || baseline_reads::io_uring(&raw, size, time, true)));
        all.push(Candidate::new("preadv, no server", || baseline_reads::preadv(&raw, size, time)));
        all.push(Candidate::new("preadv of 16 files, no server", || baseline_reads::preadv_chain(&files[1], time)));
        all.push(Candidate::new("preadv for a sleeping consumer, no server", || {
            baseline_wakeup::eventfd_reader(&raw, size, time)
        }));
        for candidate in &mut all {
            candidate.measure();
        }
        bench.results.round(READ, round, &mut all);
    }
    bench.disks.invalidate_cache(ReadOrder::Sequential);
    bench.require_iops(READ, OURS_16, QCOW2_16, 4.0);
    bench.require_iops(READ, OURS_16, "QSD raw", 2.0);
    bench.require_iops(READ, OURS_16, "diffdiskd, 1 layers", 0.95);
    bench.require_iops(READ, "diffdiskd, 64 layers", "diffdiskd, 1 layers", 0.95);
    for bare in ["io_uring, no server", "preadv, no server"] {
        let ratio = bench.results.ratio(READ, OURS_16, bare, |s| s.cpu);
        bench.results.target(
            format!("{READ}: server CPU a read, diffdiskd, 16 layers / {bare}"),
            ratio,
            Bound::AtMost(1.5),
        );
    }
}

fn read_servers<'a>(bench: &Bench) -> Vec<Candidate<'a>> {
    let (load, disks) = (bench.random_read(), &bench.disks);
    let mut all = Vec::new();
    for layers in [1, 4, 16, 64] {
        let image = disks.striped_chain(Format::Vhd, layers);
        all.push(served(&format!("diffdiskd, {layers} layers"), &Kind::ours(), &image, load));
    }
    all.push(served("diffdiskd, 1 layers, large folios", &Kind::ours(), &disks.in_large_folios(), load));
    for layers in [1, 4, 16] {
        let image = disks.striped_chain(Format::Qcow2, layers);
        all.push(served(&format!("QSD qcow2, {layers} layers"), &Kind::Qemu("qcow2"), &image, load));
    }
    let (raw, vpc) = (disks.striped_chain(Format::Raw, 1), disks.striped_chain(Format::Vpc, 1));
    all.push(served("QSD raw", &Kind::Qemu("raw"), &raw, load));
    all.push(served("QSD vpc", &Kind::Qemu("vpc"), &vpc, load));
    all
}

/// Measures latencies with one request in flight. In the first comparison the guest sleeps between requests. In the
/// second, the guest and `diffdiskd` poll.
pub fn latency(bench: &mut Bench) {
    let (vhd, raw) = (bench.disks.striped_chain(Format::Vhd, 16), bench.disks.striped_chain(Format::Raw, 1));
    for (name, poll, extra, most) in [
        ("rand read 4 KiB, qd 1, event", false, vec![], 0.6),
        ("rand read 4 KiB, qd 1, polling", true, vec!["--poll-us=1000"], 0.35),
    ] {
        let load = Load { depth: 1, poll, ..bench.random_read() };
        let mut all = vec![
            served(OURS_16, &Kind::Ours(extra.clone()), &vhd, load),
            served("QSD raw", &Kind::Qemu("raw"), &raw, load),
        ];
        if poll {
            // Two polling servers would compete for the processor, so each run starts its own server.
            all.clear();
            let (vhd, raw) = (&vhd, &raw);
            let alone = move |kind: Kind, image: &Path| {
                let server = Server::start(&kind, image);
                let mut guest = server.connect(1);
                measure(&server, &mut guest, &load)
            };
            all.push(Candidate::new(OURS_16, move || alone(Kind::Ours(extra.clone()), vhd)));
            all.push(Candidate::new("QSD raw", move || alone(Kind::Qemu("raw"), raw)));
            let (size, time) = (load.region, bench.time);
            all.push(Candidate::new("preadv for a polling consumer, no server", move || {
                baseline_wakeup::polling_reader(raw, size, time)
            }));
        }
        bench.compare(name, all);
        let ratio = bench.results.ratio(name, OURS_16, "QSD raw", |s| s.p50);
        bench.results.target(
            format!("{name}: median latency, diffdiskd, 16 layers / QSD raw"),
            ratio,
            Bound::AtMost(most),
        );
    }
}

/// Queue depths in the plot of latencies.
pub const QUEUE_DEPTHS: [usize; 6] = [1, 2, 4, 8, 16, 64];

/// Measures the latency by queue depth.
pub fn queue_depths(bench: &mut Bench) {
    let images = [Format::Vhd, Format::Qcow2].map(|f| bench.disks.striped_chain(f, 16));
    let raw = bench.disks.striped_chain(Format::Raw, 1);
    for depth in QUEUE_DEPTHS {
        let load = Load { depth, ..bench.random_read() };
        let all = vec![
            served(OURS_16, &Kind::ours(), &images[0], load),
            served(QCOW2_16, &Kind::Qemu("qcow2"), &images[1], load),
            served("QSD raw", &Kind::Qemu("raw"), &raw, load),
        ];
        bench.compare(&format!("rand read 4 KiB, by depth, qd {depth}"), all);
    }
}

const OURS: &str = "diffdiskd, fresh child";
const FRESH: &str = "QSD qcow2, fresh overlay";
/// Name of the candidate that writes without a server, which is the upper limit of the speed.
const BARE: &str = "pwrite, no server";
const EXTENDED: &str = "QSD qcow2, fresh overlay, extended_l2";

fn fresh(bench: &mut Bench, name: &str, load: Load) {
    // The server is killed and the image removed at the end, so that writeback does not slow down the next candidate.
    let once = |disks: &Disks, format: Format, options: &[&str]| {
        let image = disks.fresh_child(format, options);
        let server = Server::start(&format.server(), &image);
        let mut guest = server.connect(1);
        let sample = measure(&server, &mut guest, &load);
        drop((guest, server));
        disks::remove_and_wait(&image);
        sample
    };
    let disks = Disks::new(bench.disks.size);
    let all = vec![
        Candidate::new(OURS, || once(&disks, Format::Vhd, &[])),
        Candidate::new(FRESH, || once(&disks, Format::Qcow2, &[])),
        Candidate::new(EXTENDED, || once(&disks, Format::Qcow2, &["extended_l2=on"])),
        Candidate::new(BARE, || baseline_writes::fresh(&disks.scratch(), &load)),
    ];
    bench.compare(name, all);
}

/// Measures small random writes, and sequential writes of 1 MiB, into an empty overlay.
pub fn fresh_writes(bench: &mut Bench) {
    let name = "rand write 4 KiB, qd 32, fresh";
    let load = Load { write: true, order: Order::Shuffled, until: Until::Count(bench.writes()), ..bench.random_read() };
    fresh(bench, name, load);
    bench.require_iops(name, OURS, FRESH, 5.0);
    bench.require_iops(name, OURS, EXTENDED, 1.3);
    let name = "seq write 1 MiB, qd 4, fresh";
    let count = bench.disks.size >> 20;
    let load = Load { block: 1 << 20, depth: 4, order: Order::Sequential, until: Until::Count(count), ..load };
    fresh(bench, name, load);
    bench.require_iops(name, OURS, FRESH, 1.0);
}

/// Measures small writes into an empty overlay, with a flush after every 32 writes.
pub fn flushed_writes(bench: &mut Bench) {
    let name = "rand write 4 KiB, qd 32, flush every 32, fresh";
    let load = Load {
        write: true,
        order: Order::Shuffled,
        flush_every: Some(32),
        until: Until::Count(bench.writes() / 4),
        ..bench.random_read()
    };
    fresh(bench, name, load);
    bench.require_iops(name, OURS, FRESH, 2.0);
    bench.require_iops(name, OURS, EXTENDED, 1.2);
}

/// Measures small writes into allocated blocks.
pub fn allocated_writes(bench: &mut Bench) {
    let name = "rand write 4 KiB, qd 32, allocated";
    let load = Load { write: true, ..bench.random_read() };
    written(bench, name, load, &[Format::Vhd, Format::Raw, Format::Qcow2, Format::Vpc]);
    bench.require_iops(name, "diffdiskd", "QSD raw", 1.5);
    bench.require_iops(name, "diffdiskd", "QSD vpc", 20.0);
}

fn written(bench: &mut Bench, name: &str, load: Load, formats: &[Format]) {
    let all = formats.iter().map(|&format| {
        let image = bench.disks.writable(format);
        served(label(format), &format.server(), &image, load)
    });
    let mut all: Vec<_> = all.collect();
    if load.order == Order::Sequential {
        let (scratch, time) = (bench.disks.scratch(), bench.time);
        all.push(Candidate::new(BARE, move || baseline_writes::over(&scratch, &load, time)));
    }
    bench.compare(name, all);
}

fn label(format: Format) -> &'static str {
    match format {
        Format::Vhd => "diffdiskd",
        Format::Qcow2 => "QSD qcow2",
        Format::Vpc => "QSD vpc",
        Format::Raw => "QSD raw",
    }
}

/// Measures sequential reads and writes. For requests of 1 MiB a target compares `diffdiskd` with the fastest other
/// server. For reads, a target also compares chains of 16 layers.
pub fn sequential(bench: &mut Bench) {
    let formats = [Format::Vhd, Format::Raw, Format::Qcow2, Format::Vpc];
    for (write, block, depth) in
        [(false, 1 << 20, 4), (false, 128 << 10, 16), (true, 1 << 20, 4), (true, 128 << 10, 16)]
    {
        let verb = if write { "write" } else { "read" };
        let name = format!("seq {verb} {} KiB, qd {depth}", block >> 10);
        let load = Load { write, block, depth, order: Order::Sequential, ..bench.random_read() };
        if write {
            // Only a quarter of the data is written, so that the dirty pages stay below the kernel's limit. Above the
            // limit, writeback would dominate the result.
            let load = Load { region: bench.disks.size / 4, ..load };
            written(bench, &name, load, &formats);
        } else {
            let single = formats.map(|format| (format, 1, label(format)));
            let spread =
                [Format::Vhd, Format::Qcow2].map(|f| (f, 16, if f == Format::Vhd { OURS_16 } else { QCOW2_16 }));
            let all = single.into_iter().chain(spread).map(|(format, layers, label)| {
                served(label, &format.server(), &bench.disks.striped_chain(format, layers), load)
            });
            let all = all.collect();
            bench.compare(&name, all);
            bench.require_iops(&name, OURS_16, QCOW2_16, 1.0);
        }
        let best = formats[1..].iter().map(|&f| bench.results.ratio(&name, "diffdiskd", label(f), |s| s.iops));
        let best = best.fold(f64::MAX, f64::min);
        if block == 1 << 20 {
            bench.results.target(format!("{name}: diffdiskd / the best peer"), best, Bound::AtLeast(1.0));
        }
    }
}

/// Measures two queues in comparison with one. Each queue has a processor, which the daemon's thread of the queue and
/// the guest's thread of the same queue share.
pub fn two_queues(bench: &mut Bench) {
    if processors() < 2 {
        return eprintln!("two queues need two processors");
    }
    let image = bench.disks.striped_chain(Format::Vhd, 16);
    let load = bench.random_read();
    let with = |queues: usize| {
        let image = &image;
        move || {
            let extra = if queues == 1 { "--num-queues=1" } else { "--num-queues=2" };
            let server = Server::start(&Kind::Ours(vec![extra]), image);
            let mut guest = server.connect(queues);
            server.pin(|name| usize::from(name == "queue-1"));
            let warm = Load { until: Until::Time(Duration::from_millis(100)), ..load };
            guest.warm(load.region).expect("the disk can be read");
            guest.run_on_all(&warm).expect("the disk can be read");
            let before = server.processor_time();
            let samples = guest.run_on_all(&load).expect("the disk can be read");
            let mut sum = samples[0];
            sum.iops = samples.iter().map(|s| s.iops).sum();
            sum.count = samples.iter().map(|s| s.count).sum();
            sum.cpu = (server.processor_time() - before).as_secs_f64() * 1e6 / sum.count as f64;
            sum
        }
    };
    let name = "rand read 4 KiB, qd 32 each, guest and server on the same processors";
    let all = vec![Candidate::new("1 queue", with(1)), Candidate::new("2 queues", with(2))];
    bench.compare(name, all);
    bench.require_iops(name, "2 queues", "1 queue", 1.7);
}
