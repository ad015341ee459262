//! Disk space of an overlay in comparison with qcow2, and the additional time that sparse allocation needs.
//!
//! `DIFFDISK_BENCH_FOLDER` selects a folder on another file system.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::compare::{Bench, Candidate, measure};
use crate::disks::{self, Disks, Format};
use crate::harness::Bound;
use crate::load::{Load, Order, Until, permute};
use crate::sample::Sample;
use crate::server::{Kind, Server};

const SPARSE: &str = "diffdiskd, sparse";
const BLOCK: &str = "diffdiskd, block";
const QCOW2: &str = "QSD qcow2";
const KIB: f64 = 1024.0;

/// Measures the disk space of overlays.
pub fn space(bench: &mut Bench) {
    scattered_writes(bench);
    reads_alone(bench);
    spread_over_layers(bench);
}

fn block() -> Kind {
    Kind::Ours(vec!["--allocation=block"])
}

fn taken(path: &Path) -> f64 {
    fs::metadata(path).expect("it was made a moment ago").blocks() as f64 * 512.0
}

/// Returns the number of extents of a file in the file system, or `None` if `filefrag` cannot count them.
fn extents(path: &Path) -> Option<u64> {
    let output = Command::new("filefrag").arg(path).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.rsplit_once(": ")?.1.split(' ').next()?.parse().ok()
}

/// Measures a child of 64 GiB over an empty root after a number of random writes of 4 KiB: the disk space of the child
/// while it is served and after closing, its number of extents, and the time to delete it.
fn scattered_writes(bench: &mut Bench) {
    for count in [1, 100, 1000] {
        let of = |system: &str, format: Format, kind: &Kind| {
            let image = bench.disks.empty_child(format, 64 << 30);
            fs::File::open(&image).and_then(|file| file.sync_all()).expect("it can be synced");
            let created = taken(&image);
            let server = Server::start(kind, &image);
            let mut guest = server.connect(1);
            let pages = (64u64 << 30) / 4096;
            for number in 0..count {
                guest.write(permute(number, pages) * 4096, &[7; 4096]).expect("a write");
            }
            guest.flush().expect("a flush");
            let served = taken(&image) - created;
            drop(guest);
            server.stop();
            fs::File::open(&image).and_then(|file| file.sync_all()).expect("it can be synced");
            let closed = taken(&image) - created;
            let extents = extents(&image).map_or("?".to_owned(), |n| n.to_string());
            let begin = Instant::now();
            fs::remove_file(&image).expect("it can be removed");
            let removed = begin.elapsed();
            eprintln!(
                "  {count} writes of 4 KiB: {system}: {:.0} KiB served, {:.0} KiB closed, {extents} extents, removed in {} us",
                served / KIB,
                closed / KIB,
                removed.as_micros()
            );
            (served, removed)
        };
        let ours = of(SPARSE, Format::Vhd, &Kind::ours());
        of(BLOCK, Format::Vhd, &block());
        let theirs = of(QCOW2, Format::Qcow2, &Format::Qcow2.server());
        let most = if count == 1 { 1.0 } else { 0.2 };
        let what = format!("room of {count} random writes of 4 KiB into a child of 64 GiB: {SPARSE} / {QCOW2}");
        bench.results.target(what, ours.0 / theirs.0, Bound::AtMost(most));
    }
}

/// Measures the disk space of a child of 1 TiB that is only read.
fn reads_alone(bench: &mut Bench) {
    for (system, format, kind) in [(SPARSE, Format::Vhd, Kind::ours()), (BLOCK, Format::Vhd, block())] {
        let image = bench.disks.empty_child(format, 1 << 40);
        let before = taken(&image);
        let server = Server::start(&kind, &image);
        let mut guest = server.connect(1);
        for number in 0..10 {
            guest.read(number << 36, 4096).expect("a read");
        }
        let more = taken(&image) - before;
        drop(guest);
        server.stop();
        bench.results.target(
            format!("room of ten reads of a child of 1 TiB: {system}, bytes"),
            more,
            Bound::Exactly(0.0),
        );
        let _ = fs::remove_file(&image);
    }
}

/// Measures the disk space of data in 16 layers. Each piece of 64 KiB is in a pseudo-random layer.
fn spread_over_layers(bench: &mut Bench) {
    let (layers, pieces) = (16u64, bench.disks.size / disks::CHUNK);
    let files: Vec<PathBuf> = (0..layers).map(|n| bench.disks.scratch().with_extension(format!("layer{n}"))).collect();
    for layer in 0..layers {
        let image = &files[layer as usize];
        let _ = fs::remove_file(image);
        let mut create = Command::new(env!("CARGO_BIN_EXE_diffdisk"));
        create.args(["create", "--quiet"]).arg(image);
        match layer.checked_sub(1) {
            None => create.args(["--size", &bench.disks.size.to_string()]),
            Some(below) => create.arg("--parent").arg(&files[below as usize]),
        };
        assert!(create.stdin(Stdio::null()).status().is_ok_and(|s| s.success()), "an image can be made");
        let server = Server::start(&Kind::ours(), image);
        let mut guest = server.connect(1);
        for number in (0..pieces).filter(|n| n % layers == layer) {
            let at = permute(number, pieces) * disks::CHUNK;
            guest.write(at, &vec![9; disks::CHUNK as usize]).expect("a write");
        }
        guest.flush().expect("a flush");
        drop(guest);
        server.stop();
    }
    let all: f64 = files.iter().map(|file| taken(file)).sum();
    let data = (pieces * disks::CHUNK) as f64;
    bench.results.target("room of data in pieces of 64 KiB over 16 layers / the data", all / data, Bound::AtMost(1.2));
    files.iter().for_each(|file| drop(fs::remove_file(file)));
}

/// Measures fresh writes, flushes, commits, and reads afterwards, with both kinds of allocation and with qcow2.
pub fn allocation(bench: &mut Bench) {
    let writes = bench.writes();
    let fresh = Load {
        write: true,
        order: Order::Shuffled,
        until: Until::Count(writes),
        ..Load::random_read(bench.disks.size, Duration::ZERO)
    };
    let stream = Load {
        block: 1 << 20,
        depth: 4,
        order: Order::Sequential,
        until: Until::Count(bench.disks.size >> 20),
        ..fresh
    };
    let few = Until::Count(writes / 4);
    for (name, load, after) in [
        ("space: rand write 4 KiB, qd 32, fresh", fresh, None),
        (
            "space: rand write 4 KiB, qd 32, flush every 32, fresh",
            Load { flush_every: Some(32), until: few, ..fresh },
            None,
        ),
        (
            "space: commits of 4 KiB, qd 1, fresh",
            Load { flush_every: Some(1), depth: 1, until: Until::Count(writes / 16), ..fresh },
            None,
        ),
        (
            "space: commits of 4 KiB in order, qd 1, fresh",
            Load {
                flush_every: Some(1),
                depth: 1,
                order: Order::Sequential,
                until: Until::Count(writes / 16),
                ..fresh
            },
            None,
        ),
        ("space: seq write 1 MiB, qd 4, fresh", stream, None),
        (
            "space: cold seq read 1 MiB after rand writes of 64 KiB, flush every 32",
            Load {
                block: 64 << 10,
                flush_every: Some(32),
                until: Until::Count(bench.disks.size / disks::CHUNK),
                ..fresh
            },
            Some(Load { write: false, ..stream }),
        ),
        (
            "space: cold seq read 1 MiB after rand writes of 4 KiB, flush every 32",
            Load { flush_every: Some(32), until: few, ..fresh },
            Some(Load { write: false, ..stream }),
        ),
    ] {
        let disks = Disks::new(bench.disks.size);
        let once = |format: Format, kind: &Kind| once(&disks, format, kind, &load, after.as_ref());
        let all = vec![
            Candidate::new(SPARSE, || once(Format::Vhd, &Kind::ours())),
            Candidate::new(BLOCK, || once(Format::Vhd, &block())),
            Candidate::new(QCOW2, || once(Format::Qcow2, &Format::Qcow2.server())),
        ];
        bench.compare(name, all);
        let ratio = bench.results.ratio(name, SPARSE, BLOCK, |s| s.iops);
        bench.results.target(format!("{name}: {SPARSE} / block"), ratio, Bound::AtLeast(0.9));
    }
}

/// Runs `load` on a fresh child and returns its sample. With `after`, evicts the child from the page cache, runs
/// `after` on the same child, and returns the sample of `after`.
fn once(disks: &Disks, format: Format, kind: &Kind, load: &Load, after: Option<&Load>) -> Sample {
    let image = disks.fresh_child(format, &[]);
    let server = Server::start(kind, &image);
    let mut guest = server.connect(1);
    let mut sample = measure(&server, &mut guest, load);
    drop(guest);
    server.stop();
    if let Some(after) = after {
        disks::drop_page_cache(&image);
        let server = Server::start(kind, &image);
        let mut guest = server.connect(1);
        sample = guest.run(after).expect("a read");
        drop((guest, server));
    }
    disks::remove_and_wait(&image);
    sample
}
