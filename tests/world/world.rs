//! A disk on a simulated machine under a guest that knows what it may find, one completion at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use diffdisk::disk::{Allocation, Answer, Disk, DiskOptions, Lane, Outcome, Request, WhenFull, Work, ZeroRange};
use diffdisk::storage::EngineKind;
use diffdisk::storage::sim::{FaultPlan, Random, SimHost};
use diffdisk::units::SectorRange;

use crate::judge::{self, Judge};
use crate::layouts::{self, Layout};
use crate::memory::Memory;
use crate::model::{self, Model};

/// Operations that an engine takes.
const DEPTH: usize = 32;

/// How much of what may happen is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Care {
    /// Fates tried at a moment, where there are too many to try all; 0 for none at all.
    pub(crate) sample: u64,
    /// One moment in so many is looked at.
    pub(crate) every: u64,
    /// Every write that was answered must be there after the end of the process alone (the live journal).
    pub(crate) journal: bool,
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub(crate) when_full: WhenFull,
    pub(crate) allocation: Allocation,
}

impl Default for How {
    fn default() -> How {
        How { when_full: WhenFull::Fail, allocation: Allocation::Sparse }
    }
}

/// What a request in flight will mean.
struct Pending {
    act: u32,
    kind: Kind,
}

enum Kind {
    Write(SectorRange),
    Discard(SectorRange),
    /// With what it makes durable, and whether it must fail: a sync has failed before it began.
    Flush(Vec<u32>, bool),
    Read(SectorRange, Memory),
}

/// See the file's first line.
pub(crate) struct World<'a> {
    pub(crate) host: SimHost,
    how: How,
    pub(crate) random: Random,
    pub(crate) judge: &'a mut Judge,
    pub(crate) care: Care,
    pub(crate) trace: Vec<String>,
    /// Faults are planned: requests may fail.
    pub(crate) may_fail: bool,
    // Lanes go before their disk.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) disk: Option<Arc<Disk>>,
    model: Model,
    pending: BTreeMap<u64, Pending>,
    acts: u32,
    /// Granules of bitmap that the disk keeps in memory; `None` for as many as it likes.
    granules: Option<usize>,
}

impl<'a> World<'a> {
    pub(crate) fn new(layout: &Layout, seed: u64, lanes: usize, care: Care, judge: &'a mut Judge) -> World<'a> {
        World::opened(layout, seed, lanes, care, judge, How::default(), &FaultPlan::default())
    }

    /// The same, opened in another way, on a host with these faults.
    pub(crate) fn opened(
        layout: &Layout,
        seed: u64,
        lanes: usize,
        care: Care,
        judge: &'a mut Judge,
        how: How,
        faults: &FaultPlan,
    ) -> World<'a> {
        let host = layout.host(seed);
        host.set_faults(faults.clone());
        let mut world = World {
            host,
            how,
            random: Random::new(seed),
            judge,
            care,
            trace: Vec::new(),
            may_fail: false,
            lanes: Vec::with_capacity(lanes),
            disk: None,
            model: Model::new(&layout.values),
            pending: BTreeMap::new(),
            acts: model::PARENT,
            granules: None,
        };
        // Nothing is wrong with a disk that is opened for the first time.
        let care = std::mem::replace(&mut world.care, Care { sample: 0, ..care });
        world.open(lanes).expect("a sound disk opens");
        world.care = care;
        world
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.model.sectors()
    }

    /// Bytes that the files take.
    pub(crate) fn allocated(&self) -> u64 {
        let file = |path: &std::path::Path| self.host.bytes(path).map_or(0, |b| b.len() as u64);
        self.host.names().iter().map(|name| file(name)).sum()
    }

    /// Has the disk keep so few granules of bitmap in memory, now and when it is opened again.
    pub(crate) fn keep_at_most(&mut self, granules: usize) {
        self.granules = Some(granules);
        if let Some(bitmaps) = self.disk.as_ref().and_then(|disk| disk.version().top()?.image.bitmaps()) {
            bitmaps.set_max_frames(granules);
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.disk.is_some()
    }

    /// Opens the disk; false where planned faults forbid it.
    pub(crate) fn open(&mut self, lanes: usize) -> Result<bool, String> {
        let (host, How { when_full, allocation }) = (self.host.clone(), self.how);
        let options = DiskOptions { when_full, allocation, ..layouts::options(&self.host, self.care.journal) };
        let opened = self.watched(|| Disk::open(Arc::new(host), &options))?;
        match opened {
            Ok(disk) => {
                for _ in 0..lanes {
                    self.lanes.push(disk.lane(EngineKind::Auto, DEPTH).map_err(|e| e.line())?);
                }
                self.host.limit_completions(Some(0));
                self.disk = Some(disk);
                if let Some(granules) = self.granules {
                    self.keep_at_most(granules);
                }
                Ok(true)
            }
            Err(_) if self.may_fail => Ok(false),
            Err(e) => Err(format!("it does not open: {}", e.line())),
        }
    }

    /// Does something that changes the machine step by step, and looks at every step.
    fn watched<T>(&mut self, call: impl FnOnce() -> T) -> Result<T, String> {
        if self.care.sample == 0 {
            return Ok(call());
        }
        self.host.start_recording();
        let result = call();
        for moment in self.host.take_recording() {
            self.look_at(&moment)?;
        }
        self.look()?;
        Ok(result)
    }

    /// Tries fates of this moment.
    pub(crate) fn look(&mut self) -> Result<(), String> {
        let host = self.host.clone();
        self.look_at(&host)
    }

    fn look_at(&mut self, moment: &SimHost) -> Result<(), String> {
        if self.care.sample == 0 || self.random.below(self.care.every) != 0 {
            return Ok(());
        }
        self.judge.explore(moment, &self.model, self.care.sample, &mut self.random)
    }

    /// Whether a request in flight writes to part of a range.
    pub(crate) fn is_busy(&self, range: SectorRange) -> bool {
        self.pending.values().any(|p| match &p.kind {
            Kind::Write(r) | Kind::Discard(r) | Kind::Read(r, _) => !r.clip(range).is_empty(),
            Kind::Flush(..) => false,
        })
    }

    fn push(&mut self, lane: usize, work: Work, kind: Kind) {
        let tag = u64::from(self.acts);
        self.pending.insert(tag, Pending { act: self.acts, kind });
        self.lanes[lane].push(Request { tag, work });
    }

    fn act(&mut self, what: std::fmt::Arguments<'_>) -> u32 {
        self.acts += 1;
        self.trace.push(format!("{}: {what}", self.acts));
        self.acts
    }

    pub(crate) fn write(&mut self, lane: usize, range: SectorRange) {
        let act = self.act(format_args!("lane {lane} writes {range}"));
        let bytes: Vec<u8> = (range.start()..range.end()).flat_map(|sector| model::bytes(sector, act)).collect();
        self.model.begin(range, act, act);
        self.push(lane, Work::Write { range, from: Memory::new(&bytes).slices(&[512]) }, Kind::Write(range));
    }

    pub(crate) fn zero(&mut self, lane: usize, range: SectorRange, unmap: bool) {
        let act = self.act(format_args!("lane {lane} zeroes {range}, unmap {unmap}"));
        self.model.begin(range, act, 0);
        self.push(lane, Work::WriteZeroes { ranges: vec![ZeroRange { range, unmap }] }, Kind::Write(range));
    }

    pub(crate) fn discard(&mut self, lane: usize, range: SectorRange) {
        let act = self.act(format_args!("lane {lane} discards {range}"));
        self.model.begin(range, act, 0);
        self.push(lane, Work::Discard { ranges: vec![range] }, Kind::Discard(range));
    }

    pub(crate) fn flush(&mut self, lane: usize) {
        self.act(format_args!("lane {lane} flushes"));
        let covered = self.model.flush();
        let must_fail = self.is_poisoned();
        self.push(lane, Work::Flush, Kind::Flush(covered, must_fail));
    }

    pub(crate) fn read(&mut self, lane: usize, range: SectorRange) {
        self.act(format_args!("lane {lane} reads {range}"));
        let memory = Memory::new(&vec![0xEE; range.bytes() as usize]);
        let into = memory.slices(&[]);
        self.push(lane, Work::Read { range, into }, Kind::Read(range, memory));
    }

    /// One completion at most, on one lane, and what follows from it.
    pub(crate) fn step(&mut self, lane: usize) -> Result<(), String> {
        let mut answers = Vec::new();
        self.host.limit_completions(Some(1));
        let turned = self.lanes[lane].submit().and_then(|()| self.lanes[lane].poll(&mut answers));
        self.host.limit_completions(Some(0));
        turned.map_err(|e| format!("the engine failed: {e}"))?;
        for answer in answers {
            self.answered(answer)?;
        }
        self.look()
    }

    /// Steps until nothing is under way.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        let mut turns = 0;
        while !self.lanes.iter().all(Lane::is_idle) {
            let lane = self.random.index(self.lanes.len());
            self.step(lane)?;
            turns += 1;
            if turns > 10_000 {
                return Err("requests are never answered".into());
            }
        }
        Ok(())
    }

    fn answered(&mut self, answer: Answer) -> Result<(), String> {
        let Pending { act, kind } = self.pending.remove(&answer.tag).ok_or("an answer to nothing")?;
        if answer.outcome != Outcome::Done {
            self.trace.push(format!("    {act} failed"));
            return if self.may_fail { Ok(()) } else { Err(format!("act {act} failed: {:?}", answer.outcome)) };
        }
        if matches!(kind, Kind::Flush(_, true)) {
            return Err(format!("flush {act} succeeds after a sync has failed"));
        }
        self.trace.push(format!("    {act} done"));
        match kind {
            Kind::Write(range) => self.model.done(range, act),
            Kind::Discard(_) => {}
            Kind::Flush(covered, _) => self.model.flushed(&covered),
            Kind::Read(range, memory) => {
                let bytes = memory.bytes();
                let mut values = vec![None; self.model.sectors() as usize];
                for (sector, found) in (range.start()..).zip(bytes.chunks(512)) {
                    values[sector as usize] = Some(model::value(sector, found));
                }
                self.model.judge_some(&values).map_err(|e| format!("read {act}: {e}"))?;
            }
        }
        Ok(())
    }

    /// Whether a sync has failed on this machine: nothing may be made durable any more, and nothing that a process can
    /// do tells what the disk has, as long as the machine runs (the page cache says one thing, the medium another).
    fn is_poisoned(&self) -> bool {
        self.host.counts().failed_syncs > 0
    }

    /// Plans what goes wrong.
    pub(crate) fn faults(&mut self, plan: FaultPlan) {
        self.trace.push(format!("faults: {plan:?}"));
        self.may_fail = true;
        self.host.set_faults(plan);
    }

    /// A sync fails in the middle of a flush. After it nothing may be written or made durable.
    pub(crate) fn fail_sync(&mut self) -> Result<(), String> {
        let plan = FaultPlan { failing_syncs: vec![self.host.counts().syncs + 1], ..FaultPlan::default() };
        self.faults(plan);
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
            return Err("a disk whose sync failed goes on".into());
        }
        self.read(0, SectorRange::between(0, self.sectors()));
        self.finish()
    }

    /// Closes the disk and opens it again.
    pub(crate) fn reopen(&mut self) -> Result<(), String> {
        self.act(format_args!("close and open"));
        let lanes = self.lanes.len();
        self.lanes.clear();
        let disk = self.disk.take().ok_or("no disk to close")?;
        let covered = self.model.flush();
        let closed = self.watched(|| disk.close())?;
        drop(disk);
        if self.is_poisoned() {
            return if closed.is_ok() {
                Err("it closes cleanly after a sync has failed".into())
            } else {
                self.crash_of(lanes)
            };
        }
        match closed {
            Ok(()) => self.model.flushed(&covered),
            Err(e) if !self.may_fail => return Err(format!("it does not close: {}", e.line())),
            // It ends uncommitted, as if it had been killed.
            Err(_) => return self.kill_of(lanes),
        }
        self.look()?;
        self.heal();
        self.open(lanes)?;
        self.look()
    }

    /// Requests that are not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// There is room from now on: no new request may fail. Those that wait do not, either.
    pub(crate) fn roomy(&mut self, faults: &FaultPlan) {
        self.trace.push("room is freed".into());
        self.may_fail = false;
        self.host.set_faults(faults.clone());
    }

    fn heal(&mut self) {
        self.may_fail = false;
        self.host.set_faults(FaultPlan::default());
    }

    fn leave(&mut self) {
        self.pending.clear();
        self.lanes.clear();
        self.disk = None;
        self.may_fail = false;
    }

    /// The end of the process alone; the next one opens the disk.
    pub(crate) fn kill(&mut self) -> Result<(), String> {
        if self.is_poisoned() {
            return self.crash();
        }
        self.act(format_args!("kill"));
        let lanes = self.lanes.len();
        self.kill_of(lanes)
    }

    /// The end of a process whose disk had so many lanes.
    fn kill_of(&mut self, lanes: usize) -> Result<(), String> {
        let next = self.host.kill(&mut self.random);
        self.leave();
        self.host = next;
        self.open(lanes)?;
        let version = self.disk.as_ref().ok_or("it does not open after a kill")?;
        let values = judge::read(version.version())?;
        self.model.judge(&values, self.care.journal).map_err(|e| format!("after a kill: {e}"))?;
        self.model.killed(&values);
        self.look()
    }

    /// A power cut; the disk is opened again.
    pub(crate) fn crash(&mut self) -> Result<(), String> {
        self.act(format_args!("crash"));
        let lanes = self.lanes.len();
        self.crash_of(lanes)
    }

    /// A power cut of a disk that had so many lanes.
    fn crash_of(&mut self, lanes: usize) -> Result<(), String> {
        let next = self.host.crash(&mut self.random);
        self.leave();
        let values = self.judge.verdict(&next.crash_with(&|_| true), &self.model, false, false)?;
        self.model.crashed(&values);
        self.host = next;
        self.judge.tail_may_miss = !self.judge.found_tail;
        let opened = self.open(lanes);
        self.judge.tail_may_miss = false;
        opened?;
        let found = judge::read(self.disk.as_ref().ok_or("it does not open after a crash")?.version())?;
        if found != values {
            return Err("it reads otherwise when it is opened again".into());
        }
        self.look()
    }
}
