//! The simulated machine: its files, names, locks, faults and counters, and the operations it has under way.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::inode::{Covers, Effect, Inode, PAGE};
use super::names::{InodeId, Names};
use super::rng::Random;
use super::{Counts, Fault, FaultPlan, Order};
use crate::storage::env::Lock;
use crate::storage::op::Action;

const SECTOR: usize = 512;

/// What a step is, for counters and faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
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
pub(super) struct Flying {
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

impl Flying {
    pub(super) fn effect(&self) -> Option<Effect<'_>> {
        match self.action {
            Action::Write | Action::WriteThrough => Some(Effect::Write(self.offset, &self.bytes)),
            Action::Punch | Action::Zero => Some(Effect::Clear(self.offset, self.len)),
            Action::Read | Action::Sync | Action::Prefetch | Action::WriteBehind | Action::Allocate => None,
        }
    }
}

/// See the file's first line.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) inodes: BTreeMap<InodeId, Inode>,
    pub(super) names: Names,
    /// Handle, file, kind.
    pub(super) locks: Vec<(u64, InodeId, Lock)>,
    pub(super) flying: BTreeMap<u64, Flying>,
    pub(super) faults: FaultPlan,
    pub(super) counts: Counts,
    pub(super) order: Order,
    /// Whether engines find some of what is read in memory.
    pub(super) copies: bool,
    pub(super) random: Random,
    /// Every call fails: the process or the machine is no more.
    pub(super) dead: bool,
    /// The step at which it dies.
    pub(super) stop_at: Option<u64>,
    /// Operations that engines may still give back; no limit if none.
    pub(super) granted: Option<u64>,
    /// The machine as it was before each change, while that is being recorded.
    pub(super) recorded: Option<Vec<World>>,
    pub(super) clock: i64,
    /// Memory that outlives the process, by its name.
    pub(super) live: BTreeMap<PathBuf, Arc<[AtomicU64]>>,
    /// The names of it that a process has open.
    pub(super) live_locks: BTreeSet<PathBuf>,
    pub(super) boot: Uuid,
    pub(super) machine: Uuid,
    /// Numbers for files, handles, operations, and the order of changes.
    next: u64,
}

pub(super) fn code(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl World {
    pub(super) fn new(random: Random) -> World {
        let mut random = random;
        let boot = Uuid::from_u64_pair(random.any(), random.any());
        World {
            inodes: BTreeMap::new(),
            names: Names::default(),
            locks: Vec::new(),
            flying: BTreeMap::new(),
            faults: FaultPlan::default(),
            counts: Counts::default(),
            order: Order::Any,
            copies: false,
            random,
            dead: false,
            stop_at: None,
            granted: None,
            recorded: None,
            clock: 1_700_000_000,
            live: BTreeMap::new(),
            live_locks: BTreeSet::new(),
            boot,
            machine: Uuid::from_u128(1),
            next: 1,
        }
    }

    /// The machine after the end of this process: same clock and numbers, nothing open.
    pub(super) fn heir(&self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> World {
        // A copy draws: what is tried from a moment changes nothing of what comes after it.
        let mut heir = World::new(Random::new(self.random.clone().any()));
        (heir.inodes, heir.names) = (inodes, names);
        (heir.order, heir.clock, heir.next) = (self.order, self.clock, self.next);
        (heir.copies, heir.machine) = (self.copies, self.machine);
        heir
    }

    /// What lives in memory, as it is now.
    pub(super) fn live_copy(&self) -> BTreeMap<PathBuf, Arc<[AtomicU64]>> {
        let copy = |words: &Arc<[AtomicU64]>| words.iter().map(|w| AtomicU64::new(w.load(Ordering::SeqCst))).collect();
        self.live.iter().map(|(name, words)| (name.clone(), copy(words))).collect()
    }

    /// The same, on the same boot: what lives in memory is as the process left it.
    pub(super) fn successor(&mut self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> World {
        let mut heir = self.heir(inodes, names);
        heir.boot = self.boot;
        heir.live = self.live_copy();
        heir
    }

    /// A UUID from the seed.
    pub(super) fn uuid(&mut self) -> Uuid {
        let bits = u128::from(self.random.any()) << 64 | u128::from(self.random.any());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The number of the last change.
    pub(super) fn last(&self) -> u64 {
        self.next
    }

    pub(super) fn alive(&self) -> io::Result<()> {
        if self.dead { Err(io::Error::other("the simulated machine has stopped")) } else { Ok(()) }
    }

    /// Counts a step; fails it where the plan says so.
    pub(super) fn step(&mut self, step: Step) -> io::Result<()> {
        self.alive()?;
        self.counts.steps += 1;
        let n = self.counts.steps;
        if self.stop_at.is_some_and(|at| n >= at) {
            self.dead = true;
            // A killed process stores nothing any more: what its destructors do must not be seen.
            self.live = self.live_copy();
            return self.alive();
        }
        if !matches!(step, Step::Read)
            && let Some(mut recorded) = self.recorded.take()
        {
            // A process that is killed there leaves what is in memory as it is now.
            let mut moment = self.clone();
            moment.live = self.live_copy();
            recorded.push(moment);
            self.recorded = Some(recorded);
        }
        match step {
            Step::Read => self.counts.reads += 1,
            Step::Write => self.counts.writes += 1,
            Step::Sync => self.counts.syncs += 1,
            Step::Range => self.counts.ranges += 1,
            Step::Name => self.counts.names += 1,
            Step::SyncNames => self.counts.dir_syncs += 1,
        }
        match self.faults.fail.iter().find(|(at, _)| *at == n) {
            None => Ok(()),
            Some((_, Fault::Io)) => Err(code(libc::EIO)),
            Some((_, Fault::NoSpace)) => Err(code(libc::ENOSPC)),
            Some((_, Fault::Short)) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    pub(super) fn inode(&mut self, id: InodeId) -> &mut Inode {
        self.inodes.get_mut(&id).expect("files live as long as the machine")
    }

    pub(super) fn read(&mut self, id: InodeId, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.step(Step::Read)?;
        self.look(id, into, offset)
    }

    /// A read that asks nobody: of a mapping.
    pub(super) fn look(&mut self, id: InodeId, into: &mut [u8], offset: u64) -> io::Result<()> {
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
        let seq = self.number();
        let inode = self.inode(id);
        for change in inode.changes(effect) {
            inode.apply(seq, change);
        }
        inode.metadata.touch(clock);
    }

    pub(super) fn write(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        let stepped = self.step(Step::Write);
        in_reach(offset, from.len() as u64)?;
        if stepped.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            self.take_room(id, offset, from.len() as u64)?;
            let landed = from.len() / SECTOR / 2 * SECTOR;
            // Of nothing, a file gets no longer.
            if landed > 0 {
                self.bring_about(id, Effect::Write(offset, &from[..landed]));
            }
            return Err(code(libc::EIO));
        }
        stepped?;
        self.take_room(id, offset, from.len() as u64)?;
        self.bring_about(id, Effect::Write(offset, from));
        Ok(())
    }

    /// A write, and then a sync of just what it wrote.
    fn write_through(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        if let Err(e) = self.write(id, from, offset) {
            self.counts.failed_syncs += 1;
            let last = self.last();
            self.inode(id).forget(last, Covers::All);
            return Err(e);
        }
        self.sync(id, self.last(), Covers::Range(offset, offset + from.len() as u64))
    }

    /// A write by a plain call. If the machine ends in the middle of it, parts may have landed.
    pub(super) fn write_now(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        self.alive()?;
        let result = self.write(id, from, offset);
        if self.dead && in_reach(offset, from.len() as u64).is_ok() {
            let (len, bytes, number) = (from.len() as u64, from.to_vec(), self.number());
            let op = Flying { inode: id, action: Action::Write, offset, len, bytes, covers: 0, late: false };
            self.flying.insert(number, op);
        }
        result
    }

    /// A sync of the steps up to `last` that are covered.
    pub(super) fn sync(&mut self, id: InodeId, last: u64, covers: Covers) -> io::Result<()> {
        let result = self.step(Step::Sync);
        self.alive()?;
        let fails = self.faults.failing_syncs.contains(&self.counts.syncs);
        let result = if fails { Err(code(libc::EIO)) } else { result };
        if result.is_err() {
            self.counts.failed_syncs += 1;
            // The host tells of a failure once, whatever it has dropped.
            self.inode(id).forget(last, Covers::All);
        } else if !self.faults.lying_syncs.contains(&self.counts.syncs) {
            self.inode(id).sync(last, covers);
        }
        result
    }

    pub(super) fn set_len(&mut self, id: InodeId, len: u64) -> io::Result<()> {
        self.step(Step::Range)?;
        in_reach(len, 0)?;
        self.bring_about(id, Effect::Len(len));
        Ok(())
    }

    pub(super) fn allocate(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        self.step(Step::Range)?;
        in_reach(offset, len)?;
        if self.faults.no_allocate {
            return Err(code(libc::EOPNOTSUPP));
        }
        self.take_room(id, offset, len)
    }

    /// Makes a range of holes; gives its room back, or keeps it.
    pub(super) fn clear(&mut self, id: InodeId, offset: u64, len: u64, keep: bool) -> io::Result<()> {
        self.step(Step::Range)?;
        in_reach(offset, len)?;
        self.bring_about(id, Effect::Clear(offset, len));
        if !keep {
            self.inode(id).release(offset, len);
        }
        Ok(())
    }

    /// Room for a range. What was there before the disk became full stays taken, as on ext4 (crash-safety 0.8).
    fn take_room(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        let mut missing = self.inode(id).pages_missing(offset, len);
        let wanted = missing.len();
        if let Some(room) = self.faults.room {
            let taken: u64 = self.inodes.values().map(Inode::allocated).sum();
            missing.truncate(usize::try_from(room.saturating_sub(taken) / PAGE).unwrap_or(usize::MAX));
        }
        let got = missing.len();
        self.inode(id).hold(missing);
        if got < wanted { Err(code(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Completes an operation under way; `into` gets what a read reads.
    pub(super) fn complete(&mut self, number: u64, into: &mut [u8]) -> io::Result<()> {
        self.alive()?;
        let op = self.flying.get(&number).expect("an operation completes once").clone();
        let result = match op.action {
            Action::Read => self.read(op.inode, into, op.offset),
            Action::Write => self.write(op.inode, &op.bytes, op.offset),
            Action::WriteThrough => self.write_through(op.inode, &op.bytes, op.offset),
            Action::Sync => self.sync(op.inode, op.covers, Covers::All),
            // A crash may find anything written at any time as it is.
            Action::Prefetch | Action::WriteBehind => Ok(()),
            Action::Allocate => self.allocate(op.inode, op.offset, op.len),
            Action::Punch => self.clear(op.inode, op.offset, op.len, false),
            Action::Zero => self.clear(op.inode, op.offset, op.len, true),
        };
        // An operation that the end of the machine meets stays under way: it may have landed.
        self.alive()?;
        self.flying.remove(&number);
        result
    }

    pub(super) fn lock(&mut self, handle: u64, inode: InodeId, wanted: Lock) -> Result<(), io::Error> {
        self.alive()?;
        let mut others = self.locks.iter().filter(|(h, i, _)| *h != handle && *i == inode);
        if others.any(|(_, _, held)| wanted == Lock::Exclusive || *held == Lock::Exclusive) {
            return Err(code(libc::EAGAIN));
        }
        self.locks.retain(|(h, _, _)| *h != handle);
        self.locks.push((handle, inode, wanted));
        Ok(())
    }

    pub(super) fn look_up(&self, path: &Path) -> io::Result<InodeId> {
        self.names.get(path).ok_or_else(|| code(libc::ENOENT))
    }
}

/// Offsets and lengths that a host accepts.
fn in_reach(offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(code(libc::EFBIG)),
    }
}
