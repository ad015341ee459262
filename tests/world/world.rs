//! A disk on a simulated machine, run one completion at a time, with a model of its contents.

use std::collections::BTreeMap;
use std::sync::Arc;

use diffdisk::disk::{
    Allocation, Answer, ChangeStep, Disk, DiskOptions, Lane, Outcome, Request, SnapshotRequest, SnapshotRun,
    VersionChange, WhenFull, Work, ZeroRange,
};
use diffdisk::error::ErrorKind;
use diffdisk::storage::EngineKind;
use diffdisk::storage::sim::{FaultPlan, Random, SimHost};
use diffdisk::units::SectorRange;

use crate::checker::{self, Checker};
use crate::layouts::{self, Layout};
use crate::memory::TestMemory;
use crate::model::{self, Model};

/// Queue depth of the I/O engines.
const DEPTH: usize = 32;

/// Maximum number of snapshots in a run. Each kept image makes every check slower.
const MAX_SNAPSHOTS: u32 = 6;

/// Options of a run: the crash outcomes to check, and the journal.
#[derive(Clone, Copy)]
pub(crate) struct CheckOptions {
    /// Number of crash outcomes to check at a step if there are too many to check all; 0 for no checks.
    pub(crate) sample: u64,
    /// A step is checked with a probability of one in `interval`.
    pub(crate) interval: u64,
    /// Whether the disk has a live journal, so that a kill must keep every acknowledged write.
    pub(crate) journal: bool,
}

/// Space allocation of a disk, and its behaviour on a full file system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpacePolicy {
    pub(crate) when_full: WhenFull,
    pub(crate) allocation: Allocation,
}

impl Default for SpacePolicy {
    fn default() -> SpacePolicy {
        SpacePolicy { when_full: WhenFull::Fail, allocation: Allocation::Sparse }
    }
}

/// A request in flight, with the change of the model at its completion.
struct InFlightRequest {
    act: u32,
    kind: InFlightKind,
}

enum InFlightKind {
    Write(SectorRange),
    Discard(SectorRange),
    /// The flush point, and whether the flush must fail because a sync failed before the flush began.
    Flush(Vec<u32>, bool),
    Read(SectorRange, TestMemory),
}

/// A change of the version in progress.
enum Change {
    Move(VersionChange),
    Snapshot(SnapshotRun),
}

/// A machine, its disk, and the model of the disk.
pub(crate) struct World<'a> {
    pub(crate) host: SimHost,
    space_policy: SpacePolicy,
    pub(crate) random: Random,
    pub(crate) checker: &'a mut Checker,
    pub(crate) checks: CheckOptions,
    pub(crate) trace: Vec<String>,
    /// Whether faults are planned, so that requests may fail.
    pub(crate) may_fail: bool,
    /// Random numbers for changes of the version; `None` in runs without changes.
    changes: Option<Random>,
    /// Whether the changes are snapshots. Otherwise the top moves to another slot.
    snapshots: bool,
    /// The change of the version in progress.
    change: Option<Change>,
    /// Number of snapshots that were begun.
    begun_snapshots: u32,
    /// Whether a snapshot failed between the switch and the decision, so that the disk refuses writes.
    is_stuck: bool,
    // Declared before `disk`, so that lanes are dropped before their disk.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) disk: Option<Arc<Disk>>,
    model: Model,
    pending: BTreeMap<u64, InFlightRequest>,
    actions: u32,
    /// Bitmap sectors that the disk may cache; `None` for its default.
    cached_bitmap_sectors: Option<usize>,
}

impl<'a> World<'a> {
    pub(crate) fn new(
        layout: &Layout,
        seed: u64,
        lanes: usize,
        checks: CheckOptions,
        checker: &'a mut Checker,
    ) -> World<'a> {
        World::with_faults(layout, seed, lanes, checks, checker, SpacePolicy::default(), &FaultPlan::default())
    }

    /// Opens the disk with a space policy, on a machine with planned faults.
    pub(crate) fn with_faults(
        layout: &Layout,
        seed: u64,
        lanes: usize,
        checks: CheckOptions,
        checker: &'a mut Checker,
        space_policy: SpacePolicy,
        faults: &FaultPlan,
    ) -> World<'a> {
        let host = layout.host(seed);
        host.set_faults(faults.clone());
        let mut world = World {
            host,
            space_policy,
            random: Random::new(seed),
            checker,
            checks,
            trace: Vec::new(),
            may_fail: false,
            changes: None,
            snapshots: false,
            change: None,
            begun_snapshots: 0,
            is_stuck: false,
            lanes: Vec::with_capacity(lanes),
            disk: None,
            model: Model::new(&layout.values),
            pending: BTreeMap::new(),
            actions: model::PARENT,
            cached_bitmap_sectors: None,
        };
        // The first open of an undamaged disk needs no checks.
        let checks = std::mem::replace(&mut world.checks, CheckOptions { sample: 0, ..checks });
        world.open(lanes).expect("a sound disk opens");
        world.checks = checks;
        world
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.model.sectors()
    }

    /// Returns the total length of all files.
    pub(crate) fn allocated(&self) -> u64 {
        let file = |path: &std::path::Path| self.host.bytes(path).map_or(0, |b| b.len() as u64);
        self.host.names().iter().map(|name| file(name)).sum()
    }

    /// Limits the bitmap sectors that the disk caches, now and after every later open.
    pub(crate) fn limit_bitmap_cache(&mut self, granules: usize) {
        self.cached_bitmap_sectors = Some(granules);
        let version = self.disk.as_ref().map(|disk| disk.version());
        if let Some(bitmaps) = version.as_ref().and_then(|version| version.top()?.image.bitmaps()) {
            bitmaps.set_max_frames(granules);
        }
    }

    /// Changes the version of the disk repeatedly from now on. Random numbers decide when a change takes a step.
    pub(crate) fn change_versions(&mut self, random: Random) {
        self.changes = Some(random);
    }

    /// Takes snapshots of the disk repeatedly from now on.
    pub(crate) fn take_snapshots(&mut self, random: Random) {
        self.changes = Some(random);
        self.snapshots = true;
    }

    /// Begins a change of the version, takes a step of the change in progress, drops that change, or does nothing.
    /// Random numbers decide which.
    fn step_change(&mut self) -> Result<(), String> {
        let (Some(random), Some(disk)) = (&mut self.changes, &self.disk) else { return Ok(()) };
        match &mut self.change {
            None if self.snapshots => {
                let begins = self.begun_snapshots < MAX_SNAPSHOTS && random.chance(1, 12);
                return if begins { self.begin_snapshot() } else { Ok(()) };
            }
            None if random.chance(1, 4) => match VersionChange::move_top(disk) {
                Ok(change) => self.change = Some(Change::Move(change)),
                Err(e) if e.kind() == ErrorKind::Poisoned && self.may_fail => {}
                Err(e) => return Err(e.line()),
            },
            None => {}
            Some(Change::Snapshot(snapshot)) => {
                let gives_up = random.chance(1, 100) && !snapshot.is_switched();
                return if gives_up { self.give_snapshot_up() } else { self.step_snapshot() };
            }
            Some(Change::Move(_)) if random.chance(1, 40) => self.change = None,
            Some(Change::Move(change)) => {
                let is_done = change.step().map_err(|e| e.line())? == ChangeStep::Done;
                self.change.take_if(|_| is_done);
                self.checker.changes += u64::from(is_done);
            }
        }
        Ok(())
    }

    fn begin_snapshot(&mut self) -> Result<(), String> {
        let disk = self.disk.clone().expect("the disk is open");
        self.begun_snapshots += 1;
        let keep_as = layouts::kept(self.begun_snapshots);
        match SnapshotRun::begin(&[SnapshotRequest { disk, name: "disk".into(), keep_as }]) {
            Ok(snapshot) => {
                self.trace.push(format!("snapshot {} begins", self.begun_snapshots));
                self.change = Some(Change::Snapshot(snapshot));
                Ok(())
            }
            Err(_) if self.may_fail || self.is_stuck => Ok(()),
            Err(e) => Err(format!("a snapshot does not begin: {}", e.line())),
        }
    }

    /// Takes a step of the snapshot in progress, and checks crash outcomes at every step of the machine during it.
    fn step_snapshot(&mut self) -> Result<(), String> {
        let Some(Change::Snapshot(mut snapshot)) = self.change.take() else { return Ok(()) };
        let was_switched = snapshot.is_switched();
        if !was_switched {
            // After a crash during the switch, the kept image may exist.
            let moment = self.model.clone();
            self.model.keep(layouts::kept(self.begun_snapshots), &moment);
        }
        let stepped = self.check_every_step(|| {
            let stepped = snapshot.step();
            (stepped, snapshot)
        });
        let (stepped, snapshot) = stepped?;
        let is_switched = snapshot.is_switched();
        if is_switched != was_switched {
            self.trace.push("    switched".into());
        }
        if !is_switched {
            self.model.forget_kept();
        }
        match stepped {
            Ok(ChangeStep::Done) => {
                self.trace.push("    snapshot complete".into());
                self.model.complete_snapshot();
                self.checker.changes += 1;
            }
            Ok(_) => self.change = Some(Change::Snapshot(snapshot)),
            Err(e) if self.may_fail => {
                self.trace.push(format!("    snapshot failed: {}", e.line()));
                drop(snapshot);
                self.is_stuck |= self.disk.as_ref().is_some_and(|disk| disk.is_poisoned());
            }
            Err(e) => return Err(format!("a snapshot fails: {}", e.line())),
        }
        self.check_now()
    }

    /// Drops the snapshot in progress, which undoes it.
    fn give_snapshot_up(&mut self) -> Result<(), String> {
        self.trace.push("    given up".into());
        let change = self.change.take();
        self.check_every_step(|| drop(change))
    }

    /// Takes the steps of the snapshot in progress to its end.
    fn finish_snapshot(&mut self) -> Result<(), String> {
        let mut turns = 0;
        while let Some(Change::Snapshot(_)) = &self.change {
            self.step_snapshot()?;
            let lane = self.random.index(self.lanes.len());
            self.step(lane)?;
            turns += 1;
            if turns > 10_000 {
                return Err("a snapshot does not end".into());
            }
        }
        Ok(())
    }

    pub(crate) fn is_open(&self) -> bool {
        self.disk.is_some()
    }

    /// Opens the disk. Returns false if planned faults prevent the open.
    pub(crate) fn open(&mut self, lanes: usize) -> Result<bool, String> {
        let (host, SpacePolicy { when_full, allocation }) = (self.host.clone(), self.space_policy);
        let options = DiskOptions { when_full, allocation, ..layouts::options(&self.host, self.checks.journal) };
        let opened = self.check_every_step(|| Disk::open(Arc::new(host), &options))?;
        match opened {
            Ok(disk) => {
                for _ in 0..lanes {
                    self.lanes.push(disk.lane(EngineKind::Auto, DEPTH).map_err(|e| e.line())?);
                }
                self.host.limit_completions(Some(0));
                self.disk = Some(disk);
                if let Some(granules) = self.cached_bitmap_sectors {
                    self.limit_bitmap_cache(granules);
                }
                Ok(true)
            }
            Err(_) if self.may_fail => Ok(false),
            Err(e) => Err(format!("the disk does not open: {}", e.line())),
        }
    }

    /// Calls `call` and checks crash outcomes at every step of the machine during the call.
    fn check_every_step<T>(&mut self, call: impl FnOnce() -> T) -> Result<T, String> {
        if self.checks.sample == 0 {
            return Ok(call());
        }
        self.host.start_recording();
        let result = call();
        for moment in self.host.take_recording() {
            self.check_moment(&moment)?;
        }
        self.check_now()?;
        Ok(result)
    }

    /// Checks crash outcomes of the current state.
    pub(crate) fn check_now(&mut self) -> Result<(), String> {
        let host = self.host.clone();
        self.check_moment(&host)
    }

    fn check_moment(&mut self, moment: &SimHost) -> Result<(), String> {
        if self.checks.sample == 0 || self.random.below(self.checks.interval) != 0 {
            return Ok(());
        }
        self.checker.explore(moment, &self.model, self.checks.sample, &mut self.random)
    }

    /// Returns whether a request in flight overlaps a range.
    pub(crate) fn is_busy(&self, range: SectorRange) -> bool {
        self.pending.values().any(|p| match &p.kind {
            InFlightKind::Write(r) | InFlightKind::Discard(r) | InFlightKind::Read(r, _) => !r.clip(range).is_empty(),
            InFlightKind::Flush(..) => false,
        })
    }

    fn push(&mut self, lane: usize, work: Work, kind: InFlightKind) {
        let tag = u64::from(self.actions);
        self.pending.insert(tag, InFlightRequest { act: self.actions, kind });
        self.lanes[lane].push(Request { tag, work });
    }

    fn record_action(&mut self, what: std::fmt::Arguments<'_>) -> u32 {
        self.actions += 1;
        self.trace.push(format!("{}: {what}", self.actions));
        self.actions
    }

    pub(crate) fn write(&mut self, lane: usize, range: SectorRange) {
        let act = self.record_action(format_args!("lane {lane} writes {range}"));
        let bytes: Vec<u8> = (range.start()..range.end()).flat_map(|sector| model::bytes(sector, act)).collect();
        self.model.begin(range, act, act);
        self.push(
            lane,
            Work::Write { range, from: TestMemory::new(&bytes).iovecs(&[512]) },
            InFlightKind::Write(range),
        );
    }

    pub(crate) fn zero(&mut self, lane: usize, range: SectorRange, unmap: bool) {
        let act = self.record_action(format_args!("lane {lane} zeroes {range}, unmap {unmap}"));
        self.model.begin(range, act, 0);
        self.push(lane, Work::WriteZeroes { ranges: vec![ZeroRange { range, unmap }] }, InFlightKind::Write(range));
    }

    pub(crate) fn discard(&mut self, lane: usize, range: SectorRange) {
        let act = self.record_action(format_args!("lane {lane} discards {range}"));
        self.model.begin(range, act, 0);
        self.push(lane, Work::Discard { ranges: vec![range] }, InFlightKind::Discard(range));
    }

    pub(crate) fn flush(&mut self, lane: usize) {
        self.record_action(format_args!("lane {lane} flushes"));
        let covered = self.model.flush_point();
        let must_fail = self.refuses_writes();
        self.push(lane, Work::Flush, InFlightKind::Flush(covered, must_fail));
    }

    pub(crate) fn read(&mut self, lane: usize, range: SectorRange) {
        self.record_action(format_args!("lane {lane} reads {range}"));
        let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
        let into = memory.iovecs(&[]);
        self.push(lane, Work::Read { range, into }, InFlightKind::Read(range, memory));
    }

    /// Grants at most one completion to one lane, and handles the lane's answers.
    pub(crate) fn step(&mut self, lane: usize) -> Result<(), String> {
        self.step_change()?;
        let mut answers = Vec::new();
        self.host.limit_completions(Some(1));
        let result = self.lanes[lane].submit().and_then(|()| self.lanes[lane].poll(&mut answers));
        self.host.limit_completions(Some(0));
        result.map_err(|e| format!("the engine failed: {e}"))?;
        for answer in answers {
            self.complete(answer)?;
        }
        self.check_now()
    }

    /// Steps until all lanes are idle.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        let mut turns = 0;
        while !self.lanes.iter().all(Lane::is_idle) {
            let lane = self.random.index(self.lanes.len());
            self.step(lane)?;
            turns += 1;
            if turns > 10_000 {
                return Err("requests do not complete".into());
            }
        }
        Ok(())
    }

    fn complete(&mut self, answer: Answer) -> Result<(), String> {
        let InFlightRequest { act, kind } = self.pending.remove(&answer.tag).ok_or("an answer without a request")?;
        if answer.outcome != Outcome::Done {
            self.trace.push(format!("    {act} failed"));
            return if self.may_fail { Ok(()) } else { Err(format!("action {act} failed: {:?}", answer.outcome)) };
        }
        if matches!(kind, InFlightKind::Flush(_, true)) {
            return Err(format!("flush {act} succeeds after a sync has failed"));
        }
        self.trace.push(format!("    {act} done"));
        match kind {
            InFlightKind::Write(range) => self.model.acknowledge(range, act),
            InFlightKind::Discard(_) => {}
            InFlightKind::Flush(covered, _) => self.model.complete_flush(&covered),
            InFlightKind::Read(range, memory) => {
                let bytes = memory.bytes();
                let mut values = vec![None; self.model.sectors() as usize];
                for (sector, found) in (range.start()..).zip(bytes.chunks(512)) {
                    values[sector as usize] = Some(model::value(sector, found));
                }
                self.model.check_read(&values).map_err(|e| format!("read {act}: {e}"))?;
            }
        }
        Ok(())
    }

    /// Whether a sync has failed on this machine, or a snapshot between its switch and its decision. After that no
    /// write may become durable. After a failed sync, the page cache hides the medium from every process until a crash.
    fn is_poisoned(&self) -> bool {
        self.host.counts().failed_syncs > 0 || self.is_stuck
    }

    /// Whether writes and flushes must fail. In runs with snapshots, a failed sync counts only if it has poisoned the
    /// disk: a sync of a file of a snapshot that was undone does not count.
    fn refuses_writes(&self) -> bool {
        match &self.disk {
            Some(disk) if self.snapshots => disk.is_poisoned(),
            _ => self.is_poisoned(),
        }
    }

    /// Plans faults, after which requests may fail.
    pub(crate) fn set_faults(&mut self, plan: FaultPlan) {
        self.trace.push(format!("faults: {plan:?}"));
        self.may_fail = true;
        self.host.set_faults(plan);
    }

    /// Fails the next sync of a flush. If the flush made a sync, the write and the flush that follow must fail.
    pub(crate) fn fail_sync(&mut self) -> Result<(), String> {
        let plan = FaultPlan { failing_syncs: vec![self.host.counts().syncs + 1], ..FaultPlan::default() };
        self.set_faults(plan);
        let syncs = self.host.counts().syncs;
        self.flush(0);
        self.finish()?;
        if self.host.counts().syncs == syncs {
            return Ok(()); // there was nothing to make durable
        }
        let before = self.trace.len();
        self.flush(0);
        self.write(0, SectorRange::between(0, 1));
        self.finish()?;
        let failed = self.trace[before..].iter().filter(|line| line.ends_with("failed")).count();
        if failed != 2 {
            return Err("writes or flushes succeed after a failed sync".into());
        }
        self.read(0, SectorRange::between(0, self.sectors()));
        self.finish()
    }

    /// Closes the disk and opens it again.
    pub(crate) fn reopen(&mut self) -> Result<(), String> {
        self.record_action(format_args!("close and open"));
        self.finish_snapshot()?;
        self.finish()?;
        let lanes = self.lanes.len();
        self.change = None;
        self.lanes.clear();
        let disk = self.disk.take().ok_or("no disk to close")?;
        let covered = self.model.flush_point();
        let closed = self.check_every_step(|| disk.close())?;
        let must_fail = if self.snapshots { disk.is_poisoned() } else { self.is_poisoned() };
        drop(disk);
        if must_fail {
            return if closed.is_ok() {
                Err("the disk closes cleanly after a failed sync".into())
            } else {
                self.crash_and_open(lanes)
            };
        }
        match closed {
            Ok(()) => self.model.complete_flush(&covered),
            Err(e) if !self.may_fail => return Err(format!("the disk does not close: {}", e.line())),
            // The disk is left uncommitted, as after a kill.
            Err(_) => return self.kill_and_open(lanes),
        }
        self.check_now()?;
        self.clear_faults();
        self.open(lanes)?;
        self.check_now()
    }

    /// Returns the number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Frees space. From now on no request may fail, neither a new nor a waiting one.
    pub(crate) fn free_space(&mut self, faults: &FaultPlan) {
        self.trace.push("space is freed".into());
        self.may_fail = false;
        self.host.set_faults(faults.clone());
    }

    fn clear_faults(&mut self) {
        self.may_fail = false;
        self.host.set_faults(FaultPlan::default());
    }

    fn drop_disk(&mut self) {
        self.pending.clear();
        if let Some(Change::Snapshot(snapshot)) = self.change.take() {
            snapshot.abandon();
        }
        self.is_stuck = false;
        self.lanes.clear();
        self.disk = None;
        self.may_fail = false;
    }

    /// Kills the process; the next process opens the disk. If [`World::is_poisoned`] is true, cuts the power instead.
    pub(crate) fn kill(&mut self) -> Result<(), String> {
        if self.is_poisoned() {
            return self.crash();
        }
        self.record_action(format_args!("kill"));
        let lanes = self.lanes.len();
        self.kill_and_open(lanes)
    }

    /// Kills a process whose disk had `lanes` lanes, and opens the disk.
    fn kill_and_open(&mut self, lanes: usize) -> Result<(), String> {
        let next = self.host.kill(&mut self.random);
        self.drop_disk();
        self.host = next;
        self.open(lanes)?;
        let version = self.disk.as_ref().ok_or("the disk does not open after a kill")?;
        let values = checker::read_disk(&version.version())?;
        self.model.check(&values, self.checks.journal).map_err(|e| format!("after a kill: {e}"))?;
        self.settle_kept().map_err(|e| format!("after a kill: {e}"))?;
        self.model.reset_after_kill(&values);
        self.check_now()
    }

    /// Checks the images that snapshots have kept, which do not change from now on.
    fn settle_kept(&mut self) -> Result<(), String> {
        if self.snapshots {
            let found = checker::kept_images(&self.host)?;
            self.model.check_kept(&found)?;
            self.model.settle_kept(&found);
        }
        Ok(())
    }

    /// Cuts the power and opens the disk again.
    pub(crate) fn crash(&mut self) -> Result<(), String> {
        self.record_action(format_args!("crash"));
        let lanes = self.lanes.len();
        self.crash_and_open(lanes)
    }

    /// Cuts the power of a disk that had `lanes` lanes, and opens the disk.
    fn crash_and_open(&mut self, lanes: usize) -> Result<(), String> {
        let next = self.host.crash(&mut self.random);
        self.drop_disk();
        let values = self.checker.check_state(&next.crash_with(&|_| true), &self.model, false, false)?;
        self.model.reset_after_crash(&values);
        self.host = next;
        self.checker.trailing_footer_may_be_missing = !self.checker.had_trailing_footer;
        let opened = self.open(lanes);
        self.checker.trailing_footer_may_be_missing = false;
        opened?;
        self.settle_kept().map_err(|e| format!("after a crash: {e}"))?;
        let found = checker::read_disk(&self.disk.as_ref().ok_or("the disk does not open after a crash")?.version())?;
        if found != values {
            return Err("the disk reads otherwise when it is opened again".into());
        }
        self.check_now()
    }
}
