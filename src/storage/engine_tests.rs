//! Tests that run the same operations on both engines of the host, on real files.
#![allow(unsafe_code, clippy::cast_possible_truncation)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::blocking::BlockingEngine;
use super::host::Host;
use super::payload::{Buffer, GuestIovecs, Payload};
use super::uring::UringEngine;
use super::{Access, Action, Completion, Engine, Env, FILE_SLOTS, File, FileSlot, Lock, Op};

/// Memory of a simulated guest, aligned for direct files.
struct TestGuest {
    start: *mut u8,
    memory: Buffer,
}

// SAFETY: `start` points to the heap memory of `memory`, which lives as long as self and is not tied to a thread.
unsafe impl Send for TestGuest {}
// SAFETY: shared access only reads the pointer. The bytes are accessed only through it, by code with its own proof.
unsafe impl Sync for TestGuest {}

impl TestGuest {
    fn new(len: usize) -> Arc<TestGuest> {
        let mut memory = Buffer::zeroed(len);
        Arc::new(TestGuest { start: memory.as_mut_ptr(), memory })
    }

    fn iovecs(self: &Arc<TestGuest>, runs: impl IntoIterator<Item = (usize, usize)>) -> GuestIovecs {
        let mut s = GuestIovecs::new(self.clone(), 4);
        for (at, len) in runs {
            assert!(at + len <= self.memory.len());
            // SAFETY: the range lies in the memory, which the owner (self) keeps alive.
            unsafe { s.push(self.start.wrapping_add(at), len) };
        }
        s
    }
}

struct TestRandom(u64);

impl TestRandom {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn ring(depth: usize) -> Option<Box<dyn Engine>> {
    match UringEngine::new(depth) {
        Ok(ring) => Some(Box::new(ring)),
        Err(e) => {
            eprintln!("skipped for io_uring: {e}");
            None
        }
    }
}

fn engines(depth: usize) -> Vec<Box<dyn Engine>> {
    ring(depth).into_iter().chain([Box::new(BlockingEngine::new(depth)) as Box<dyn Engine>]).collect()
}

fn file(folder: &Path, name: &str, bytes: &[u8]) -> (File, PathBuf) {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    (Host.open(&path, Access::Write).unwrap(), path)
}

/// Submits, and waits for all outstanding operations.
fn all(engine: &mut dyn Engine) -> Vec<Completion> {
    let mut out = Vec::new();
    engine.submit().unwrap();
    engine.reap(&mut out);
    while engine.outstanding() > 0 {
        engine.wait().unwrap();
        let before = out.len();
        engine.reap(&mut out);
        assert!(out.len() > before, "wait returns when something can be reaped");
    }
    out
}

#[test]
fn both_engines_match_a_vector() {
    const STRIPE: usize = 8192;
    const DEPTH: usize = 16;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let folder = tempfile::tempdir().unwrap();
    let mut both = engines(DEPTH);
    let paths: Vec<_> = both
        .iter_mut()
        .map(|engine| {
            let (f, path) = file(folder.path(), engine.name(), &[0; STRIPE * DEPTH]);
            engine.register(FileSlot(3), &f).unwrap();
            path
        })
        .collect();
    let mut model = vec![0u8; STRIPE * DEPTH];
    for round in 0..300u64 {
        // One operation per stripe, so that their order does not matter.
        let first = TestRandom(seed ^ (round + 1) << 32 | 1);
        let mut after = Vec::new();
        for engine in &mut both {
            let mut random = TestRandom(first.0);
            let mut next = model.clone();
            for stripe in 0..DEPTH {
                let guest = TestGuest::new(STRIPE);
                let (mut at, end) = (random.below(STRIPE as u64) as usize, STRIPE);
                let len = 1 + random.below((end - at) as u64) as usize;
                at += stripe * STRIPE;
                let mut payload = match random.below(3) {
                    0 => Payload::Own(Buffer::zeroed(len)),
                    // Many runs, or one.
                    1 => Payload::Guest(guest.iovecs((0..len).step_by(600).rev().map(|i| (i, (len - i).min(600))))),
                    _ => Payload::Guest(guest.iovecs([(0, len)])),
                };
                let op = match random.below(7) {
                    0 => Op::range(stripe as u64, FileSlot(3), Action::Punch, at as u64, len as u64),
                    1 => Op::range(stripe as u64, FileSlot(3), Action::Zero, at as u64, len as u64),
                    2 => Op::sync(stripe as u64, FileSlot(3)),
                    3 => Op::read(stripe as u64, FileSlot(3), at as u64, payload),
                    kind => {
                        let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                        match &mut payload {
                            Payload::Guest(s) => s.copy_from(0, &bytes),
                            Payload::Own(b) => b.copy_from_slice(&bytes),
                            Payload::None => unreachable!(),
                        }
                        next[at..at + len].copy_from_slice(&bytes);
                        let write = if kind == 4 { Op::write_through } else { Op::write };
                        write(stripe as u64, FileSlot(3), at as u64, payload)
                    }
                };
                if matches!(op.action, Action::Punch | Action::Zero) {
                    next[at..at + len].fill(0);
                }
                engine.push(op).unwrap();
            }
            let back = engine.push(Op::sync(99, FileSlot(3))).unwrap_err();
            assert_eq!(back.token, 99);
            let calls = engine.system_calls();
            let over = all(engine.as_mut());
            if engine.name() == "io_uring" {
                assert!(engine.system_calls() > calls);
            }
            let mut tokens: Vec<u64> = over.iter().map(|c| c.op.token).collect();
            tokens.sort_unstable();
            assert_eq!(tokens, (0..DEPTH as u64).collect::<Vec<_>>());
            for c in over {
                assert!(c.result.is_ok(), "seed {seed} round {round} {}: {:?}", engine.name(), c);
                if c.op.action != Action::Read {
                    continue;
                }
                let (at, len) = (c.op.offset as usize, c.op.len as usize);
                let mut got = vec![0; len];
                match &c.op.payload {
                    Payload::Guest(s) => s.copy_to(0, &mut got),
                    Payload::Own(b) => got.copy_from_slice(b),
                    Payload::None => unreachable!(),
                }
                assert!(got == model[at..at + len], "seed {seed} round {round} {}", engine.name());
            }
            after.push(next);
        }
        assert!(after.windows(2).all(|w| w[0] == w[1]));
        model = after.pop().unwrap();
        for path in &paths {
            assert!(std::fs::read(path).unwrap() == model, "seed {seed} round {round} {path:?}");
        }
    }
}

#[test]
fn a_batch_is_one_call_and_a_check_for_completions_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut ring) = ring(32) else { return };
    let (f, _) = file(folder.path(), "f", &[1; 32 * 512]);
    ring.register(FileSlot(0), &f).unwrap();
    let readable = |ring: &dyn Engine| {
        let fd = ring.wake_fd().unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).unwrap() > 0
    };
    assert!(!readable(ring.as_ref()));
    for i in 0..32 {
        ring.push(Op::read(i, FileSlot(0), i * 512, Payload::Own(Buffer::zeroed(512)))).unwrap();
    }
    assert_eq!(ring.system_calls(), 0);
    ring.submit().unwrap();
    assert_eq!(ring.system_calls(), 1);
    let mut out = Vec::new();
    while out.len() < 32 {
        ring.wait().unwrap();
        assert!(readable(ring.as_ref()) || ring.outstanding() > 0);
        ring.reap(&mut out);
    }
    let calls = ring.system_calls();
    ring.reap(&mut out);
    ring.submit().unwrap();
    ring.wait().unwrap();
    assert_eq!((ring.system_calls(), ring.outstanding(), out.len()), (calls, 0, 32));
    assert!(!readable(ring.as_ref()));
    // The descriptor stays readable while there are completions to reap.
    ring.push(Op::sync(7, FileSlot(0))).unwrap();
    ring.submit().unwrap();
    let fd = ring.wake_fd().unwrap();
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
    assert!(readable(ring.as_ref()) && readable(ring.as_ref()));
    assert_eq!(all(ring.as_mut()).len(), 1);
}

#[test]
fn failures_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    for mut engine in engines(4) {
        let (f, path) = file(folder.path(), engine.name(), &[5; 1000]);
        let read_only = Host.open(&path, Access::Read).unwrap();
        engine.register(FileSlot(1), &f).unwrap();
        engine.register(FileSlot(FILE_SLOTS - 1), &read_only).unwrap();
        assert!(engine.register(FileSlot(FILE_SLOTS), &f).is_err() && engine.unregister(FileSlot(FILE_SLOTS)).is_err());
        let mut run = |op: Op| {
            engine.push(op).unwrap();
            let c = all(engine.as_mut()).pop().unwrap();
            (c.result, c.op)
        };
        let own = |len| Payload::Own(Buffer::zeroed(len));
        // Reads across the end of the file, at the end, and far beyond.
        for at in [900, 1000, 1 << 40] {
            let e = run(Op::read(0, FileSlot(1), at, own(200))).0.unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof, "{at}");
        }
        let (result, op) = run(Op::read(0, FileSlot(1), 800, own(200)));
        assert!(result.is_ok() && matches!(op.payload, Payload::Own(b) if b.iter().all(|&x| x == 5)));
        for offset in [u64::MAX, 1 << 63] {
            let e = run(Op::read(0, FileSlot(1), offset, own(8))).0.unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
        }
        let e = run(Op::write(0, FileSlot(FILE_SLOTS - 1), 0, own(8))).0.unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
        let e = run(Op::sync(0, FileSlot(2))).0.unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
        // More iovecs than one call accepts.
        let guest = TestGuest::new(1 << 20);
        let many = || guest.iovecs((0..3000).map(|i| (i * 100, 64)));
        guest.iovecs([(0, 1 << 20)]).copy_from(0, &vec![0xAB; 1 << 20]);
        run(Op::write(0, FileSlot(1), 10, Payload::Guest(many()))).0.unwrap();
        assert!(std::fs::read(&path).unwrap()[10..] == vec![0xAB; 3000 * 64]);
        guest.iovecs([(0, 1 << 20)]).zero(0, 1 << 20);
        run(Op::read(0, FileSlot(1), 10, Payload::Guest(many()))).0.unwrap();
        let mut whole = vec![0; 3000 * 64];
        many().copy_to(0, &mut whole);
        assert!(whole.iter().all(|&b| b == 0xAB));
        run(Op::range(0, FileSlot(1), Action::Allocate, 1 << 20, 4096)).0.unwrap();
        assert_eq!(f.stat().unwrap().len, 10 + 3000 * 64);
        engine.unregister(FileSlot(1)).unwrap();
        engine.push(Op::sync(0, FileSlot(1))).unwrap();
        assert!(all(engine.as_mut())[0].result.is_err());
    }
}

#[test]
fn actions_that_a_file_system_lacks_are_unsupported() {
    // tmpfs punches holes but has no FALLOC_FL_ZERO_RANGE.
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: no tmpfs at /dev/shm");
        return;
    };
    for mut engine in engines(1) {
        let (f, _) = file(folder.path(), engine.name(), &[5; 8192]);
        engine.register(FileSlot(0), &f).unwrap();
        engine.push(Op::range(0, FileSlot(0), Action::Zero, 0, 4096)).unwrap();
        let e = all(engine.as_mut()).pop().unwrap().result.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Unsupported, "{}", engine.name());
        assert_eq!(crate::error::Error::io("x", e).kind(), crate::error::ErrorKind::Unsupported);
    }
}

#[test]
fn a_prefetch_completes_and_changes_nothing() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    for mut engine in engines(8) {
        let (f, _) = file(folder.path(), engine.name(), &[5; 8192]);
        engine.register(FileSlot(1), &f).unwrap();
        // Inside the file, across its end, beyond it.
        for (token, at) in [(0, 0), (1, 4096), (2, 1 << 40)] {
            engine.push(Op::range(token, FileSlot(1), Action::Prefetch, at, 8192)).unwrap();
        }
        engine.push(Op::read(3, FileSlot(1), 0, Payload::Own(Buffer::zeroed(8192)))).unwrap();
        let over = all(engine.as_mut());
        assert_eq!(over.len(), 4, "{}", engine.name());
        for c in over {
            assert!(c.result.is_ok(), "{}: {c:?}", engine.name());
            if let Payload::Own(bytes) = &c.op.payload {
                assert!(bytes.iter().all(|b| *b == 5));
            }
        }
        assert_eq!(f.stat().unwrap().len, 8192, "{}", engine.name());
        engine.unregister(FileSlot(1)).unwrap();
        engine.push(Op::range(0, FileSlot(1), Action::Prefetch, 0, 4096)).unwrap();
        assert!(all(engine.as_mut())[0].result.is_err(), "{}", engine.name());
    }
}

#[test]
fn a_writeback_hint_completes_and_changes_nothing() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    for mut engine in engines(8) {
        let (f, path) = file(folder.path(), engine.name(), &[5; 8192]);
        engine.register(FileSlot(1), &f).unwrap();
        engine.push(Op::write(0, FileSlot(1), 4096, Payload::Own(Buffer::copy_of(&[6; 4096])))).unwrap();
        assert!(all(engine.as_mut())[0].result.is_ok());
        engine.push(Op::start_writeback(1, FileSlot(1))).unwrap();
        let over = all(engine.as_mut());
        assert!(over.len() == 1 && over[0].result.is_ok(), "{}: {over:?}", engine.name());
        assert!(std::fs::read(&path).unwrap() == [[5; 4096], [6; 4096]].concat(), "{}", engine.name());
        engine.unregister(FileSlot(1)).unwrap();
        engine.push(Op::start_writeback(0, FileSlot(1))).unwrap();
        assert!(all(engine.as_mut())[0].result.is_err(), "{}", engine.name());
    }
}

#[test]
fn dropping_an_engine_waits_for_operations_in_flight() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    for mut engine in engines(64) {
        let (f, path) = file(folder.path(), engine.name(), &vec![1; 16 << 20]);
        f.sync().unwrap();
        // Direct reads take longer than the drop.
        let _ = f.set_direct().unwrap();
        engine.register(FileSlot(0), &f).unwrap();
        let guest = TestGuest::new(16 << 20);
        for i in 0..32u64 {
            let at = i << 19;
            let payload = Payload::Guest(guest.iovecs([(at as usize, 1 << 19)]));
            engine.push(Op::read(i, FileSlot(0), at, payload)).unwrap();
        }
        engine.submit().unwrap();
        for i in 0..32 {
            engine.push(Op::write(i, FileSlot(0), i << 19, Payload::Own(Buffer::zeroed(512)))).unwrap();
        }
        drop(engine);
        let mut seen = vec![0; 16 << 20];
        guest.iovecs([(0, 16 << 20)]).copy_to(0, &mut seen);
        assert!(seen.iter().all(|&b| b == 1), "submitted operations are complete");
        assert_eq!(Arc::strong_count(&guest), 1, "the engine has released the guest memory");
        assert!(
            std::fs::read(&path).unwrap().iter().all(|&b| b == 1),
            "operations that were not submitted have no effect"
        );
    }
}

#[test]
fn the_first_thread_that_uses_a_ring_owns_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut ring) = ring(2) else { return };
    let (f, _) = file(folder.path(), "f", &[5; 512]);
    ring.register(FileSlot(0), &f).unwrap();
    let mut ring = std::thread::spawn(move || {
        ring.register(FileSlot(1), &f).unwrap();
        ring.push(Op::sync(0, FileSlot(1))).unwrap();
        assert!(all(ring.as_mut())[0].result.is_ok());
        ring.register(FileSlot(2), &f).unwrap();
        ring
    })
    .join()
    .unwrap();
    // The call fails if the kernel ties rings to threads, and succeeds otherwise. It never hangs or panics.
    ring.push(Op::sync(0, FileSlot(0))).unwrap();
    if ring.submit().is_ok() {
        assert!(all(ring.as_mut())[0].result.is_ok());
    }
}

#[test]
fn a_dropped_engine_releases_its_locks() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..50 {
        for mut engine in engines(2) {
            let (f, path) = file(folder.path(), &format!("{}-{round}", engine.name()), &[5; 512]);
            f.lock(Lock::Exclusive).unwrap();
            engine.register(FileSlot(0), &f).unwrap();
            engine.push(Op::sync(0, FileSlot(0))).unwrap();
            assert!(all(engine.as_mut())[0].result.is_ok());
            let name = engine.name();
            drop((engine, f));
            let next = Host.open(&path, Access::Write).unwrap();
            next.lock(Lock::Exclusive).unwrap_or_else(|e| panic!("{name}, round {round}: {}", e.line()));
        }
    }
}
