//! Sequential reads of data outside the page cache: the speed of a chain whose data alternates between 16 files, as a
//! share of the speed of read(2) on one flat file.
//!
//! Before each run the files are evicted from the page cache and a new server is started, so that the bitmap cache of
//! the server is empty, too. A chain of small pieces cannot reach the speed of a flat file, because the storage device
//! is slower for small reads. The limit for a chain is measured by direct reads of the same pieces, [`DEPTH`] in
//! flight.
//!
//! In a virtual machine the reads may come from the host's page cache. The storage device is then faster, and the
//! target is harder to reach.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use rustix::fs::OFlags;

use crate::compare::{Bench, Candidate};
use crate::disks::{Format, Interleaving, drop_page_cache, runs_of_data};
use crate::harness::Bound;
use crate::load::{Load, Order, Until};
use crate::sample::{Latencies, Sample};
use crate::server::{Kind, Server};

/// Target: minimum speed, as a share of the speed that is measured without a server.
const SHARE: f64 = 0.9;
const FLAT: &str = "read(2) of 1 MiB, flat file";
const PIECES: &str = "io_uring, the chain's pieces of 64 KiB";
/// Number of direct reads in flight.
const DEPTH: usize = 32;
const RAW: &str = "QSD raw";

/// Loads: bytes per request, requests in flight, and whether the target applies. The target does not apply to a single
/// request in flight, whose speed the storage device does not limit.
const LOADS: [(usize, usize, bool); 4] =
    [(1 << 20, 4, true), (128 << 10, 4, true), (1 << 20, 1, false), (4 << 10, 1, false)];

pub fn cold(bench: &mut Bench) {
    let kib = |bytes: u64| format!("pieces of {} KiB", bytes >> 10);
    let mut all = vec![(1, 2 << 20), (16, 2 << 20), (16, 64 << 10)];
    if bench.pace.full {
        all.extend([(4, 2 << 20), (4, 64 << 10)]);
    }
    let chains: Vec<_> = all
        .into_iter()
        .map(|(layers, piece)| {
            let name = format!("diffdiskd, {layers} layers, {}", kib(piece));
            (name, bench.disks.interleaved(Interleaving { layers, piece }))
        })
        .collect();
    let raw = bench.disks.striped_chain(Format::Raw, 1);
    let size = bench.disks.size;
    for &(block, depth, wanted) in if bench.pace.full { &LOADS[..] } else { &LOADS[..2] } {
        let name = format!("cold seq read {} KiB, qd {depth}", block >> 10);
        let load = Load {
            block,
            depth,
            order: Order::Sequential,
            until: Until::Count(size / block as u64),
            ..Load::random_read(size, Duration::ZERO)
        };
        let raw = std::slice::from_ref(&raw);
        let mut candidates = vec![
            Candidate::new(FLAT, || flat(&raw[0], size, block)),
            Candidate::new(RAW, || once(&Format::Raw.server(), raw, &load)),
        ];
        let small = &chains[2].1;
        candidates.push(Candidate::new(PIECES, || pieces(small, 64 << 10, size, block)));
        for (system, files) in &chains {
            candidates.push(Candidate::new(system, || once(&Kind::ours(), files, &load)));
        }
        bench.compare(&name, candidates);
        for (system, own) in [(&chains[1].0, FLAT), (&chains[2].0, PIECES)].into_iter().filter(|_| wanted) {
            let ratio = bench.results.ratio(&name, system, own, |s| s.iops);
            bench.results.target(format!("{name}: {system} / {own}"), ratio, Bound::AtLeast(SHARE));
        }
    }
}

/// Evicts `files` (youngest first) from the page cache, and measures one run of a new server on them.
fn once(kind: &Kind, files: &[PathBuf], load: &Load) -> Sample {
    files.iter().for_each(|file| drop_page_cache(file));
    let server = Server::start(kind, &files[0]);
    let mut guest = server.connect(1);
    let before = server.processor_time();
    let mut sample = guest.run(load).unwrap_or_else(|e| panic!("a request failed: {e}"));
    let used = server.processor_time().saturating_sub(before);
    sample.cpu = used.as_secs_f64() * 1e6 / sample.count as f64;
    drop(guest);
    server.stop();
    sample
}

/// Measures reads of the first `size` bytes of a flat file by read(2), as dd does. Counts each `block` bytes as a
/// request.
fn flat(path: &Path, size: u64, block: usize) -> Sample {
    drop_page_cache(path);
    let mut file = File::open(path).expect("the image can be read");
    let (mut piece, start) = (vec![0; 1 << 20], Instant::now());
    for _ in 0..size / piece.len() as u64 {
        file.read_exact(&mut piece).expect("the image can be read");
    }
    per_request(start.elapsed(), size, block)
}

/// Measures direct reads of the pieces of a chain (files youngest first) in the order of the disk, without a server.
/// Counts each `block` bytes as a request.
fn pieces(files: &[PathBuf], piece: u64, size: u64, block: usize) -> Sample {
    let open = |path: &PathBuf| {
        File::options().read(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path).expect("our own file")
    };
    let opened: Vec<File> = files.iter().rev().map(open).collect();
    let cut = |path: &PathBuf| {
        let runs = runs_of_data(path, piece).into_iter();
        runs.flat_map(|(at, len)| (0..len / piece).map(move |i| at + len % piece + i * piece)).collect::<Vec<_>>()
    };
    let offsets: Vec<Vec<u64>> = files.iter().rev().map(cut).collect();
    let fds: Vec<_> = opened.iter().map(AsRawFd::as_raw_fd).collect();
    let mut ring = IoUring::new(DEPTH as u32).expect("the host has io_uring");
    ring.submitter().register_files(&fds).expect("files can be registered");
    // A panic leaks the buffers, because reads may still be in flight then.
    let mut memory = ManuallyDrop::new(MmapMut::map_anon(DEPTH * piece as usize).expect("memory"));
    let buffers = memory.as_mut_ptr();
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let (count, start) = ((size / piece) as usize, Instant::now());
    let (mut next, mut over) = (0, 0);
    while over < count {
        while next < count
            && let Some(slot) = free.pop()
        {
            let (file, number) = (next % files.len(), next / files.len());
            let buffer = buffers.wrapping_add(slot * piece as usize);
            let read = opcode::Read::new(types::Fixed(file as u32), buffer, piece as u32)
                .offset(offsets[file][number])
                .build()
                .user_data(slot as u64);
            // SAFETY: the buffer must be valid and unused until the read completes. It is valid: `slot` is less than
            // DEPTH, so the buffer lies in `memory`, which is unmapped only after the outer loop, when all reads have
            // completed. After a panic `memory` is never unmapped. The buffer is unused: a slot has one read at a time,
            // because it returns to `free` only when its read has completed, and no code accesses the contents of
            // `memory`.
            unsafe { ring.submission().push(&read).expect("there is room for all at once") };
            next += 1;
        }
        ring.submit_and_wait(1).expect("reads are taken");
        for done in ring.completion() {
            assert_eq!(done.result(), piece as i32, "the image can be read");
            free.push(done.user_data() as usize);
            over += 1;
        }
    }
    let taken = start.elapsed();
    drop(ManuallyDrop::into_inner(memory));
    per_request(taken, size, block)
}

/// Returns the sample of a run that took the time `taken` for `size` bytes. Counts each `block` bytes as a request.
fn per_request(taken: Duration, size: u64, block: usize) -> Sample {
    let count = size / block as u64;
    let mut latencies = Latencies::default();
    latencies.add(taken / u32::try_from(count).expect("a few requests"));
    Sample::new(count, taken.as_secs_f64(), &latencies)
}
