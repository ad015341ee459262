//! Sessions: image and live journal under kills at every step, copies, restores, other folders and other machines.
//!
//! Each scene returns what went wrong. A sound tree passes all of them; each mistake in how sessions work must fail one.

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

/// What sectors hold that were written since the disk was made: what was answered, and what may have landed.
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

    fn write(&mut self, known: &mut WrittenValues, sector: u64, value: Value) {
        let range = SectorRange::between(sector, sector + 1);
        known.submitted.entry(sector).or_default().push(value);
        let from = TestMemory::new(&model::bytes(sector, value)).iovecs(&[512]);
        if self.submit(Work::Write { range, from }) {
            known.acknowledged.insert(sector, value);
        }
    }

    fn zero(&mut self, known: &mut WrittenValues, sector: u64) {
        let range = SectorRange::between(sector, sector + 1);
        known.submitted.entry(sector).or_default().push(0);
        if self.submit(Work::WriteZeroes { ranges: vec![ZeroRange { range, unmap: true }] }) {
            known.acknowledged.insert(sector, 0);
        }
    }

    fn flush(&mut self) -> bool {
        self.submit(Work::Flush)
    }

    /// Holds the disk against what is known. `base`: what it held before anything was written.
    fn check(&self, known: &WrittenValues, base: &[Value]) -> CheckResult {
        let values = checker::read_disk(self.disk.version())?;
        for (sector, value) in (0..).zip(values) {
            let answered = known.acknowledged.get(&sector).copied();
            // What was asked later than what was answered last may have landed.
            let asked = known.submitted.get(&sector).map_or(&[][..], Vec::as_slice);
            let from = answered.and_then(|v| asked.iter().rposition(|a| *a == v)).unwrap_or(0);
            let may_be = asked.get(from..).is_some_and(|later| later.contains(&value));
            if !may_be && value != answered.unwrap_or(base[sector as usize]) {
                return Err(format!("sector {sector} holds {value}, and {answered:?} was answered; asked: {asked:?}"));
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

/// Ends the process; what was under way lands or not as the seed says.
fn kill(host: &SimHost, seed: u64) -> SimHost {
    host.kill(&mut Random::new(seed))
}

fn expect_refused<T>(result: Result<T, Error>, what: &str) -> Result<String, String> {
    match result {
        Ok(_) => Err(format!("{what} is accepted")),
        Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::Busy) => Ok(e.line()),
        Err(e) => Err(format!("{what} fails otherwise: {}", e.line())),
    }
}

fn bytes(host: &SimHost, path: &Path) -> Vec<u8> {
    host.bytes(path).expect("the file is there")
}

/// Puts bytes into a file as a restore in place does: it stays the same file.
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

/// What a guest does from opening to closing; ends where the machine does.
fn run_guest(host: &SimHost, known: &mut WrittenValues, round: Value) -> Result<(), Error> {
    let mut guest = open(host)?;
    let value = |n: Value| round * 100 + n;
    guest.write(known, 1, value(2));
    guest.write(known, 2 * BLOCK + 4, value(3));
    host.advance_clock(1);
    guest.write(known, 2, value(4));
    guest.flush();
    guest.write(known, 3, value(5));
    guest.zero(known, 5 * BLOCK + 1);
    guest.flush();
    host.advance_clock(1);
    // Enough blocks for a step of growth.
    for block in 6..19 {
        guest.write(known, block * BLOCK + 2, value(10 + block as Value));
    }
    guest.write(known, 3, value(6));
    guest.close()
}

/// After the end of a process: the disk opens, holds all that was answered, goes on, and closes without a trace.
fn check_reopen(host: &SimHost, known: &WrittenValues, layout: &Layout) -> CheckResult {
    let mut known = known.clone();
    let mut guest = open(host).map_err(|e| format!("it does not open: {}", e.line()))?;
    guest.check(&known, &layout.values)?;
    guest.zero(&mut known, 4 * BLOCK + 3);
    guest.write(&mut known, 3 * BLOCK, 90_001);
    guest.check(&known, &layout.values).map_err(|e| format!("afterwards {e}"))?;
    guest.close().map_err(|e| format!("it does not close: {}", e.line()))?;
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::remove_stale_journals(host, &runtime).map_err(error_line)?;
    if !host.shm_names().is_empty() {
        return Err(format!("a clean end leaves {:?}", host.shm_names()));
    }
    let (report, _) = image::check(host.open(&top(), Access::Read).map_err(error_line)?).map_err(error_line)?;
    if let Some(defect) = report.defects.first() {
        return Err(format!("a check finds: {defect}"));
    }
    open(host).map_err(error_line)?.check(&known, &layout.values).map_err(|e| format!("after a clean end {e}"))
}

/// A kill at every step of a life, and at every step of the life of a successor. `every`: one step in so many.
pub(crate) fn kills(layout: &Layout, every: usize) -> CheckResult {
    for rounds in [1, 2] {
        for step in (1..).step_by(every) {
            let (mut host, mut known) = (layout.host(7), WrittenValues::default());
            if rounds == 2 {
                // The first one ends in the middle, with marks in the journal.
                host.stop_at(60);
                let _ = run_guest(&host, &mut known, 1);
                host = kill(&host, 3);
            }
            let begun = host.counts().steps;
            host.stop_at(begun + step);
            let ended = run_guest(&host, &mut known, rounds);
            let whole = !host.is_dead();
            if whole {
                ended.map_err(|e| format!("without a kill: {}", e.line()))?;
            }
            for seed in [1, 2] {
                // What had the machine in the middle of it lands or not; the world is the same before.
                let host = if seed == 1 { kill_copy(&host, seed) } else { kill(&host, seed) };
                check_reopen(&host, &known, layout)
                    .map_err(|e| format!("{}, killed at step {step} of life {rounds}: {e}", layout.name))?;
            }
            if whole {
                break;
            }
        }
    }
    Ok(())
}

/// Kills a copy of the machine: the machine itself can be killed once more.
fn kill_copy(host: &SimHost, seed: u64) -> SimHost {
    kill(&host.fork(), seed)
}

/// Every step fails once, and the process is killed, soon after or at the end: what was answered is there, unless a sync
/// failed.
pub(crate) fn faults(layout: &Layout, soon: bool) -> CheckResult {
    for fault in [Fault::Io, Fault::NoSpace, Fault::Short] {
        for step in 1.. {
            let (host, mut known) = (layout.host(7), WrittenValues::default());
            let mut guest = open(&host).map_err(error_line)?;
            guest.write(&mut known, 1, 2);
            guest.flush();
            let begun = host.counts().steps;
            host.set_faults(FaultPlan { fail: vec![(begun + step, fault)], ..FaultPlan::default() });
            let is_reached = || host.counts().steps >= begun + step;
            for block in (4..19).take_while(|_| !(soon && is_reached())) {
                guest.write(&mut known, block * BLOCK + 2, 10 + block as Value);
            }
            let reached = is_reached();
            if !(soon && reached) {
                host.advance_clock(1);
                guest.write(&mut known, 2, 3);
                guest.flush();
                guest.write(&mut known, 3, 4);
            }
            let reached = if soon { reached } else { is_reached() };
            let poisoned = host.counts().failed_syncs > 0;
            let host = kill(&host, step);
            if poisoned {
                let e = open(&host).map(|_| ()).err().map(|e| e.kind());
                if e != Some(ErrorKind::Poisoned) {
                    return Err(format!("{}, {fault:?} at {step}: poisoned, and yet {e:?}", layout.name));
                }
            } else {
                check_reopen(&host, &known, layout)
                    .map_err(|e| format!("{}, {fault:?} at step {step}, then a kill: {e}", layout.name))?;
            }
            if !reached {
                break;
            }
        }
    }
    Ok(())
}

/// A block that got its place and was never written is cut off by a clean end; a kill at every step of that.
pub(crate) fn unwritten(layout: &Layout) -> CheckResult {
    for step in 1.. {
        let (host, mut known) = (layout.host(7), WrittenValues::default());
        let mut guest = open(&host).map_err(error_line)?;
        guest.write(&mut known, 1, 2);
        // Room is made by a block of its own: what fails below is no sync.
        guest.write(&mut known, 2 * BLOCK, 3);
        guest.flush();
        let now = host.counts().steps;
        host.set_faults(FaultPlan { fail: vec![(now + 1, Fault::Io), (now + 2, Fault::Io)], ..FaultPlan::default() });
        guest.write(&mut known, 4 * BLOCK, 3);
        host.set_faults(FaultPlan::default());
        host.stop_at(host.counts().steps + step);
        let closed = guest.close();
        let whole = !host.is_dead();
        if whole {
            closed.map_err(error_line)?;
        }
        for seed in 0..2 {
            let host = kill(&host.fork(), seed);
            check_reopen(&host, &known, layout).map_err(|e| format!("killed at step {step} of the end: {e}"))?;
        }
        if whole {
            break;
        }
    }
    Ok(())
}

/// Copies made at every act, put back in place and opened elsewhere after a kill.
/// `ends_marked`: the last act before the kill is a mark; else it is a flush.
pub(crate) fn copies(layout: &Layout, ends_marked: bool) -> CheckResult {
    let (host, mut known) = (layout.host(7), WrittenValues::default());
    // Of a dynamic root's block all sectors are marked with the first one: there something new takes another block.
    let new = |n: u64| if layout.name.contains("dynamic") { (2 + n) * BLOCK + n } else { n };
    let mut copies = vec![("before the session", bytes(&host, &top()))];
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut known, 1, 2);
    guest.flush();
    host.advance_clock(1);
    copies.push(("after the first flush", bytes(&host, &top())));
    guest.write(&mut known, new(2), 3);
    // The next commit changes nothing but bits, in the same second.
    copies.push(("before the second flush", bytes(&host, &top())));
    guest.flush();
    if ends_marked {
        host.advance_clock(1);
        copies.push(("after the second flush", bytes(&host, &top())));
        guest.write(&mut known, new(3), 4);
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
    // From before the session: it has no stamp, and is what it was; the journal waits for its image.
    restore(&host, &top(), &copies[0].1);
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::remove_stale_journals(&host, &runtime).map_err(error_line)?;
    let guest = open(&host).map_err(error_line)?;
    guest.check(&WrittenValues::default(), &layout.values)?;
    guest.close().map_err(error_line)?;
    image::remove_stale_journals(&host, &runtime).map_err(error_line)?;
    // The image itself moved: it is taken in at its new place, and its old one has no session any more.
    let moved = copy(&host, "moved.vhd", &last);
    let guest = open_at(&host, &moved, "/run").map_err(|e| format!("the moved image: {}", e.line()))?;
    guest.check(&known, &layout.values)?;
    guest.close().map_err(error_line)?;
    restore(&host, &top(), &last);
    expect_refused(open(&host), "an image whose copy was taken in")?;
    Ok(())
}

/// Two copies of a killed image: the one that is opened second is refused, whenever the first was killed.
pub(crate) fn two_copies(layout: &Layout) -> CheckResult {
    for step in 1..40 {
        let (host, mut known) = (layout.host(7), WrittenValues::default());
        let mut guest = open(&host).map_err(error_line)?;
        guest.write(&mut known, 1, 2);
        guest.flush();
        guest.write(&mut known, 2, 3);
        drop(guest);
        let host = kill(&host, 1);
        let other = copy(&host, "other.vhd", &bytes(&host, &top()));
        // The copy is opened, and its daemon killed somewhere in that.
        host.stop_at(host.counts().steps + step);
        let whole = open_at(&host, &other, "/run").is_ok();
        for seed in 0..8 {
            let host = kill(&host.fork(), seed);
            let mut known = known.clone();
            match open(&host) {
                Ok(mut guest) => {
                    guest.check(&known, &layout.values)?;
                    // No new mark, and so no other generation than that of the take-over.
                    guest.write(&mut known, 2, 4);
                    drop(guest);
                    let host = kill(&host, 1);
                    expect_refused(open_at(&host, &other, "/run"), "the copy of an image that went on")?;
                    open(&host).map_err(error_line)?.check(&known, &layout.values)?;
                }
                Err(e) if e.kind() == ErrorKind::Refused => {
                    open_at(&host, &other, "/run")
                        .map_err(|e| format!("step {step}: neither copy opens: {}", e.line()))?
                        .check(&known, &layout.values)?;
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

/// Whoever is not the successor is refused.
pub(crate) fn non_successors(layout: &Layout) -> CheckResult {
    let (host, mut known) = (layout.host(7), WrittenValues::default());
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut known, 1, 2);
    guest.flush();
    // A copy of a running image has the session of a daemon that lives.
    let running = copy(&host, "running.vhd", &bytes(&host, &top()));
    expect_refused(open_at(&host, &running, "/run"), "a copy of a running image")?;
    drop(guest);
    let host = kill(&host, 1);
    let message = expect_refused(open_at(&host, &top(), "/other"), "an image whose journal lies elsewhere")?;
    if !message.contains("/run") || !message.contains("settle") {
        return Err(format!("the message does not help: {message}"));
    }
    // Of several folders, the one that has the journal counts, whatever the order.
    let twin = kill(&host.fork(), 1);
    let folder = |path: &str| twin.runtime_folder(Path::new(path)).expect("every folder is in memory");
    let keep = Durability::Journal { folders: vec![folder("/other"), folder("/run")], required: true };
    let options = DiskOptions { keep, ..layouts::options(&twin, false) };
    Disk::open(Arc::new(twin.clone()), &options).map_err(|e| format!("with two folders: {}", e.line()))?;
    let env: &dyn Env = &host;
    expect_refused(Chain::open(env, &top(), &Policy::default(), OpenMode::Read), "to a reader, a killed image")?;
    let written = Chain::open(env, &top(), &Policy::default(), OpenMode::Write);
    expect_refused(
        written.and_then(|chain| chain.into_writable(env, &Durability::FlushOnly)),
        "to a tool, a killed image",
    )?;
    let checked = |host: &SimHost| chain::check(host, host.open(&top(), Access::Read)?, None, &[], &mut |_| Ok(()));
    expect_refused(checked(&host), "to a check, a killed image")?;
    // Another machine may be alive.
    let away = kill(&host.fork(), 1);
    away.move_to_another_machine(9);
    expect_refused(open(&away), "an image of another machine")?;
    let runtime = away.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::discard_session(&away, std::slice::from_ref(&runtime), &top()).map_err(error_line)?;
    open(&away).map_err(error_line)?.close().map_err(error_line)?;
    // Discarded here: what was flushed is there, and the journal is gone.
    let given_up = kill(&host.fork(), 1);
    let runtime = given_up.runtime_folder(Path::new("/run")).map_err(error_line)?;
    image::discard_session(&given_up, std::slice::from_ref(&runtime), &top()).map_err(error_line)?;
    if !given_up.shm_names().is_empty() {
        return Err("a discarded journal stays".into());
    }
    check_reopen(&given_up, &known, layout)?;
    // Settled: nobody is refused any more.
    let file = host.open(&top(), Access::Write).map_err(error_line)?;
    file.lock(Lock::Exclusive).map_err(error_line)?;
    let runtime = host.runtime_folder(Path::new("/run")).map_err(error_line)?;
    if !image::settle(env, std::slice::from_ref(&runtime), &file).map_err(error_line)?
        || image::settle(env, std::slice::from_ref(&runtime), &file).map_err(error_line)?
    {
        return Err("it is settled once".into());
    }
    drop(file);
    Chain::open(env, &top(), &Policy::default(), OpenMode::Read).map_err(error_line)?;
    checked(&host).map_err(error_line)?;
    check_reopen(&host, &known, layout)
}

/// A killed image that has become a parent: readers of the child are refused, a daemon settles it.
pub(crate) fn killed_parent(layout: &Layout) -> CheckResult {
    let (host, mut known) = (layout.host(7), WrittenValues::default());
    let mut guest = open(&host).map_err(error_line)?;
    guest.write(&mut known, 1, 2);
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
    let guest = open_at(&host, child, "/run").map_err(|e| format!("a daemon does not settle it: {}", e.line()))?;
    guest.check(&known, &layout.values)?;
    guest.close().map_err(error_line)?;
    Chain::open(env, child, &Policy::default(), OpenMode::Read).map_err(error_line)?;
    check_reopen(&host, &known, layout)
}

/// A guest that only reads and flushes leaves no trace.
pub(crate) fn read_only_guest(layout: &Layout) -> CheckResult {
    let host = layout.host(7);
    open(&host).map_err(error_line)?.close().map_err(error_line)?; // a foreign file is recovered and cut
    let before = bytes(&host, &top());
    let mut guest = open(&host).map_err(error_line)?;
    guest.check(&WrittenValues::default(), &layout.values)?;
    guest.flush();
    if bytes(&host, &top()) != before || !host.shm_names().is_empty() {
        return Err("reading leaves a trace".into());
    }
    drop(guest);
    check_reopen(&kill(&host, 1), &WrittenValues::default(), layout)
}

/// All scenes on a layout.
pub(crate) fn run_all(layout: &Layout, every: usize) -> CheckResult {
    let named = |what: &str, outcome: CheckResult| outcome.map_err(|e| format!("{what}, {}: {e}", layout.name));
    named("readers", read_only_guest(layout))?;
    named("others", non_successors(layout))?;
    named("copies", copies(layout, true))?;
    named("copies", copies(layout, false))?;
    named("twins", two_copies(layout))?;
    named("parents", killed_parent(layout))?;
    named("faults", faults(layout, false))?;
    named("faults", faults(layout, true))?;
    named("unwritten", unwritten(layout))?;
    named("kills", kills(layout, every))
}

/// The mistakes that these scenes must find; the random runs do not look for them.
pub(crate) const MUTANTS: [Mutant; 18] = [
    Mutant::RemoveJournalFirst,
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

/// What finds a mistake.
pub(crate) fn find(mutant: Mutant, layouts: &[Layout]) -> Option<String> {
    let found = layouts.iter().find_map(|layout| {
        mutant::enable(Some(mutant));
        let run = catch_unwind(AssertUnwindSafe(|| run_all(layout, 1)));
        mutant::enable(None);
        run.unwrap_or_else(|_| Err("the code itself noticed".into())).err()
    });
    mutant::enable(None);
    found
}
