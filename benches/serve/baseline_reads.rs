//! Baseline of reads, without a server: this process reads the served file by io_uring in batches, and by pread(2).
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::time::{ClockId, clock_gettime};

use crate::disks::runs_of_data;
use crate::harness::random_stream;
use crate::sample::{Latencies, Sample};

/// Bytes per read.
pub const BLOCK: usize = 4096;
/// Number of reads per batch.
pub const DEPTH: usize = 32;

/// Returns the processor time of this thread.
pub fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::from_secs(now.tv_sec.unsigned_abs()) + Duration::from_nanos(now.tv_nsec.unsigned_abs())
}

/// Reads the first `region` bytes of a file, so that they are in the page cache.
pub fn warm(file: &File, region: u64) {
    let mut piece = vec![0; 1 << 20];
    (0..region >> 20).for_each(|i| file.read_exact_at(&mut piece, i << 20).expect("the image can be read"));
}

/// Calls `batch`, which executes `reads` reads, repeatedly until the time is over.
pub fn measure(time: Duration, reads: usize, mut batch: impl FnMut()) -> Sample {
    let (start, before) = (Instant::now(), thread_time());
    let (mut count, mut latencies, mut now) = (0, Latencies::default(), start);
    while now - start < time {
        batch();
        let after = Instant::now();
        latencies.add(after - now);
        now = after;
        count += reads as u64;
    }
    let mut sample = Sample::new(count, (now - start).as_secs_f64(), &latencies);
    sample.cpu = (thread_time() - before).as_secs_f64() * 1e6 / count as f64;
    sample
}

/// Returns the whole pages with data in the files of a chain, as (file, offset).
pub fn pages(files: &[PathBuf]) -> Vec<(Rc<File>, u64)> {
    const LEAST: u64 = 32 << 10; // shorter runs are bitmaps
    let page = BLOCK as u64;
    let mut pages = Vec::new();
    for path in files {
        let file = Rc::new(File::open(path).expect("the image can be read"));
        for (start, len) in runs_of_data(path, LEAST) {
            let (first, end) = (start.next_multiple_of(page), (start + len) / page * page);
            pages.extend((first..end).step_by(BLOCK).map(|at| (file.clone(), at)));
        }
    }
    pages
}

/// Measures random reads of the data in the files of a chain by pread(2). The result is the cost of data that is spread
/// over several files, without a server.
pub fn preadv_chain(files: &[PathBuf], time: Duration) -> Sample {
    let pages = pages(files);
    let mut memory = vec![0; DEPTH * BLOCK];
    let mut rng = random_stream(0);
    pages.iter().for_each(|(file, at)| file.read_exact_at(&mut memory[..BLOCK], *at).expect("the image can be read"));
    measure(time, DEPTH, || {
        for page in memory.chunks_mut(BLOCK) {
            let (file, at) = &pages[rng.below(pages.len() as u64) as usize];
            file.read_exact_at(page, *at).expect("the image can be read");
        }
    })
}

/// Measures random reads of 4 KiB by pread(2), one after another.
pub fn preadv(path: &Path, region: u64, time: Duration) -> Sample {
    let file = File::open(path).expect("the image can be read");
    warm(&file, region);
    let mut memory = vec![0; DEPTH * BLOCK];
    let mut rng = random_stream(0);
    measure(time, DEPTH, || {
        for page in memory.chunks_mut(BLOCK) {
            let at = rng.below(region / BLOCK as u64) * BLOCK as u64;
            file.read_exact_at(page, at).expect("the image can be read");
        }
    })
}

/// Measures random reads of 4 KiB by io_uring, 32 per submit. With `defer` the ring uses deferred task work, otherwise
/// cooperative task work, like the ring of the daemon. On a kernel without these modes the ring uses neither.
pub fn io_uring(path: &Path, region: u64, time: Duration, defer: bool) -> Sample {
    let file = File::open(path).expect("the image can be read");
    warm(&file, region);
    let mut how = IoUring::builder();
    how.setup_single_issuer();
    if defer {
        how.setup_defer_taskrun()
    } else {
        how.setup_coop_taskrun()
    };
    let made = how.build(DEPTH as u32).or_else(|_| IoUring::new(DEPTH as u32));
    let mut ring: IoUring = made.expect("the host has io_uring");
    ring.submitter().register_files(&[file.as_raw_fd()]).expect("a file can be registered");
    let mut memory = vec![0u8; DEPTH * BLOCK];
    let mut rng = random_stream(0);
    measure(time, DEPTH, || {
        for page in memory.chunks_mut(BLOCK) {
            let at = rng.below(region / BLOCK as u64) * BLOCK as u64;
            let read = opcode::Read::new(types::Fixed(0), page.as_mut_ptr(), BLOCK as u32).offset(at).build();
            // SAFETY: the buffer must be valid and unused until the read completes. `submit_and_wait` below waits for
            // all reads of the batch, and `memory` lives until then. Until then only the kernel accesses the pages, and
            // each read of the batch has a page of its own. If `submit_and_wait` fails, the panic frees `memory` while
            // reads may be in flight. No code catches this panic, so the process ends soon after.
            unsafe { ring.submission().push(&read).expect("there is room for a batch") };
        }
        ring.submit_and_wait(DEPTH).expect("the batch is taken");
        for done in ring.completion() {
            assert_eq!(done.result(), BLOCK as i32, "the image can be read");
        }
    })
}
