//! Tests of the simulated host: the behaviour on which other tests rely.
#![allow(clippy::cast_possible_truncation)]

use std::ffi::OsStr;
use std::path::PathBuf;

use super::*;
use crate::error::ErrorKind;
use crate::storage::{Access, Action, Buffer, EngineKind, Env, File, FileSlot, Folder, Lock, Op, Payload};

fn p(name: &str) -> PathBuf {
    PathBuf::from(name)
}

fn n(name: &str) -> &OsStr {
    OsStr::new(name)
}

/// Opens the folder `/d`.
fn d(host: &SimHost) -> Folder {
    host.folder(&p("/d")).unwrap()
}

/// Creates a machine with a durable file `/d/f` of 4 sectors of ones.
fn machine(seed: u64) -> (SimHost, File) {
    let host = SimHost::new(seed);
    let f = d(&host).create(n("f")).unwrap();
    f.write_at(&[1; 2048], 0).unwrap();
    f.sync().unwrap();
    d(&host).sync().unwrap();
    assert_eq!(host.unsynced(), []);
    (host, f)
}

fn write(token: u64, at: u64, byte: u8, len: usize) -> Op {
    Op::write(token, FileSlot(0), at, Payload::Own(Buffer::copy_of(&vec![byte; len])))
}

#[test]
fn every_subset_of_units_can_survive() {
    let (host, f) = machine(1);
    f.write_at(&[2; 1024], 512).unwrap();
    f.write_at(&[3; 512], 512).unwrap();
    f.set_len(4096).unwrap();
    assert_eq!(host.unsynced().len(), 4);
    let mut seen = std::collections::BTreeSet::new();
    for choice in 0..16u32 {
        let after = host.crash_with(&|i| choice >> i & 1 == 1);
        let bytes = after.bytes(&p("/d/f")).unwrap();
        seen.insert((bytes[0], bytes[512], bytes[1024], bytes.len()));
        assert_eq!(after.unsynced(), []);
    }
    // Sector 1 has three values (of four subsets), sector 2 two, the length two.
    assert_eq!(seen.len(), 12);
    assert!(seen.iter().all(|s| s.0 == 1 && [1, 2, 3].contains(&s.1) && [1, 2].contains(&s.2)));
    // The crash had no effect on this machine.
    f.sync().unwrap();
    assert_eq!(host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap()[512], 3);
}

#[test]
fn names_are_durable_after_the_sync_of_their_folder() {
    let (host, _) = machine(1);
    let g = d(&host).create(n("g")).unwrap();
    g.write_at(&[9; 512], 0).unwrap();
    g.sync().unwrap();
    assert_eq!(host.crash_with(&|_| false).names(), [p("/d/f")]);
    d(&host).rename(n("g"), &d(&host), n("f")).unwrap();
    host.folder(&p("/")).unwrap().sync().unwrap();
    let lost = host.crash_with(&|_| false);
    assert_eq!((lost.names(), lost.bytes(&p("/d/f")).unwrap()[0]), (vec![p("/d/f")], 1));
    let renamed = host.crash_with(&|i| host.unsynced()[i] == DurableUnit::Name(p("/d/f")));
    assert_eq!((renamed.names(), renamed.bytes(&p("/d/f")).unwrap()[0]), (vec![p("/d/f")], 9));
    d(&host).sync().unwrap();
    assert_eq!(host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap(), [9; 512]);
    d(&host).link(n("f"), n("h")).unwrap();
    d(&host).remove(n("f")).unwrap();
    assert_eq!(host.names(), [p("/d/h")]);
    let gone = host.crash_with(&|i| i == 1);
    assert_eq!(gone.names(), Vec::<PathBuf>::new(), "only changes of the same name are ordered");
    assert_eq!(d(&host).create(n("h")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    assert_eq!(host.open(&p("/d/none"), Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(host.canonical(&p("/d/../d/./h")).unwrap(), p("/d/h"));
    for bad in ["../h", "/d/h", "x/../../h"] {
        assert_eq!(d(&host).open_beneath(&p(bad)).unwrap_err().kind(), ErrorKind::Refused);
    }
    d(&host).open_beneath(&p("x/../h")).unwrap();
    // Calls on an open folder take a single name, and look it up in that folder.
    let (root, mut names) = (host.folder(&p("/")).unwrap(), d(&host).list().unwrap());
    names.sort();
    assert_eq!((names, root.list().unwrap().len()), (vec![n("h").to_os_string()], 0));
    assert!(root.subfolder(n("d")).unwrap().is_same(&d(&host)) && root.subfolder(n("e")).is_err());
    assert_eq!(d(&host).open(n("d/h"), Access::Read).unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!((d(&host).exists(n("h")).unwrap(), d(&host).exists(n("f")).unwrap()), (true, false));
    assert!(d(&host).open(n("h"), Access::Read).unwrap().folder().is_same(&d(&host)));
}

#[test]
fn a_kill_keeps_completed_operations_and_releases_locks() {
    let mut landed = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let (host, f) = machine(seed);
        f.lock(Lock::Exclusive).unwrap();
        f.write_at(&[2; 512], 0).unwrap();
        let mut engine = host.engine(EngineKind::Auto, 4).unwrap();
        engine.register(FileSlot(0), &f).unwrap();
        engine.push(write(0, 512, 7, 1024)).unwrap();
        engine.submit().unwrap();
        let mut random = Random::new(seed);
        let next = host.kill(&mut random);
        assert!(host.is_dead() && f.read_at(&mut [0], 0).is_err() && engine.wait().is_err());
        let mut out = Vec::new();
        engine.reap(&mut out);
        assert!(out.is_empty());
        drop(engine);
        let again = next.open(&p("/d/f"), Access::Write).unwrap();
        again.lock(Lock::Exclusive).unwrap();
        let bytes = next.bytes(&p("/d/f")).unwrap();
        assert_eq!(bytes[0], 2);
        landed.insert((bytes[512], bytes[1024]));
        // The page cache survives the kill, and is still not durable.
        assert_eq!(next.crash_with(&|_| false).bytes(&p("/d/f")).unwrap()[0], 1);
        assert!(f.lock(Lock::Shared).is_err(), "old handles are dead");
    }
    assert_eq!(landed.into_iter().collect::<Vec<_>>(), [(1, 1), (1, 7), (7, 1), (7, 7)]);
}

#[test]
fn a_crash_tears_operations_in_flight() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let (host, f) = machine(seed);
        let mut engine = host.engine(EngineKind::Auto, 4).unwrap();
        engine.register(FileSlot(0), &f).unwrap();
        engine.push(write(0, 1536, 7, 1024)).unwrap();
        engine.submit().unwrap();
        let bytes = host.crash(&mut Random::new(seed)).bytes(&p("/d/f")).unwrap();
        seen.insert((bytes[1536], bytes.get(2048).copied()));
        assert!(f.stat().is_err());
    }
    // The sector within the old length is old or new. Beyond that sector there are three cases: the old length, the new
    // length without the bytes, or the new length with the bytes.
    assert_eq!(seen.len(), 6, "{seen:?}");
}

#[test]
fn a_crash_tears_sectors_only_within_the_durable_length() {
    let (host, f) = machine(1);
    let len = usize::try_from(f.stat().unwrap().len).unwrap();
    f.write_at(&vec![7; len + 512], 0).unwrap();
    let whole = host.crash_with(&|_| true).bytes(&p("/d/f")).unwrap();
    assert!(whole == vec![7; len + 512]);
    let after = host.crash_torn(&|_| true, &mut |old, new| {
        assert_eq!((old[0], new[0]), (1, 7));
        Some(0b101)
    });
    let bytes = after.bytes(&p("/d/f")).unwrap();
    for sector in bytes[..len].chunks(512) {
        assert!(sector[..4] == [7; 4] && sector[4..8] == [1; 4] && sector[8..12] == [7; 4] && sector[12..] == [1; 500]);
    }
    assert!(bytes[len..] == [7; 512], "the file's new end is whole");
    f.sync().unwrap();
    assert_eq!(host.crash_torn(&|_| true, &mut |_, _| Some(0)).bytes(&p("/d/f")).unwrap()[0], 7, "durable");
}

#[test]
fn operations_complete_once_in_any_order() {
    let mut orders = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let (host, f) = machine(seed);
        let mut engine = host.engine(EngineKind::Auto, 3).unwrap();
        engine.register(FileSlot(0), &f).unwrap();
        for i in 0..3 {
            engine.push(write(i, i * 512, 5, 512)).unwrap();
        }
        assert_eq!(engine.push(Op::sync(9, FileSlot(0))).unwrap_err().token, 9);
        let mut out = Vec::new();
        while engine.outstanding() > 0 {
            let before = out.len();
            engine.wait().unwrap();
            engine.reap(&mut out);
            assert!(out.len() > before);
        }
        assert!(out.iter().all(|c| c.result.is_ok()));
        orders.insert(out.iter().map(|c| c.op.token).collect::<Vec<_>>());
        engine.push(Op::read(0, FileSlot(0), 1024, Payload::Own(Buffer::zeroed(1024)))).unwrap();
        engine.wait().unwrap();
        out.clear();
        engine.reap(&mut out);
        assert!(matches!(&out[0].op.payload, Payload::Own(b) if b[0] == 5 && b[512] == 1));
        engine.push(Op::read(0, FileSlot(0), 1536, Payload::Own(Buffer::zeroed(513)))).unwrap();
        engine.push(Op::sync(1, FileSlot(1))).unwrap();
        host.set_order(CompletionOrder::Pushed);
        engine.submit().unwrap();
        out.clear();
        engine.reap(&mut out);
        let kinds: Vec<_> = out.iter().map(|c| c.result.as_ref().unwrap_err().raw_os_error()).collect();
        assert_eq!(kinds, [Some(libc::EBADF), None]);
    }
    assert_eq!(orders.len(), 6);
}

#[test]
fn a_sync_in_flight_covers_no_later_write() {
    let (host, f) = machine(3);
    host.set_order(CompletionOrder::Pushed);
    let mut engine = host.engine(EngineKind::Auto, 3).unwrap();
    engine.register(FileSlot(0), &f).unwrap();
    f.write_at(&[2; 512], 0).unwrap();
    engine.push(Op::sync(0, FileSlot(0))).unwrap();
    engine.submit().unwrap();
    f.write_at(&[3; 512], 512).unwrap();
    let mut out = Vec::new();
    engine.reap(&mut out);
    assert_eq!(out.len(), 1);
    let after = host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap();
    assert_eq!((after[0], after[512]), (2, 1));
}

#[test]
fn faults_occur_as_planned() {
    let (host, f) = machine(1);
    let n = host.counts().steps;
    let plan = FaultPlan { fail: vec![(n + 2, Fault::Io), (n + 4, Fault::NoSpace)], ..FaultPlan::default() };
    host.set_faults(plan);
    f.write_at(&[2; 512], 0).unwrap();
    assert_eq!(f.sync().unwrap_err().kind(), ErrorKind::Io);
    f.sync().unwrap();
    assert_eq!(f.write_at(&[4; 512], 0).unwrap_err().kind(), ErrorKind::NoSpace);
    // The second sync succeeded without the write, which the failed one had dropped.
    assert_eq!(host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap()[0], 1);
    assert_eq!(host.bytes(&p("/d/f")).unwrap()[0], 2);

    let lies = FaultPlan { lying_syncs: vec![host.counts().syncs + 1], ..FaultPlan::default() };
    host.set_faults(lies);
    f.write_at(&[5; 512], 512).unwrap();
    f.sync().unwrap();
    assert_eq!(host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap()[512], 1);
    f.sync().unwrap();
    assert_eq!(host.crash_with(&|_| false).bytes(&p("/d/f")).unwrap()[512], 5);

    host.stop_at(host.counts().steps + 2);
    f.write_at(&[6; 512], 0).unwrap();
    assert!(f.write_at(&[7; 512], 0).is_err() && host.is_dead());
    // The write at which the machine ended may have been stored.
    let last = host.unsynced().len() - 1;
    assert!(!host.crash_with(&|_| true).is_dead());
    assert_eq!(host.crash_with(&|_| true).bytes(&p("/d/f")).unwrap()[0], 7);
    assert_eq!(host.crash_with(&|i| i != last).bytes(&p("/d/f")).unwrap()[0], 6);
}

#[test]
fn a_failed_allocation_keeps_the_pages_that_it_got() {
    let (host, f) = machine(1);
    host.set_faults(FaultPlan { capacity: Some(16 * 4096), ..FaultPlan::default() });
    assert_eq!(f.allocate(4096, 32 * 4096).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(f.stat().unwrap().allocated, 16 * 4096);
    let g = d(&host).create(n("g")).unwrap();
    assert_eq!(g.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::NoSpace);
    f.write_at(&[1; 512], 15 * 4096).unwrap();
    f.set_len(8192).unwrap();
    g.write_at(&[1; 512], 0).unwrap();
    f.punch_hole(0, 8192).unwrap();
    assert_eq!((f.stat().unwrap().allocated, f.next_data(0).unwrap()), (0, None));
    host.set_faults(FaultPlan { no_allocate: true, ..FaultPlan::default() });
    assert_eq!(f.allocate(0, 4096).unwrap_err().kind(), ErrorKind::Unsupported);
    // Range operations of an engine: Zero keeps the space, Punch frees it.
    host.set_faults(FaultPlan::default());
    f.write_at(&[1; 8192], 0).unwrap();
    let mut engine = host.engine(EngineKind::Auto, 2).unwrap();
    engine.register(FileSlot(0), &f).unwrap();
    engine.push(Op::range(0, FileSlot(0), Action::Zero, 0, 4096)).unwrap();
    engine.push(Op::range(0, FileSlot(0), Action::Punch, 4096, 4096)).unwrap();
    engine.submit().unwrap();
    drop(engine);
    assert_eq!((f.stat().unwrap().allocated, f.next_data(0).unwrap()), (4096, None));
    // A huge range is cheap if it contains little data.
    f.set_len(1 << 60).unwrap();
    f.punch_hole(0, 1 << 60).unwrap();
}

#[test]
fn locks_exclude_other_handles() {
    let (host, f) = machine(1);
    let g = host.open(&p("/d/f"), Access::Write).unwrap();
    f.lock(Lock::Exclusive).unwrap();
    assert_eq!(g.lock(Lock::Shared).unwrap_err().kind(), ErrorKind::Busy);
    f.lock(Lock::Shared).unwrap();
    g.lock(Lock::Shared).unwrap();
    assert_eq!(f.clone().lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Busy);
    drop(g);
    f.lock(Lock::Exclusive).unwrap();
    let reader = host.open(&p("/d/f"), Access::Read).unwrap();
    assert_eq!(reader.lock(Lock::Exclusive).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(reader.write_at(&[0], 0).is_err());
}

#[test]
fn a_seed_determines_the_run() {
    let run = |seed| {
        let (host, f) = machine(seed);
        let mut random = Random::new(seed);
        let mut engine = host.engine(EngineKind::Auto, 8).unwrap();
        engine.register(FileSlot(0), &f).unwrap();
        let mut out = Vec::new();
        for i in 0..200 {
            if engine.push(write(i, random.below(64) * 100, i as u8, 1 + random.below(900) as usize)).is_err() {
                engine.wait().unwrap();
            }
            engine.reap(&mut out);
        }
        let order: Vec<u64> = out.iter().map(|c| c.op.token).collect();
        (order, host.uuid(), host.crash(&mut random).bytes(&p("/d/f")))
    };
    assert!(run(5) == run(5) && run(5) != run(6));
}
