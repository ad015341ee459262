//! The simulated machine: its files, names, locks, faults and counters, and the operations it has under way.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::inode::{Effect, Inode, PAGE, SyncScope};
use super::names::{InodeId, Names};
use super::rng::Random;
use super::{CompletionOrder, Fault, FaultPlan, StepCounts};
use crate::storage::env::Lock;
use crate::storage::op::Action;

const SECTOR: usize = 512;

/// What a step is, for counters and faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum StepKind {
    Read,
    Write,
    Sync,
    /// Lengths, reservations, holes.
    Range,
    /// Opening, and changes of names.
    Name,
    SyncNames,
}

/// An operation that the machine works on; its bytes were taken when it was submitted.
#[derive(Clone, Debug)]
pub(super) struct InFlightOp {
    pub(super) inode: InodeId,
    pub(super) action: Action,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) bytes: Vec<u8>,
    /// For a sync: the last step it covers.
    pub(super) covers: u64,
    /// It completes after all others of its engine.
    pub(super) late: bool,
}

impl InFlightOp {
    pub(super) fn effect(&self) -> Option<Effect<'_>> {
        match self.action {
            Action::Write | Action::WriteThrough => Some(Effect::Write(self.offset, &self.bytes)),
            Action::Punch | Action::Zero => Some(Effect::Clear(self.offset, self.len)),
            Action::Read | Action::Sync | Action::Prefetch | Action::StartWriteback | Action::Allocate => None,
        }
    }
}

/// See the file's first line.
#[derive(Clone, Debug)]
pub(super) struct SimMachine {
    pub(super) inodes: BTreeMap<InodeId, Inode>,
    pub(super) names: Names,
    /// Handle, file, kind.
    pub(super) locks: Vec<(u64, InodeId, Lock)>,
    pub(super) in_flight: BTreeMap<u64, InFlightOp>,
    pub(super) faults: FaultPlan,
    pub(super) counts: StepCounts,
    pub(super) order: CompletionOrder,
    /// Whether engines find some of what is read in memory.
    pub(super) cached_reads: bool,
    pub(super) random: Random,
    /// Every call fails: the process or the machine is no more.
    pub(super) dead: bool,
    /// The step at which it dies.
    pub(super) stop_at: Option<u64>,
    /// Operations that engines may still give back; no limit if none.
    pub(super) completion_limit: Option<u64>,
    /// The machine as it was before each change, while that is being recorded.
    pub(super) recording: Option<Vec<SimMachine>>,
    pub(super) clock: i64,
    /// Memory that outlives the process, by its name.
    pub(super) shm: BTreeMap<PathBuf, Arc<[AtomicU64]>>,
    /// The names of it that a process has open.
    pub(super) shm_locks: BTreeSet<PathBuf>,
    pub(super) boot: Uuid,
    pub(super) machine: Uuid,
    /// Numbers for files, handles, operations, and the order of changes.
    next: u64,
}

pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl SimMachine {
    pub(super) fn new(random: Random) -> SimMachine {
        let mut random = random;
        let boot = Uuid::from_u64_pair(random.next_u64(), random.next_u64());
        SimMachine {
            inodes: BTreeMap::new(),
            names: Names::default(),
            locks: Vec::new(),
            in_flight: BTreeMap::new(),
            faults: FaultPlan::default(),
            counts: StepCounts::default(),
            order: CompletionOrder::Any,
            cached_reads: false,
            random,
            dead: false,
            stop_at: None,
            completion_limit: None,
            recording: None,
            clock: 1_700_000_000,
            shm: BTreeMap::new(),
            shm_locks: BTreeSet::new(),
            boot,
            machine: Uuid::from_u128(1),
            next: 1,
        }
    }

    /// The machine after the end of this process: same clock and numbers, nothing open.
    pub(super) fn after_power_cut(&self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> SimMachine {
        // A copy draws: what is tried from a moment changes nothing of what comes after it.
        let mut heir = SimMachine::new(Random::new(self.random.clone().next_u64()));
        (heir.inodes, heir.names) = (inodes, names);
        (heir.order, heir.clock, heir.next) = (self.order, self.clock, self.next);
        (heir.cached_reads, heir.machine) = (self.cached_reads, self.machine);
        heir
    }

    /// What lives in memory, as it is now.
    pub(super) fn shm_copy(&self) -> BTreeMap<PathBuf, Arc<[AtomicU64]>> {
        let copy = |words: &Arc<[AtomicU64]>| words.iter().map(|w| AtomicU64::new(w.load(Ordering::SeqCst))).collect();
        self.shm.iter().map(|(name, words)| (name.clone(), copy(words))).collect()
    }

    /// The same, on the same boot: what lives in memory is as the process left it.
    pub(super) fn after_kill(&mut self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> SimMachine {
        let mut heir = self.after_power_cut(inodes, names);
        heir.boot = self.boot;
        heir.shm = self.shm_copy();
        heir
    }

    /// A UUID from the seed.
    pub(super) fn uuid(&mut self) -> Uuid {
        let bits = u128::from(self.random.next_u64()) << 64 | u128::from(self.random.next_u64());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The number of the last change.
    pub(super) fn last_number(&self) -> u64 {
        self.next
    }

    pub(super) fn check_alive(&self) -> io::Result<()> {
        if self.dead { Err(io::Error::other("the simulated machine has stopped")) } else { Ok(()) }
    }

    /// Counts a step; fails it where the plan says so.
    pub(super) fn step(&mut self, step: StepKind) -> io::Result<()> {
        self.check_alive()?;
        self.counts.steps += 1;
        let n = self.counts.steps;
        if self.stop_at.is_some_and(|at| n >= at) {
            self.dead = true;
            // A killed process stores nothing any more: what its destructors do must not be seen.
            self.shm = self.shm_copy();
            return self.check_alive();
        }
        if !matches!(step, StepKind::Read)
            && let Some(mut recorded) = self.recording.take()
        {
            // A process that is killed there leaves what is in memory as it is now.
            let mut moment = self.clone();
            moment.shm = self.shm_copy();
            recorded.push(moment);
            self.recording = Some(recorded);
        }
        match step {
            StepKind::Read => self.counts.reads += 1,
            StepKind::Write => self.counts.writes += 1,
            StepKind::Sync => self.counts.syncs += 1,
            StepKind::Range => self.counts.ranges += 1,
            StepKind::Name => self.counts.names += 1,
            StepKind::SyncNames => self.counts.dir_syncs += 1,
        }
        match self.faults.fail.iter().find(|(at, _)| *at == n) {
            None => Ok(()),
            Some((_, Fault::Io)) => Err(errno(libc::EIO)),
            Some((_, Fault::NoSpace)) => Err(errno(libc::ENOSPC)),
            Some((_, Fault::Short)) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    pub(super) fn inode(&mut self, id: InodeId) -> &mut Inode {
        self.inodes.get_mut(&id).expect("files live as long as the machine")
    }

    pub(super) fn read(&mut self, id: InodeId, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.step(StepKind::Read)?;
        self.read_mapped(id, into, offset)
    }

    /// A read that asks nobody: of a mapping.
    pub(super) fn read_mapped(&mut self, id: InodeId, into: &mut [u8], offset: u64) -> io::Result<()> {
        let inode = self.inode(id);
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > inode.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        inode.read(into, offset);
        Ok(())
    }

    /// Carries out an effect after its step was counted.
    fn bring_about(&mut self, id: InodeId, effect: Effect<'_>) {
        let clock = self.clock;
        let seq = self.next_number();
        let inode = self.inode(id);
        for change in inode.changes(effect) {
            inode.apply(seq, change);
        }
        inode.metadata.touch(clock);
    }

    pub(super) fn write(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        let stepped = self.step(StepKind::Write);
        in_reach(offset, from.len() as u64)?;
        if stepped.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            self.take_room(id, offset, from.len() as u64)?;
            let landed = from.len() / SECTOR / 2 * SECTOR;
            // Of nothing, a file gets no longer.
            if landed > 0 {
                self.bring_about(id, Effect::Write(offset, &from[..landed]));
            }
            return Err(errno(libc::EIO));
        }
        stepped?;
        self.take_room(id, offset, from.len() as u64)?;
        self.find_copies(id, offset, from.len() as u64)?;
        self.bring_about(id, Effect::Write(offset, from));
        Ok(())
    }

    /// A write, and then a sync of just what it wrote.
    fn write_through(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        if let Err(e) = self.write(id, from, offset) {
            self.counts.failed_syncs += 1;
            let last = self.last_number();
            self.inode(id).forget(last, SyncScope::All);
            return Err(e);
        }
        self.sync(id, self.last_number(), SyncScope::Range(offset, offset + from.len() as u64))
    }

    /// A write by a plain call. If the machine ends in the middle of it, parts may have landed.
    pub(super) fn write_now(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        self.check_alive()?;
        let result = self.write(id, from, offset);
        if self.dead && in_reach(offset, from.len() as u64).is_ok() {
            let (len, bytes, number) = (from.len() as u64, from.to_vec(), self.next_number());
            let op = InFlightOp { inode: id, action: Action::Write, offset, len, bytes, covers: 0, late: false };
            self.in_flight.insert(number, op);
        }
        result
    }

    /// A sync of the steps up to `last` that are covered.
    pub(super) fn sync(&mut self, id: InodeId, last: u64, covers: SyncScope) -> io::Result<()> {
        let result = self.step(StepKind::Sync);
        self.check_alive()?;
        let fails = self.faults.failing_syncs.contains(&self.counts.syncs);
        let result = if fails { Err(errno(libc::EIO)) } else { result };
        if result.is_err() {
            self.counts.failed_syncs += 1;
            // The host tells of a failure once, whatever it has dropped.
            self.inode(id).forget(last, SyncScope::All);
        } else if !self.faults.lying_syncs.contains(&self.counts.syncs) {
            self.inode(id).sync(last, covers);
        }
        result
    }

    pub(super) fn set_len(&mut self, id: InodeId, len: u64) -> io::Result<()> {
        self.step(StepKind::Range)?;
        in_reach(len, 0)?;
        self.bring_about(id, Effect::Len(len));
        Ok(())
    }

    pub(super) fn allocate(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        self.step(StepKind::Range)?;
        in_reach(offset, len)?;
        if self.faults.no_allocate {
            return Err(errno(libc::EOPNOTSUPP));
        }
        self.take_room(id, offset, len)
    }

    /// Makes a range of holes; gives its room back, or keeps it.
    pub(super) fn clear(&mut self, id: InodeId, offset: u64, len: u64, keep: bool) -> io::Result<()> {
        self.step(StepKind::Range)?;
        in_reach(offset, len)?;
        if keep {
            self.take_room(id, offset, len)?;
        }
        self.bring_about(id, Effect::Clear(offset, len));
        if !keep {
            self.inode(id).release(offset, len);
        }
        Ok(())
    }

    /// Bytes that all files take.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.inodes.values().map(Inode::allocated).sum()
    }

    /// Room for the copies of pages that are written over, if the file system makes such.
    fn find_copies(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        let (Some(room), true) = (self.faults.capacity, self.faults.copy_on_write) else { return Ok(()) };
        let copies = self.inode(id).pages_written(offset, len) * PAGE;
        if self.allocated_bytes() + copies > room { Err(errno(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Room for a range. What was there before the disk became full stays taken, as on ext4 (crash-safety 0.8).
    fn take_room(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        let mut missing = self.inode(id).pages_missing(offset, len);
        let wanted = missing.len();
        if let Some(room) = self.faults.capacity {
            missing.truncate(usize::try_from(room.saturating_sub(self.allocated_bytes()) / PAGE).unwrap_or(usize::MAX));
        }
        let got = missing.len();
        self.inode(id).reserve(missing);
        if got < wanted { Err(errno(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Completes an operation under way; `into` gets what a read reads.
    pub(super) fn complete(&mut self, number: u64, into: &mut [u8]) -> io::Result<()> {
        self.check_alive()?;
        let op = self.in_flight.get(&number).expect("an operation completes once").clone();
        let result = match op.action {
            Action::Read => self.read(op.inode, into, op.offset),
            Action::Write => self.write(op.inode, &op.bytes, op.offset),
            Action::WriteThrough => self.write_through(op.inode, &op.bytes, op.offset),
            Action::Sync => self.sync(op.inode, op.covers, SyncScope::All),
            // A crash may find anything written at any time as it is.
            Action::Prefetch | Action::StartWriteback => Ok(()),
            Action::Allocate => self.allocate(op.inode, op.offset, op.len),
            Action::Punch => self.clear(op.inode, op.offset, op.len, false),
            Action::Zero => self.clear(op.inode, op.offset, op.len, true),
        };
        // An operation that the end of the machine meets stays under way: it may have landed.
        self.check_alive()?;
        self.in_flight.remove(&number);
        result
    }

    pub(super) fn lock(&mut self, handle: u64, inode: InodeId, wanted: Lock) -> Result<(), io::Error> {
        self.check_alive()?;
        let mut others = self.locks.iter().filter(|(h, i, _)| *h != handle && *i == inode);
        if others.any(|(_, _, held)| wanted == Lock::Exclusive || *held == Lock::Exclusive) {
            return Err(errno(libc::EAGAIN));
        }
        self.locks.retain(|(h, _, _)| *h != handle);
        self.locks.push((handle, inode, wanted));
        Ok(())
    }

    pub(super) fn look_up(&self, path: &Path) -> io::Result<InodeId> {
        self.names.get(path).ok_or_else(|| errno(libc::ENOENT))
    }
}

/// Offsets and lengths that a host accepts.
fn in_reach(offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(errno(libc::EFBIG)),
    }
}
