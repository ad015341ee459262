//! Sessions: image and live journal under kills at every step, copies, restores, other runtime folders and other
//! machines.
//!
//! A scenario returns an error if a check fails. The production code passes all scenarios; each mutant in [`MUTANTS`]
//! must fail at least one.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::chain::{self, Chain, OpenMode, Policy};
use diffdisk::disk::{Disk, DiskOptions, Lane, Outcome, Request, Work, ZeroRange};
use diffdisk::error::{Error, ErrorKind};
use diffdisk::image::{self, Durability, ImageKind, ImageSpec, ParentLink};
use diffdisk::mutant::{self, Mutant};
use diffdisk::storage::sim::{Fault, FaultPlan, Random, SimHost};
use diffdisk::storage::{Access, EngineKind, Env, Lock};
use diffdisk::units::{BlockSize, SectorRange};

use crate::checker;
use crate::layouts::{self, BLOCK, Layout, top};
use crate::memory::TestMemory;
use crate::model::{self, Value};

type CheckResult = Result<(), String>;

/// Values written since the disk was made, by sector: the last acknowledged one, and all submitted ones.
#[derive(Clone, Default)]
struct WrittenValues {
    acknowledged: BTreeMap<u64, Value>,
    submitted: BTreeMap<u64, Vec<Value>>,
}

/// A guest on a disk.
struct Guest {
    lane: Lane,
    disk: Arc<Disk>,
}

fn options(host: &SimHost, path: &Path, folder: &str) -> DiskOptions {
    let folder = host.runtime_folder(Path::new(folder)).expect("every folder is in memory");
    let keep = Durability::Journal { folders: vec![folder], required: true };
    DiskOptions { keep, path: path.into(), ..layouts::options(host, false) }
}

fn open_at(host: &SimHost, path: &Path, folder: &str) -> Result<Guest, Error> {
    let disk = Disk::open(Arc::new(host.clone()), &options(host, path, folder))?;
    let lane = disk.lane(EngineKind::Auto, 32)?;
    Ok(Guest { lane, disk })
}

fn open(host: &SimHost) -> Result<Guest, Error> {
    open_at(host, &top(), "/run")
}

impl Guest {
    fn submit(&mut self, work: Work) -> bool {
        self.lane.push(Request { tag: 1, work });
        let mut answers = Vec::new();
        self.lane.drain(&mut answers).is_ok() && answers.iter().all(|a| a.outcome == Outcome::Done)
    }

    fn write(&mut self, written: &mut WrittenValues, sector: u64, value: Value) {
        let range = SectorRange::between(sector, sector + 1);
        written.submitted.entry(sector).or_default().push(value);
        let from = TestMemory::new(&model::bytes(sector, value)).iovecs(&[512]);
        if self.submit(Work::Write { range, from }) {
            written.acknowledged.insert(sector, value);
        }
    }

    fn zero(&mut self, written: &mut WrittenValues, sector: u64) {
        let range = SectorRange::between(sector, sector + 1);
        written.submitted.entry(sector).or_default().push(0);
        if self.submit(Work::WriteZeroes { ranges: vec![ZeroRange { range, unmap: true }] }) {
            written.acknowledged.insert(sector, 0);
        }
    }

    fn flush(&mut self) -> bool {
        self.submit(Work::Flush)
    }

    /// Checks the contents of the disk. `base` has the contents before the first write.
    fn check(&self, written: &WrittenValues, base: &[Value]) -> CheckResult {
        let values = checker::read_disk(&self.disk.version())?;
        for (sector, value) in (0..).zip(values) {
            let answered = written.acknowledged.get(&sector).copied();
            // A value that was submitted after the last acknowledged one may have been written.
            let asked = written.submitted.get(&sector).map_or(&[][..], Vec::as_slice);
            let from = answered.and_then(|v| asked.iter().rposition(|a| *a == v)).unwrap_or(0);
            let may_be = asked.get(from..).is_some_and(|later| later.contains(&value));
            if !may_be && value != answered.unwrap_or(base[sector as usize]) {
                return Err(format!("sector {sector} has {value}; acknowledged: {answered:?}, submitted: {asked:?}"));
            }
        }
        Ok(())
    }

    fn close(self) -> Result<(), Error> {
        drop(self.lane);
        self.disk.close()
    }
}

fn error_line(e: Error) -> String {
    e.line()
}

/// Kills the process. The seed decides which operations in flight take effect.
fn kill(host: &SimHost, seed: u64) -> SimHost {
    host.kill(&mut Random::new(seed))
}

fn expect_refused<T>(result: Result<T, Error>, what: &str) -> Result<String, String> {
    match result {
        Ok(_) => Err(format!("{what} is accepted")),
        Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::Busy) => Ok(e.line()),
        Err(e) => Err(format!("{what} fails with another error: {}", e.line())),
    }
}

fn bytes(host: &SimHost, path: &Path) -> Vec<u8> {
    host.bytes(path).expect("the file is there")
}

/// Replaces the contents of a file in place, as some restores do.
fn restore(host: &SimHost, path: &Path, bytes: &[u8]) {
    let file = host.open(path, Access::Write).expect("it is there");
    file.set_len(0).expect("it can be cut");
    file.write_at(bytes, 0).expect("it can be written");
}

fn copy(host: &SimHost, name: &str, bytes: &[u8]) -> PathBuf {
    let path = PathBuf::from(format!("/disk/{name}"));
    let folder = host.folder(Path::new("/disk")).expect("it is there");
    folder.create(name.as_ref()).expect("a new name").write_at(bytes, 0).expect("it can be written");
    path
}

/// Runs a guest from opening to closing, or until the machine stops.
fn run_guest(host: &SimHost, written: &mut WrittenValues, round: Value) -> Result<(), Error> {
    let mut guest = open(host)?;
    let value = |n: Value| round * 100 + n;
    guest.write(written, 1, value(2));
    guest.write(written, 2 * BLOCK + 4, value(3));
    host.advance_clock(1);
    guest.write(written, 2, value(4));
    guest.flush();
    guest.write(written, 3, value(5));
    guest.zero(written, 5 * BLOCK + 1);
    guest.flush();
    host.advance_clock(1);
    // Enough blocks to make the file grow.
    for block in 6..19 {
        guest.write(written, block * BLOCK + 2, value(10 + block as Value));
    }
    guest.write(written, 3, value(6));
    guest.close()
}

/// Checks a disk after a kill: it opens, has all acknowledged values, and takes writes. After it is closed and stale
/// journals are removed, there is no journal and no defect, and the disk still has these values.
fn check_reopen(host: &SimHost, written: &WrittenValues, layout: &Layout) -> CheckResult {
    let mut written = written.clone();
    let mut guest = open(host).map_err(|e| format!("the disk does not open: {}", e.line()))?;
    guest.check(&written, &layout.values)?;
    guest.zero(&mut written, 4 * BLOCK + 3);
    guest.write(&mut written, 3 * BLOCK, 90_001);
    guest.check(&written, &layout.values).map_err(|e| format!("after more writes: {e}"))?;
    guest.close().map_err(|e| format!("the disk does not close: {}", e.line()))?;
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::remove_stale_journals(host, &runtime).map_err(error_line)?;
    if !host.shm_names().is_empty() {
        return Err(format!("a clean end leaves {:?}", host.shm_names()));
    }
    let (report, _) = image::check(host.open(&top(), Access::Read).map_err(error_line)?).map_err(error_line)?;
    if let Some(defect) = report.defects.first() {
        return Err(format!("a check finds: {defect}"));
    }
    open(host).map_err(error_line)?.check(&written, &layout.values).map_err(|e| format!("after a clean end: {e}"))
}

/// Kills a process at its first step and at every `every`-th step after it. Then does the same with the second process,
/// which takes over after a kill of the first one.
pub(crate) fn kills(layout: &Layout, every: usize) -> CheckResult {
    for rounds in [1, 2] {
        for step in (1..).step_by(every) {
            let (mut host, mut written) = (layout.host(7), WrittenValues::default());
            if rounds == 2 {
                // The first process is killed in the middle, with marks in the journal.
                host.stop_at(60);
                let _ = run_guest(&host, &mut written, 1);
                host = kill(&host, 3);
            }
            let begun = host.counts().steps;
            host.stop_at(begun + step);
            let ended = run_guest(&host, &mut written, rounds);
            let whole = !host.is_dead();
            if whole {
                ended.map_err(|e| format!("without a kill: {}", e.line()))?;
            }
            for seed in [1, 2] {
                // The same machine is killed twice; the seed decides which operations in flight take effect.
                let host = if seed == 1 { kill_copy(&host, seed) } else { kill(&host, seed) };
                check_reopen(&host, &written, layout)
                    .map_err(|e| format!("{}, killed at step {step} of process {rounds}: {e}", layout.name))?;
            }
            if whole {
                break;
            }
        }
    }
    Ok(())
}

/// Kills a copy of the machine, so that the machine can be killed again.
fn kill_copy(host: &SimHost, seed: u64) -> SimHost {
    kill(&host.fork(), seed)
}

/// Injects each fault at each step, one per run, then kills the process: with `soon` after the action that reached the
/// step, otherwise after all actions. If a sync failed, the next open must fail with `Poisoned`. Otherwise the reopened
/// disk must have all acknowledged values.
pub(crate) fn faults(layout: &Layout, soon: bool) -> CheckResult {
    for fault in [Fault::Io, Fault::NoSpace, Fault::Short] {
        for step in 1.. {
            let (host, mut written) = (layout.host(7), WrittenValues::default());
            let mut guest = open(&host).map_err(error_line)?;
            guest.write(&mut written, 1, 2);
            guest.flush();
            let begun = host.counts().steps;
            host.set_faults(FaultPlan { fail: vec![(begun + step, fault)], ..FaultPlan::default() });
            let is_reached = || host.counts().steps >= begun + step;
            for block in (4..19).take_while(|_| !(soon && is_reached())) {
                guest.write(&mut written, block * BLOCK + 2, 10 + block as Value);
            }
            let reached = is_reached();
            if !(soon && reached) {
                host.advance_clock(1);
                guest.write(&mut written, 2, 3);
                guest.flush();
                guest.write(&mut written, 3, 4);
            }
            let reached = if soon { reached } else { is_reached() };
            let poisoned = host.counts().failed_syncs > 0;
            let host = kill(&host, step);
            if poisoned {
                let e = open(&host).map(|_| ()).err().map(|e| e.kind());
                if e != Some(ErrorKind::Poisoned) {
                    return Err(format!(
                        "{}, {fault:?} at {step}: a sync failed, but the next open returns {e:?}",
                        layout.name
                    ));
                }
            } else {
                check_reopen(&host, &written, layout)
                    .map_err(|e| format!("{}, {fault:?} at step {step}, then a kill: {e}", layout.name))?;
            }
            if !reached {
                break;
            }
        }
    }
    Ok(())
}

/// Kills the process at every step of a clean end that trims a block which was reserved and never written.
pub(crate) fn unwritten(layout: &Layout) -> CheckResult {
    for step in 1.. {
        let (host, mut written) = (layout.host(7), WrittenValues::default());
        let mut guest = open(&host).map_err(error_line)?;
        guest.write(&mut written, 1, 2);
        // This write makes the file grow, so that no sync is among the failing operations below.
        guest.write(&mut written, 2 * BLOCK, 3);
        guest.flush();
        let now = host.counts().steps;
        host.set_faults(FaultPlan { fail: vec![(now + 1, Fault::Io), (now + 2, Fault::Io)], ..FaultPlan::default() });
        guest.write(&mut written, 4 * BLOCK, 3);
        host.set_faults(FaultPlan::default());
        host.stop_at(host.counts().steps + step);
        let closed = guest.close();
        let whole = !host.is_dead();
        if whole {
            closed.map_err(error_line)?;
        }
        for seed in 0..2 {
            let host = kill(&host.fork(), seed);
            check_reopen(&host, &written, layout).map_err(|e| format!("killed at step {step} of the end: {e}"))?;
        }
        if whole {
            break;
        }
    }
    Ok(())
}

/// Copies the image between the actions of a process, then kills the process. Each copy that was made during the
/// session must be refused, in place of the image and under another name.
///
/// The last action before the kill is a mark if `ends_marked`, otherwise a flush. With `ends_marked`, the copy from
/// before the session must also open with the old contents, and the last state under another name.
pub(crate) fn copies(layout: &Layout, ends_marked: bool) -> CheckResult {
    let (host, mut written) = (layout.host(7), WrittenValues::default());
    // In a dynamic root the first write marks all sectors of its block, so a new mark needs another block.
    let new = |n: u64| if layout.name.contains("dynamic") { (2 + n) * BLOCK + n } else { n };
    let mut copies = vec![("before the session", bytes(&host, &top()))];
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut written, 1, 2);
    guest.flush();
    host.advance_clock(1);
    copies.push(("after the first flush", bytes(&host, &top())));
    guest.write(&mut written, new(2), 3);
    // The clock stands still until the flush below is complete. Without `ends_marked`, only the commit of this flush
    // renews the generation after this copy.
    copies.push(("before the second flush", bytes(&host, &top())));
    guest.flush();
    if ends_marked {
        host.advance_clock(1);
        copies.push(("after the second flush", bytes(&host, &top())));
        guest.write(&mut written, new(3), 4);
    }
    let host = kill(&host, 1);
    let last = bytes(&host, &top());
    for (when, old) in &copies[1..] {
        restore(&host, &top(), old);
        expect_refused(open(&host), &format!("{}: the image as it was {when}", layout.name))?;
        let name = copy(&host, "old.vhd", old);
        expect_refused(open_at(&host, &name, "/run"), &format!("{}: a copy made {when}", layout.name))?;
        host.remove(&name).map_err(error_line)?;
    }
    if !ends_marked {
        return Ok(());
    }
    // The copy from before the session has no stamp and opens with the old contents. `remove_stale_journals` must keep
    // the journal, which the moved image below needs.
    restore(&host, &top(), &copies[0].1);
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::remove_stale_journals(&host, &runtime).map_err(error_line)?;
    let guest = open(&host).map_err(error_line)?;
    guest.check(&WrittenValues::default(), &layout.values)?;
    guest.close().map_err(error_line)?;
    image::remove_stale_journals(&host, &runtime).map_err(error_line)?;
    // The journal is replayed into an image that was moved. Then the session has ended, and the image is refused at its
    // old place.
    let moved = copy(&host, "moved.vhd", &last);
    let guest = open_at(&host, &moved, "/run").map_err(|e| format!("the moved image: {}", e.line()))?;
    guest.check(&written, &layout.values)?;
    guest.close().map_err(error_line)?;
    restore(&host, &top(), &last);
    expect_refused(open(&host), "an image whose copy was recovered")?;
    Ok(())
}

/// Of a killed image and a copy of it, only one can be opened. The process that opens the copy is killed at every step.
/// Then the image opens, and the copy is refused; or the image is refused, and the copy opens.
pub(crate) fn two_copies(layout: &Layout) -> CheckResult {
    for step in 1..40 {
        let (host, mut written) = (layout.host(7), WrittenValues::default());
        let mut guest = open(&host).map_err(error_line)?;
        guest.write(&mut written, 1, 2);
        guest.flush();
        guest.write(&mut written, 2, 3);
        drop(guest);
        let host = kill(&host, 1);
        let other = copy(&host, "other.vhd", &bytes(&host, &top()));
        // The process that opens the copy is killed at step `step` of the open.
        host.stop_at(host.counts().steps + step);
        let whole = open_at(&host, &other, "/run").is_ok();
        for seed in 0..8 {
            let host = kill(&host.fork(), seed);
            let mut written = written.clone();
            match open(&host) {
                Ok(mut guest) => {
                    guest.check(&written, &layout.values)?;
                    // Sector 2 is already marked, so this write does not renew the generation. The copy can be refused
                    // only because of the generation that was written after the replay.
                    guest.write(&mut written, 2, 4);
                    drop(guest);
                    let host = kill(&host, 1);
                    expect_refused(open_at(&host, &other, "/run"), "the copy of an image that was served again")?;
                    open(&host).map_err(error_line)?.check(&written, &layout.values)?;
                }
                Err(e) if e.kind() == ErrorKind::Refused => {
                    open_at(&host, &other, "/run")
                        .map_err(|e| format!("step {step}: neither copy opens: {}", e.line()))?
                        .check(&written, &layout.values)?;
                }
                Err(e) => return Err(error_line(e)),
            }
        }
        if whole {
            break;
        }
    }
    Ok(())
}

/// Checks that these opens are refused: of a copy of an image that is served; and, after a kill, by a daemon without
/// the journal, by a reader, by a tool, by `check`, and on another machine. After [`image::settle`] or
/// [`image::discard_session`] the image opens.
pub(crate) fn non_successors(layout: &Layout) -> CheckResult {
    let (host, mut written) = (layout.host(7), WrittenValues::default());
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut written, 1, 2);
    guest.flush();
    // The copy has the stamp of a session whose daemon runs.
    let running = copy(&host, "running.vhd", &bytes(&host, &top()));
    expect_refused(open_at(&host, &running, "/run"), "a copy of a running image")?;
    drop(guest);
    let host = kill(&host, 1);
    let message = expect_refused(open_at(&host, &top(), "/other"), "an image whose journal lies elsewhere")?;
    if !message.contains("/run") || !message.contains("settle") {
        return Err(format!("the message lacks the folder or the command: {message}"));
    }
    // The journal is found in any of several folders.
    let twin = kill(&host.fork(), 1);
    let folder = |path: &str| twin.runtime_folder(Path::new(path)).expect("every folder is in memory");
    let keep = Durability::Journal { folders: vec![folder("/other"), folder("/run")], required: true };
    let options = DiskOptions { keep, ..layouts::options(&twin, false) };
    Disk::open(Arc::new(twin.clone()), &options).map_err(|e| format!("with two folders: {}", e.line()))?;
    let env: &dyn Env = &host;
    expect_refused(Chain::open(env, &top(), &Policy::default(), OpenMode::Read), "to a reader, a killed image")?;
    let writable = Chain::open(env, &top(), &Policy::default(), OpenMode::Write);
    expect_refused(
        writable.and_then(|chain| chain.into_writable(env, &Durability::FlushOnly)),
        "to a tool, a killed image",
    )?;
    let checked = |host: &SimHost| chain::check(host, host.open(&top(), Access::Read)?, None, &[], &mut |_| Ok(()));
    expect_refused(checked(&host), "to a check, a killed image")?;
    // The daemon may still run on the machine on which the session began.
    let away = kill(&host.fork(), 1);
    away.move_to_another_machine(9);
    expect_refused(open(&away), "an image of another machine")?;
    let runtime = away.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::discard_session(&away, std::slice::from_ref(&runtime), &top()).map_err(error_line)?;
    open(&away).map_err(error_line)?.close().map_err(error_line)?;
    // Discarding on this machine keeps flushed data and removes the journal.
    let given_up = kill(&host.fork(), 1);
    let runtime = given_up.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::discard_session(&given_up, std::slice::from_ref(&runtime), &top()).map_err(error_line)?;
    if !given_up.shm_names().is_empty() {
        return Err("a discarded journal is not removed".into());
    }
    check_reopen(&given_up, &written, layout)?;
    // Every program may open a settled image.
    let file = host.open(&top(), Access::Write).map_err(error_line)?;
    file.lock(Lock::Exclusive).map_err(error_line)?;
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    if !image::settle(env, std::slice::from_ref(&runtime), &file).map_err(error_line)?
        || image::settle(env, std::slice::from_ref(&runtime), &file).map_err(error_line)?
    {
        return Err("settle must return true, then false".into());
    }
    drop(file);
    Chain::open(env, &top(), &Policy::default(), OpenMode::Read).map_err(error_line)?;
    checked(&host).map_err(error_line)?;
    check_reopen(&host, &written, layout)
}

/// On a file system that several machines use, another machine refuses the image after each acknowledged write, even if
/// the machine of the daemon was cut off and its unsynced writes are lost. After a clean end the other machine opens
/// the image.
pub(crate) fn shared_file_system(layout: &Layout) -> CheckResult {
    let (host, mut written) = (layout.host(7), WrittenValues::default());
    host.set_faults(FaultPlan { shared_file_system: true, ..FaultPlan::default() });
    let mut guest = open(&host).map_err(error_line)?;
    // Enough blocks to make the file grow.
    for block in 0..19 {
        guest.write(&mut written, block * BLOCK + 2, 2 + block as Value);
        for survives in [false, true] {
            let other = host.crash_with(&|_| survives);
            other.move_to_another_machine(9);
            expect_refused(open(&other), "an image of a machine that was cut off")?;
        }
    }
    guest.close().map_err(error_line)?;
    let other = host.crash_with(&|_| false);
    other.move_to_another_machine(9);
    open(&other).map_err(error_line)?.check(&written, &layout.values)
}

/// The sync of the first stamp fails on a file system that other machines use: the image is poisoned, also for the next
/// daemon.
pub(crate) fn unsynced_stamp(layout: &Layout) -> CheckResult {
    let (host, mut written) = (layout.host(7), WrittenValues::default());
    let mut guest = open(&host).map_err(error_line)?;
    let next = host.counts().syncs + 1;
    host.set_faults(FaultPlan { shared_file_system: true, failing_syncs: vec![next], ..FaultPlan::default() });
    guest.write(&mut written, 1, 2);
    if host.counts().failed_syncs != 1 {
        return Err("the first write does not sync the stamp".into());
    }
    if guest.flush() {
        return Err("a flush succeeds after a failed sync".into());
    }
    drop(guest);
    match open(&kill(&host, 1)) {
        Err(e) if e.kind() == ErrorKind::Poisoned => Ok(()),
        Err(e) => Err(format!("the next open fails with another error: {}", e.line())),
        Ok(_) => Err("the next open accepts the session of a poisoned image".into()),
    }
}

/// A parent whose daemon was killed. A read-only open and a check of the child are refused, and so is a daemon without
/// the journal of the parent. A daemon with the journal replays it into the parent.
pub(crate) fn killed_parent(layout: &Layout) -> CheckResult {
    let (host, mut written) = (layout.host(7), WrittenValues::default());
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut written, 1, 2);
    let uuid = guest.disk.version().top().expect("it is writable").image.image().uuid();
    drop(guest);
    let host = kill(&host, 1);
    let name = PathBuf::from("top.vhd");
    let link = ParentLink { uuid, modified: host.now(), relative: Some(name.clone()), absolute: None, name };
    let block_size = BlockSize::from_bytes(4096).expect("the smallest");
    let size = layout.values.len() as u64 * 512;
    let child = Path::new("/disk/child.vhd");
    image::create(&host, child, &ImageSpec { kind: ImageKind::Differencing(link), size, block_size, reserve: 0 })
        .map_err(error_line)?;
    let env: &dyn Env = &host;
    expect_refused(Chain::open(env, child, &Policy::default(), OpenMode::Read), "to a reader, a killed parent")?;
    let file = host.open(child, Access::Read).map_err(error_line)?;
    expect_refused(
        chain::check(env, file, Some(&Policy::default()), &[], &mut |_| Ok(())),
        "to a check, a killed parent",
    )?;
    expect_refused(open_at(&host, child, "/other"), "to a daemon without its journal, a killed parent")?;
    let guest =
        open_at(&host, child, "/run").map_err(|e| format!("a daemon does not settle the parent: {}", e.line()))?;
    guest.check(&written, &layout.values)?;
    guest.close().map_err(error_line)?;
    Chain::open(env, child, &Policy::default(), OpenMode::Read).map_err(error_line)?;
    check_reopen(&host, &written, layout)
}

/// A guest that only reads and flushes changes neither image nor runtime folder.
pub(crate) fn read_only_guest(layout: &Layout) -> CheckResult {
    let host = layout.host(7);
    open(&host).map_err(error_line)?.close().map_err(error_line)?; // recovers and trims an image of another writer
    let before = bytes(&host, &top());
    let mut guest = open(&host).map_err(error_line)?;
    guest.check(&WrittenValues::default(), &layout.values)?;
    guest.flush();
    if bytes(&host, &top()) != before || !host.shm_names().is_empty() {
        return Err("reading changes the image or leaves a journal".into());
    }
    drop(guest);
    check_reopen(&kill(&host, 1), &WrittenValues::default(), layout)
}

/// Runs all scenarios on a layout.
pub(crate) fn run_all(layout: &Layout, every: usize) -> CheckResult {
    let named = |what: &str, outcome: CheckResult| outcome.map_err(|e| format!("{what}, {}: {e}", layout.name));
    named("readers", read_only_guest(layout))?;
    named("others", non_successors(layout))?;
    named("shared file system", shared_file_system(layout))?;
    named("unsynced stamp", unsynced_stamp(layout))?;
    named("copies", copies(layout, true))?;
    named("copies", copies(layout, false))?;
    named("twins", two_copies(layout))?;
    named("parents", killed_parent(layout))?;
    named("faults", faults(layout, false))?;
    named("faults", faults(layout, true))?;
    named("unwritten", unwritten(layout))?;
    named("kills", kills(layout, every))
}

/// The mutants that these scenarios must find; the random runs do not search for them.
pub(crate) const MUTANTS: [Mutant; 19] = [
    Mutant::RemoveJournalFirst,
    Mutant::StampUnsynced,
    Mutant::LateStamp,
    Mutant::TrimFirst,
    Mutant::SplitPair,
    Mutant::StampLeftBehind,
    Mutant::UndoCutsStamp,
    Mutant::ScrubStamp,
    Mutant::NewSessionOnTakeover,
    Mutant::NoTakeoverGeneration,
    Mutant::NoCommitGeneration,
    Mutant::NoMarkGeneration,
    Mutant::CountedGeneration,
    Mutant::SlotsNotEnded,
    Mutant::NoJournalLock,
    Mutant::StaleJournalRemoved,
    Mutant::IgnoreParentStamp,
    Mutant::ToolIgnoresStamp,
    Mutant::SlotReplacesBits,
];

/// Searches for a mutant. Returns the failure.
pub(crate) fn find(mutant: Mutant, layouts: &[Layout]) -> Option<String> {
    let found = layouts.iter().find_map(|layout| {
        mutant::enable(Some(mutant));
        let run = catch_unwind(AssertUnwindSafe(|| run_all(layout, 1)));
        mutant::enable(None);
        run.unwrap_or_else(|_| Err("an assertion of the code failed".into())).err()
    });
    mutant::enable(None);
    found
}
