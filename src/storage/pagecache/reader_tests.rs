//! Tests of reads from the page cache, on real files.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, clippy::cast_possible_truncation, reason = "memory of a simulated guest; page numbers")]

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::storage::host::Host;
use crate::storage::payload::{Buffer, Payload};
use crate::storage::uring::UringEngine;
use crate::storage::{Access, Action, Completion, Engine, Env, Op};

const PAGE: u64 = 4096;
const SLOT: FileSlot = FileSlot(2);

/// Creates a file of `count` pages, outside tmpfs. Page n, counted from 0, contains the number n + 1 throughout. The
/// pages are clean, so that the kernel may drop them.
fn pages(count: u64) -> (TempDir, File) {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("f");
    let bytes: Vec<u8> = (0..count).flat_map(|page| (page + 1).to_be_bytes().repeat(512)).collect();
    std::fs::write(&path, bytes).unwrap();
    let file = Host.open(&path, Access::Write).unwrap();
    file.sync().unwrap();
    (folder, file)
}

fn read(offset: u64, len: usize) -> Op {
    Op::read(offset, SLOT, offset, Payload::Own(Buffer::zeroed(len)))
}

/// Returns the halves of the buffer as guest memory, the second half first: two runs that are not merged, since they do
/// not follow each other in memory. After a copy, [`swap_halves`] restores the order. The result must not outlive the
/// buffer.
fn iovecs(buffer: &mut Buffer) -> GuestIovecs {
    let mut halves = GuestIovecs::new(std::sync::Arc::new(()), 2);
    let (start, half) = (buffer.as_mut_ptr(), buffer.len() / 2);
    // SAFETY: both halves lie in the buffer, which the tests do not use otherwise, and do not drop, while they use the
    // runs.
    unsafe {
        halves.push(start.wrapping_add(half), buffer.len() - half);
        halves.push(start, half);
    }
    assert_eq!(halves.iovecs().len(), 2);
    halves
}

/// Puts the bytes of a copy into [`iovecs`] in the order of the file.
fn swap_halves(buffer: &mut Buffer) {
    let half = buffer.len() / 2;
    buffer.rotate_left(half);
}

/// A ring with its page cache.
struct CopyingRing {
    ring: UringEngine,
    page_cache: Box<dyn PageCache>,
    /// Number of reads that were copies.
    copies: u64,
}

impl CopyingRing {
    fn register(&mut self, file: &File) {
        self.ring.register(SLOT, file).unwrap();
        self.page_cache.register(SLOT, file).unwrap();
    }

    fn system_calls(&self) -> u64 {
        self.ring.system_calls()
    }
}

fn ring(file: &File) -> Option<CopyingRing> {
    let ring = UringEngine::new(8).map_err(|e| eprintln!("skipped for io_uring: {e}")).ok()?;
    let page_cache = ring.page_cache().unwrap();
    let mut ring = CopyingRing { ring, page_cache, copies: 0 };
    ring.register(file);
    Some(ring)
}

/// Carries out an operation: a read as a copy if possible, otherwise by the ring.
fn run(CopyingRing { ring, page_cache, copies }: &mut CopyingRing, mut op: Op) -> Completion {
    if let (Action::Read, Payload::Own(buffer)) = (op.action, &mut op.payload) {
        let memory = iovecs(buffer);
        let found = page_cache.find(SLOT, op.offset, memory.len());
        let copied = found.is_some_and(|found| page_cache.copy(&found, &memory, 0));
        page_cache.end_batch();
        page_cache.query_residency();
        if copied {
            *copies += 1;
            swap_halves(buffer);
            return Completion { op, result: Ok(()) };
        }
    }
    ring.push(op).unwrap();
    let mut out = Vec::new();
    while out.is_empty() {
        ring.wait().unwrap();
        ring.reap(&mut out);
    }
    out.pop().unwrap()
}

/// Reads pages with one operation each. Returns the number of system calls.
fn read_all(ring: &mut CopyingRing, pages: impl Iterator<Item = u64>, expected: impl Fn(u64) -> u64) -> u64 {
    let calls = ring.system_calls();
    for page in pages {
        let Completion { op, result } = run(ring, read(page * PAGE, PAGE as usize));
        result.unwrap();
        let Payload::Own(bytes) = op.payload else { unreachable!() };
        assert!(*bytes == expected(page).to_be_bytes().repeat(512), "page {page}");
    }
    ring.system_calls() - calls
}

#[test]
fn repeated_reads_make_no_system_call() {
    let (_folder, file) = pages(128);
    let Some(mut ring) = ring(&file) else { return };
    let number = |page| page + 1;
    assert!(read_all(&mut ring, 0..128, number) >= 3, "nothing is known yet");
    for _ in 0..3 {
        read_all(&mut ring, 0..128, number);
    }
    assert_eq!(read_all(&mut ring, 0..128, number), 0);
    // A read across the border of two windows.
    let (border, calls) = ((256 << 10) - 512, |ring: &CopyingRing| (ring.system_calls(), ring.copies));
    let before = calls(&ring);
    run(&mut ring, read(border, PAGE as usize)).result.unwrap();
    assert_eq!(calls(&ring), (before.0, before.1 + 1));
    // Writes and punched holes are visible. System calls are not counted here: reading a hole through the mapping may
    // count as a major fault, after which nothing is copied for a while.
    file.write_at(&[0; PAGE as usize], 7 * PAGE).unwrap();
    file.punch_hole(9 * PAGE, PAGE).unwrap();
    let written = run(&mut ring, Op::write(0, SLOT, 8 * PAGE, Payload::Own(Buffer::zeroed(PAGE as usize))));
    written.result.unwrap();
    let zeros = |page| if (7..10).contains(&page) { 0 } else { page + 1 };
    read_all(&mut ring, 0..64, zeros);
    // An unaligned range, in three pages.
    let Completion { op, result } = run(&mut ring, read(20 * PAGE - 512, 5000));
    result.unwrap();
    let Payload::Own(bytes) = op.payload else { unreachable!() };
    assert!(bytes[..512] == 20u64.to_be_bytes().repeat(64) && bytes[512..4608] == 21u64.to_be_bytes().repeat(512));
}

#[test]
fn residency_is_queried_for_reads_of_two_windows() {
    let (_folder, file) = pages(128);
    let Some(mut ring) = ring(&file) else { return };
    for _ in 0..10 {
        run(&mut ring, read((256 << 10) - 512, PAGE as usize)).result.unwrap();
    }
    assert!(ring.copies > 0);
}

#[test]
fn long_reads_are_queried_as_a_whole_and_copied_in_chunks() {
    let (_folder, file) = pages(512);
    let Some(mut ring) = ring(&file) else { return };
    let (at, len) = (3 * PAGE + 512, (500 * PAGE) as usize);
    let long_read = |ring: &mut CopyingRing| {
        let Completion { op, result } = run(ring, read(at, len));
        result.unwrap();
        let Payload::Own(bytes) = op.payload else { unreachable!() };
        let number = |at: u64| (at / PAGE + 1).to_be_bytes();
        assert!(bytes.chunks(8).zip((at..).step_by(8)).all(|(bytes, at)| *bytes == number(at)));
    };
    // A long read does not map the file. Once the file is mapped, the second long read queries all of its windows.
    long_read(&mut ring);
    read_all(&mut ring, 0..1, |_| 1);
    (0..2).for_each(|_| long_read(&mut ring));
    assert_eq!(ring.copies, 0);
    let calls = ring.system_calls();
    long_read(&mut ring);
    assert_eq!((ring.copies, ring.system_calls() - calls), (1, 0));
    // The residency bits of one window are cleared.
    HostFile::of(&file).unwrap().file_map().invalidate(300 * PAGE, 1);
    let calls = ring.system_calls();
    long_read(&mut ring);
    assert!(ring.copies == 1 && ring.system_calls() > calls);
}

#[test]
fn a_range_found_by_another_reader_is_copied_only_from_the_same_file() {
    let (_folder, file) = pages(64);
    let (Some(mut ring), Some(mut other)) = (ring(&file), ring(&file)) else { return };
    for _ in 0..4 {
        read_all(&mut ring, 0..64, |page| page + 1);
    }
    let found = ring.page_cache.find(SLOT, 0, 512).expect("the range is resident");
    let mut buffer = Buffer::zeroed(512);
    assert!(other.page_cache.copy(&found, &iovecs(&mut buffer), 0), "the same open file");
    let (_folder, next) = pages(64);
    other.register(&next);
    assert!(!other.page_cache.copy(&found, &iovecs(&mut buffer), 0));
    assert!(!ring.page_cache.copy(&CachedRange::new(SLOT, 0, 512), &iovecs(&mut buffer), 0));
}

#[test]
fn reads_of_a_truncated_file_fail_until_it_grows_again() {
    let (_folder, file) = pages(64);
    let Some(mut ring) = ring(&file) else { return };
    for _ in 0..4 {
        read_all(&mut ring, 0..64, |page| page + 1);
    }
    file.set_len(10 * PAGE + 100).unwrap();
    assert_eq!(run(&mut ring, read(20 * PAGE, 512)).result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(read_all(&mut ring, 0..10, |page| page + 1) <= 3, "the residency of the other pages is soon known again");
    file.set_len(64 * PAGE).unwrap();
    read_all(&mut ring, 11..64, |_| 0);
}

#[test]
fn very_long_reads_direct_files_and_reads_of_two_regions_go_to_the_ring() {
    const REGION: u64 = 256 << 20;
    let (folder, file) = pages(64);
    file.set_len(REGION + 64 * PAGE).unwrap();
    file.write_at(&[9; 8192], REGION - PAGE).unwrap();
    let Some(mut ring) = ring(&file) else { return };
    let calls = |ring: &mut CopyingRing, offset, len| {
        for _ in 0..9 {
            run(ring, read(offset, len)).result.unwrap();
        }
        let before = ring.system_calls();
        run(ring, read(offset, len)).result.unwrap();
        ring.system_calls() - before
    };
    assert_eq!(calls(&mut ring, REGION - PAGE, PAGE as usize), 0);
    assert_eq!(calls(&mut ring, REGION, PAGE as usize), 0);
    assert_ne!(calls(&mut ring, REGION - PAGE, 8192), 0);
    assert_ne!(calls(&mut ring, 0, MAX_COPY + 512), 0);
    let direct = Host.open(&Path::new(folder.path()).join("f"), Access::Read).unwrap();
    if direct.set_direct().unwrap().is_some() {
        ring.register(&direct);
        assert_ne!(calls(&mut ring, 0, PAGE as usize), 0);
    }
}

#[test]
fn a_reader_that_waited_for_a_page_backs_off() {
    let (_folder, file) = pages(64);
    let mut reader = PageCacheReader::new().unwrap();
    reader.register(SLOT, &file).unwrap();
    let (host, at) = (HostFile::of(&file).unwrap(), 16 * PAGE);
    let mut buffer = Buffer::zeroed(PAGE as usize);
    let memory = iovecs(&mut buffer);
    // Takes the first sample of major faults.
    reader.evaluate_batch(Duration::from_secs(1));
    // Queries until the page is known to be resident, without touching its mapping.
    let queried = || {
        (0..8).any(|_| {
            host.read_at(&mut [0; 1], at).unwrap();
            host.file_map().query(&host, at, 1, || Some(64 * PAGE));
            matches!(host.file_map().residency(at, PAGE as usize), Residency::Resident(_))
        })
    };
    let copy = |reader: &mut PageCacheReader, took| {
        reader.query_residency(); // ends an expired backoff
        let found = reader.find(SLOT, at, PAGE as usize);
        let copied = found.is_some_and(|found| reader.copy(&found, &memory, 0));
        reader.evaluate_batch(took);
        reader.batch.clear();
        copied
    };
    assert!(queried());
    // The page has not been accessed through the mapping yet, so the kernel can drop it.
    rustix::fs::fadvise(&host, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(copy(&mut reader, Duration::from_millis(1)), "the kernel reads the page again");
    assert!(
        !matches!(host.file_map().residency(at, PAGE as usize), Residency::Resident(_)),
        "the residency bits are cleared"
    );
    assert!(queried() && !copy(&mut reader, Duration::ZERO), "backing off");
    std::thread::sleep(Duration::from_millis(150));
    assert!(copy(&mut reader, Duration::from_secs(1)), "the backoff has ended");
    assert!(copy(&mut reader, Duration::ZERO), "slow, but without a major fault");
    assert_eq!(buffer[..8], 17u64.to_be_bytes());
}

#[test]
fn a_delay_without_major_faults_is_no_stall() {
    let (now, long_ago) = (Instant::now(), Instant::now() - STALL * 2);
    assert!(!is_stalled(&mut None, -1) && !is_stalled(&mut Some(now + Duration::from_secs(9)), -1));
    let mut start = Some(long_ago);
    assert!(is_stalled(&mut start, -1), "the thread has had faults since the sample");
    assert_eq!(start, Some(long_ago), "the measurement of the batch continues");
    assert!(!is_stalled(&mut start, i64::MAX) && start.unwrap() >= now, "the measurement starts again");
}

#[test]
fn files_that_share_an_entry_of_the_map_cache_are_distinguished() {
    let ((_one, one), (_other, other)) = (pages(64), pages(64));
    other.write_at(&[9; PAGE as usize], 0).unwrap();
    let (mut reader, mut buffer) = (PageCacheReader::new().unwrap(), Buffer::zeroed(PAGE as usize));
    let (first, second) = (FileSlot(2), FileSlot(130));
    reader.register(first, &one).unwrap();
    reader.register(second, &other).unwrap();
    for file in [&one, &other].map(|file| HostFile::of(file).unwrap()) {
        // The first query maps the region.
        (0..2).for_each(|_| file.file_map().query(&file, 0, PAGE as usize, || Some(64 * PAGE)));
    }
    let mut byte = |reader: &mut PageCacheReader, slot| {
        let found = reader.find(slot, 0, PAGE as usize).expect("the range is resident");
        assert!(reader.copy(&found, &iovecs(&mut buffer), 0));
        (found, buffer[7])
    };
    let mut found = None;
    for (slot, expected) in [(first, 1), (second, 9), (second, 9), (first, 1), (second, 9), (first, 1)] {
        let (at, got) = byte(&mut reader, slot);
        assert_eq!(got, expected);
        found = Some(at);
    }
    reader.register(first, &other).unwrap();
    let mut memory = Buffer::zeroed(PAGE as usize);
    assert!(!reader.copy(&found.unwrap(), &iovecs(&mut memory), 0), "the range was found in another file");
    assert_eq!(byte(&mut reader, first).1, 9);
}
