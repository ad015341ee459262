//! Tests of reads that are copies, on files of the host.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, clippy::cast_possible_truncation, reason = "memory of a pretended guest; pages")]

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::storage::host::Host;
use crate::storage::payload::{Buffer, Payload};
use crate::storage::uring::UringEngine;
use crate::storage::{Access, Action, Completion, Engine, Env, Op};

const PAGE: u64 = 4096;
const SLOT: FileSlot = FileSlot(2);

/// A folder on a disk, with a file in which each page says its number; durable, so that the host may forget it.
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

/// The buffer as a guest's memory; for as long as it is there.
fn slices(buffer: &mut Buffer) -> GuestIovecs {
    let mut slices = GuestIovecs::new(std::sync::Arc::new(()), 2);
    let (start, half) = (buffer.as_mut_ptr(), buffer.len() / 2);
    // SAFETY: both halves lie in the buffer, and it is not used while they are.
    unsafe {
        slices.push(start.wrapping_add(half), buffer.len() - half);
        slices.push(start, half);
    }
    let mut all = GuestIovecs::with_capacity(2);
    slices.slice_into(buffer.len() - half, half, &mut all);
    slices.slice_into(0, buffer.len() - half, &mut all);
    all
}

fn ring(file: &File) -> Option<UringEngine> {
    let mut ring = UringEngine::new(8).map_err(|e| eprintln!("skipped for io_uring: {e}")).ok()?;
    ring.register(SLOT, file).unwrap();
    Some(ring)
}

/// Copies, or lets the ring do it.
fn done(ring: &mut UringEngine, mut op: Op) -> Completion {
    if let (Action::Read, Payload::Own(buffer)) = (op.action, &mut op.payload) {
        let memory = slices(buffer);
        let copied =
            ring.find_cached(SLOT, op.offset, memory.len()).is_some_and(|found| ring.copy_cached(&found, &memory, 0));
        ring.end_copy_batch();
        ring.query_residency();
        if copied {
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

/// Reads pages with one operation each; how many calls that took.
fn read_all(ring: &mut UringEngine, pages: impl Iterator<Item = u64>, expected: impl Fn(u64) -> u64) -> u64 {
    let calls = ring.system_calls();
    for page in pages {
        let Completion { op, result } = done(ring, read(page * PAGE, PAGE as usize));
        result.unwrap();
        let Payload::Own(bytes) = op.payload else { unreachable!() };
        assert!(*bytes == expected(page).to_be_bytes().repeat(512), "page {page}");
    }
    ring.system_calls() - calls
}

#[test]
fn what_is_read_again_and_again_takes_no_call() {
    let (_folder, file) = pages(128);
    let Some(mut ring) = ring(&file) else { return };
    let number = |page| page + 1;
    assert!(read_all(&mut ring, 0..128, number) >= 3, "at first nothing is known");
    for _ in 0..3 {
        read_all(&mut ring, 0..128, number);
    }
    assert_eq!(read_all(&mut ring, 0..128, number), 0);
    // Over the border of what the kernel is asked about at once.
    let (border, calls) = ((256 << 10) - 512, |ring: &UringEngine| (ring.system_calls(), ring.copy_count()));
    let before = calls(&ring);
    done(&mut ring, read(border, PAGE as usize)).result.unwrap();
    assert_eq!(calls(&ring), (before.0, before.1 + 1));
    // What others write, and what is punched, is what is read. (A hole has to be made a page first, which may count as a wait.)
    file.write_at(&[0; PAGE as usize], 7 * PAGE).unwrap();
    file.punch_hole(9 * PAGE, PAGE).unwrap();
    let written = done(&mut ring, Op::write(0, SLOT, 8 * PAGE, Payload::Own(Buffer::zeroed(PAGE as usize))));
    written.result.unwrap();
    let zeros = |page| if (7..10).contains(&page) { 0 } else { page + 1 };
    read_all(&mut ring, 0..64, zeros);
    // Any part of it, and any number of runs.
    let Completion { op, result } = done(&mut ring, read(20 * PAGE - 512, 5000));
    result.unwrap();
    let Payload::Own(bytes) = op.payload else { unreachable!() };
    assert!(bytes[..512] == 20u64.to_be_bytes().repeat(64) && bytes[512..4608] == 21u64.to_be_bytes().repeat(512));
    ring.unregister(SLOT).unwrap();
    assert!(done(&mut ring, read(0, 512)).result.is_err());
}

#[test]
fn what_lies_in_two_windows_is_learned() {
    let (_folder, file) = pages(128);
    let Some(mut ring) = ring(&file) else { return };
    for _ in 0..10 {
        done(&mut ring, read((256 << 10) - 512, PAGE as usize)).result.unwrap();
    }
    assert!(ring.copy_count() > 0);
}

#[test]
fn long_reads_are_learned_whole_and_copied_in_pieces() {
    let (_folder, file) = pages(512);
    let Some(mut ring) = ring(&file) else { return };
    let (at, len) = (3 * PAGE + 512, (500 * PAGE) as usize);
    let ask = |ring: &mut UringEngine| {
        let Completion { op, result } = done(ring, read(at, len));
        result.unwrap();
        let Payload::Own(bytes) = op.payload else { unreachable!() };
        let number = |at: u64| (at / PAGE + 1).to_be_bytes();
        assert!(bytes.chunks(8).zip((at..).step_by(8)).all(|(bytes, at)| *bytes == number(at)));
    };
    // The file is not mapped for a long read, all of its windows are asked for after the second when it is.
    ask(&mut ring);
    read_all(&mut ring, 0..1, |_| 1);
    (0..2).for_each(|_| ask(&mut ring));
    assert_eq!(ring.copy_count(), 0);
    let calls = ring.system_calls();
    ask(&mut ring);
    assert_eq!((ring.copy_count(), ring.system_calls() - calls), (1, 0));
    // One page of it is not there any more, as far as is known.
    host_file(&file).unwrap().file_map().invalidate(300 * PAGE, 1);
    let calls = ring.system_calls();
    ask(&mut ring);
    assert!(ring.copy_count() == 1 && ring.system_calls() > calls);
}

#[test]
fn nobody_copies_what_another_found() {
    let (_folder, file) = pages(64);
    let (Some(mut ring), Some(mut other)) = (ring(&file), ring(&file)) else { return };
    for _ in 0..4 {
        read_all(&mut ring, 0..64, |page| page + 1);
    }
    let found = ring.find_cached(SLOT, 0, 512).expect("it is known");
    let mut buffer = Buffer::zeroed(512);
    assert!(other.copy_cached(&found, &slices(&mut buffer), 0), "the same open file");
    let (_folder, next) = pages(64);
    other.register(SLOT, &next).unwrap();
    assert!(!other.copy_cached(&found, &slices(&mut buffer), 0));
    assert!(!ring.copy_cached(&CachedRange::new(SLOT, 0, 512), &slices(&mut buffer), 0));
}

#[test]
fn a_file_that_was_cut_is_an_error_and_grows_again() {
    let (_folder, file) = pages(64);
    let Some(mut ring) = ring(&file) else { return };
    for _ in 0..4 {
        read_all(&mut ring, 0..64, |page| page + 1);
    }
    file.set_len(10 * PAGE + 100).unwrap();
    assert_eq!(done(&mut ring, read(20 * PAGE, 512)).result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(read_all(&mut ring, 0..10, |page| page + 1) <= 3, "the others are soon known again");
    file.set_len(64 * PAGE).unwrap();
    read_all(&mut ring, 11..64, |_| 0);
}

#[test]
fn long_reads_direct_files_and_the_ends_of_regions_are_for_the_ring() {
    const REGION: u64 = 256 << 20;
    let (folder, file) = pages(64);
    file.set_len(REGION + 64 * PAGE).unwrap();
    file.write_at(&[9; 8192], REGION - PAGE).unwrap();
    let Some(mut ring) = ring(&file) else { return };
    let calls = |ring: &mut UringEngine, offset, len| {
        for _ in 0..9 {
            done(ring, read(offset, len)).result.unwrap();
        }
        let before = ring.system_calls();
        done(ring, read(offset, len)).result.unwrap();
        ring.system_calls() - before
    };
    assert_eq!(calls(&mut ring, REGION - PAGE, PAGE as usize), 0);
    assert_eq!(calls(&mut ring, REGION, PAGE as usize), 0);
    assert_ne!(calls(&mut ring, REGION - PAGE, 8192), 0);
    assert_ne!(calls(&mut ring, 0, MAX_COPY + 512), 0);
    let direct = Host.open(&Path::new(folder.path()).join("f"), Access::Read).unwrap();
    if direct.set_direct().unwrap().is_some() {
        ring.register(SLOT, &direct).unwrap();
        assert_ne!(calls(&mut ring, 0, PAGE as usize), 0);
    }
}

#[test]
fn who_waited_for_a_page_copies_no_more_for_a_while() {
    let (_folder, file) = pages(64);
    let mut warm = PageCacheReader::new();
    warm.register(SLOT, &file).unwrap();
    let (host, at) = (host_file(&file).unwrap().clone(), 16 * PAGE);
    let mut buffer = Buffer::zeroed(PAGE as usize);
    let memory = slices(&mut buffer);
    // To be compared with later.
    warm.judge_by(Duration::from_secs(1));
    // Whether it is learned that the page is in memory; it is not touched.
    let learns = || {
        (0..8).any(|_| {
            host.read_at(&mut [0; 1], at).unwrap();
            host.file_map().query(&host, at, 1, || Some(64 * PAGE));
            matches!(host.file_map().residency(at, PAGE as usize), Residency::Resident(_))
        })
    };
    let copy = |warm: &mut PageCacheReader, took| {
        warm.run_queries(); // which looks whether it is held
        let found = warm.find(SLOT, at, PAGE as usize);
        let copied = found.is_some_and(|found| warm.copy(&found, &memory, 0));
        warm.judge_by(took);
        warm.batch.clear();
        copied
    };
    assert!(learns());
    // Nobody has touched the mapping yet, so the host can forget the page.
    rustix::fs::fadvise(&host, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(copy(&mut warm, Duration::from_millis(1)), "the host reads it again");
    assert!(!matches!(host.file_map().residency(at, PAGE as usize), Residency::Resident(_)), "forgotten");
    assert!(learns() && !copy(&mut warm, Duration::ZERO), "held");
    std::thread::sleep(Duration::from_millis(150));
    assert!(copy(&mut warm, Duration::from_secs(1)), "held no more");
    assert!(copy(&mut warm, Duration::ZERO), "that was slow, but not for a page");
    assert_eq!(buffer[..8], 17u64.to_be_bytes());
}

#[test]
fn who_is_late_for_other_reasons_goes_on() {
    let (now, long_ago) = (Instant::now(), Instant::now() - FAR_TOO_LONG * 2);
    assert!(!takes_too_long(&mut None, -1) && !takes_too_long(&mut Some(now + Duration::from_secs(9)), -1));
    let mut began = Some(long_ago);
    assert!(takes_too_long(&mut began, -1), "it has waited since");
    assert_eq!(began, Some(long_ago), "the whole batch is judged");
    assert!(!takes_too_long(&mut began, i64::MAX) && began.unwrap() >= now, "looked at anew from now on");
}

#[test]
fn files_that_share_a_place_among_the_recent_are_told_apart() {
    let ((_one, one), (_other, other)) = (pages(64), pages(64));
    other.write_at(&[9; PAGE as usize], 0).unwrap();
    let (mut warm, mut buffer) = (PageCacheReader::new(), Buffer::zeroed(PAGE as usize));
    let (first, second) = (FileSlot(2), FileSlot(130));
    warm.register(first, &one).unwrap();
    warm.register(second, &other).unwrap();
    for file in [&one, &other].map(|file| host_file(file).unwrap()) {
        // First it is mapped.
        (0..2).for_each(|_| file.file_map().query(file, 0, PAGE as usize, || Some(64 * PAGE)));
    }
    let mut byte = |warm: &mut PageCacheReader, slot| {
        let found = warm.find(slot, 0, PAGE as usize).expect("it is known");
        assert!(warm.copy(&found, &slices(&mut buffer), 0));
        (found, buffer[7])
    };
    let mut found = None;
    for (slot, want) in [(first, 1), (second, 9), (second, 9), (first, 1), (second, 9), (first, 1)] {
        let (at, got) = byte(&mut warm, slot);
        assert_eq!(got, want);
        found = Some(at);
    }
    warm.register(first, &other).unwrap();
    let mut memory = Buffer::zeroed(PAGE as usize);
    assert!(!warm.copy(&found.unwrap(), &slices(&mut memory), 0), "what was found in another file");
    assert_eq!(byte(&mut warm, first).1, 9);
    warm.unregister(first);
    assert!(warm.find(first, 0, 512).is_none());
}
