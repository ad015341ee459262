//! State of the simulated machine: files, names, locks, faults, counters, and operations in flight.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::inode::{Effect, Inode, PAGE, SyncScope};
use super::names::{InodeId, Names};
use super::types::{CompletionOrder, Fault, FaultPlan, StepCounts};
use crate::random::Random;
use crate::storage::op::Action;
use crate::storage::types::Lock;

const SECTOR: usize = 512;

/// Kind of a step, for counters and faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum StepKind {
    Read,
    Write,
    Sync,
    /// Changes of lengths, allocations, holes and metadata.
    Range,
    /// Opened and changed names.
    Name,
    SyncNames,
}

/// Operation in flight. Its bytes were copied when it was submitted.
#[derive(Clone, Debug)]
pub(super) struct InFlightOp {
    pub(super) inode: InodeId,
    pub(super) action: Action,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) bytes: Vec<u8>,
    /// For a sync: number of the last change that it covers.
    pub(super) covers: u64,
    /// Completes after all others of its engine.
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

/// State of a simulated machine.
#[derive(Clone, Debug)]
pub(super) struct SimMachine {
    pub(super) inodes: BTreeMap<InodeId, Inode>,
    pub(super) names: Names,
    /// Locks: handle, file, kind.
    pub(super) locks: Vec<(u64, InodeId, Lock)>,
    pub(super) in_flight: BTreeMap<u64, InFlightOp>,
    pub(super) faults: FaultPlan,
    pub(super) counts: StepCounts,
    pub(super) order: CompletionOrder,
    /// Engines find some of the data in the page cache.
    pub(super) cached_reads: bool,
    pub(super) random: Random,
    /// The process or the machine has ended: every call fails.
    pub(super) dead: bool,
    /// Number of the step at which the machine ends.
    pub(super) stop_at: Option<u64>,
    /// Number of completions that engines may still return; no limit if `None`.
    pub(super) completion_limit: Option<u64>,
    /// Copies of the machine before each step that is not a read, while the machine is being recorded.
    pub(super) recording: Option<Vec<SimMachine>>,
    pub(super) clock: i64,
    /// Shared memory by name, which outlives the process.
    pub(super) shm: BTreeMap<PathBuf, Arc<[AtomicU64]>>,
    /// Names of shared memory that a process has open.
    pub(super) shm_locks: BTreeSet<PathBuf>,
    pub(super) boot_id: Uuid,
    pub(super) machine_id: Uuid,
    /// Last number given to a file, handle, operation or change.
    next: u64,
}

pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl SimMachine {
    pub(super) fn new(random: Random) -> SimMachine {
        let mut random = random;
        let boot_id = Uuid::from_u64_pair(random.next_u64(), random.next_u64());
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
            boot_id,
            machine_id: Uuid::from_u128(1),
            next: 1,
        }
    }

    /// Returns the machine after a restart: it continues the clock and the numbering of this one, has no file open, and
    /// has no shared memory.
    pub(super) fn after_power_cut(&self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> SimMachine {
        // The seed is drawn from a copy of the random state, so that trying a crash outcome does not change the later
        // random choices of this machine.
        let mut next = SimMachine::new(Random::new(self.random.clone().next_u64()));
        (next.inodes, next.names) = (inodes, names);
        (next.order, next.clock, next.next) = (self.order, self.clock, self.next);
        (next.cached_reads, next.machine_id) = (self.cached_reads, self.machine_id);
        next
    }

    /// Returns a copy of the shared memory.
    pub(super) fn shm_copy(&self) -> BTreeMap<PathBuf, Arc<[AtomicU64]>> {
        let copy = |words: &Arc<[AtomicU64]>| words.iter().map(|w| AtomicU64::new(w.load(Ordering::SeqCst))).collect();
        self.shm.iter().map(|(name, words)| (name.clone(), copy(words))).collect()
    }

    /// Returns the machine after the end of the process: same boot, and the shared memory as the process left it.
    pub(super) fn after_kill(&mut self, inodes: BTreeMap<InodeId, Inode>, names: Names) -> SimMachine {
        let mut next = self.after_power_cut(inodes, names);
        next.boot_id = self.boot_id;
        next.shm = self.shm_copy();
        next
    }

    /// Draws a UUID.
    pub(super) fn uuid(&mut self) -> Uuid {
        let bits = u128::from(self.random.next_u64()) << 64 | u128::from(self.random.next_u64());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Returns the number that was given last.
    pub(super) fn last_number(&self) -> u64 {
        self.next
    }

    pub(super) fn check_alive(&self) -> io::Result<()> {
        if self.dead { Err(io::Error::other("the simulated machine has stopped")) } else { Ok(()) }
    }

    /// Counts a step. Fails if the fault plan contains the step, or if the machine ends at it or has ended before.
    pub(super) fn step(&mut self, step: StepKind) -> io::Result<()> {
        self.check_alive()?;
        self.counts.steps += 1;
        let n = self.counts.steps;
        if self.stop_at.is_some_and(|at| n >= at) {
            self.dead = true;
            // A killed process stores nothing more, so stores by its destructors must not reach the shared memory.
            self.shm = self.shm_copy();
            return self.check_alive();
        }
        if !matches!(step, StepKind::Read)
            && let Some(mut recorded) = self.recording.take()
        {
            // A process killed at this step leaves the shared memory as it is now.
            let mut copy = self.clone();
            copy.shm = self.shm_copy();
            recorded.push(copy);
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

    /// Reads through a mapping. The read does not count as a step.
    pub(super) fn read_mapped(&mut self, id: InodeId, into: &mut [u8], offset: u64) -> io::Result<()> {
        let inode = self.inode(id);
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > inode.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        inode.read(into, offset);
        Ok(())
    }

    /// Applies an effect whose step has been counted.
    fn apply_effect(&mut self, id: InodeId, effect: Effect<'_>) {
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
        check_range(offset, from.len() as u64)?;
        if stepped.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof) {
            self.reserve_pages(id, offset, from.len() as u64)?;
            let landed = from.len() / SECTOR / 2 * SECTOR;
            // A write that stores nothing does not extend the file.
            if landed > 0 {
                self.apply_effect(id, Effect::Write(offset, &from[..landed]));
            }
            return Err(errno(libc::EIO));
        }
        stepped?;
        self.reserve_pages(id, offset, from.len() as u64)?;
        self.check_copy_space(id, offset, from.len() as u64)?;
        self.apply_effect(id, Effect::Write(offset, from));
        Ok(())
    }

    /// Writes, and then syncs only the bytes that were written.
    fn write_through(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        if let Err(e) = self.write(id, from, offset) {
            self.counts.failed_syncs += 1;
            let last = self.last_number();
            self.inode(id).forget(last, SyncScope::All);
            return Err(e);
        }
        self.sync(id, self.last_number(), SyncScope::Range(offset, offset + from.len() as u64))
    }

    /// Writes by a call that uses no engine. If the machine ends during the write, some of the sectors may have been
    /// stored.
    pub(super) fn write_now(&mut self, id: InodeId, from: &[u8], offset: u64) -> io::Result<()> {
        self.check_alive()?;
        let result = self.write(id, from, offset);
        if self.dead && check_range(offset, from.len() as u64).is_ok() {
            let (len, bytes, number) = (from.len() as u64, from.to_vec(), self.next_number());
            let op = InFlightOp { inode: id, action: Action::Write, offset, len, bytes, covers: 0, late: false };
            self.in_flight.insert(number, op);
        }
        result
    }

    /// Makes durable the changes up to number `last` that are in the scope.
    pub(super) fn sync(&mut self, id: InodeId, last: u64, covers: SyncScope) -> io::Result<()> {
        let result = self.step(StepKind::Sync);
        self.check_alive()?;
        let fails = self.faults.failing_syncs.contains(&self.counts.syncs);
        let result = if fails { Err(errno(libc::EIO)) } else { result };
        if result.is_err() {
            self.counts.failed_syncs += 1;
            // The kernel reports a failed sync once, and counts all dirty pages as clean.
            self.inode(id).forget(last, SyncScope::All);
        } else if !self.faults.lying_syncs.contains(&self.counts.syncs) {
            self.inode(id).sync(last, covers);
        }
        result
    }

    pub(super) fn set_len(&mut self, id: InodeId, len: u64) -> io::Result<()> {
        self.step(StepKind::Range)?;
        check_range(len, 0)?;
        self.apply_effect(id, Effect::Len(len));
        Ok(())
    }

    pub(super) fn allocate(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        self.step(StepKind::Range)?;
        check_range(offset, len)?;
        if self.faults.no_allocate {
            return Err(errno(libc::EOPNOTSUPP));
        }
        self.reserve_pages(id, offset, len)
    }

    /// Turns a range into a hole. Frees its space unless `keep`.
    pub(super) fn clear(&mut self, id: InodeId, offset: u64, len: u64, keep: bool) -> io::Result<()> {
        self.step(StepKind::Range)?;
        check_range(offset, len)?;
        if keep {
            self.reserve_pages(id, offset, len)?;
        }
        self.apply_effect(id, Effect::Clear(offset, len));
        if !keep {
            self.inode(id).release(offset, len);
        }
        Ok(())
    }

    /// Returns the allocated bytes of all files.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.inodes.values().map(Inode::allocated).sum()
    }

    /// Checks that there is space for copies of overwritten pages, if the file system copies on write.
    fn check_copy_space(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        let (Some(room), true) = (self.faults.capacity, self.faults.copy_on_write) else { return Ok(()) };
        let copies = self.inode(id).pages_written(offset, len) * PAGE;
        if self.allocated_bytes() + copies > room { Err(errno(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Allocates the pages of a range. If the disk becomes full, the pages allocated until then stay allocated, as on
    /// ext4.
    fn reserve_pages(&mut self, id: InodeId, offset: u64, len: u64) -> io::Result<()> {
        let mut missing = self.inode(id).pages_missing(offset, len);
        let wanted = missing.len();
        if let Some(room) = self.faults.capacity {
            missing.truncate(usize::try_from(room.saturating_sub(self.allocated_bytes()) / PAGE).unwrap_or(usize::MAX));
        }
        let got = missing.len();
        self.inode(id).reserve(missing);
        if got < wanted { Err(errno(libc::ENOSPC)) } else { Ok(()) }
    }

    /// Completes an operation in flight. A read fills `into`.
    pub(super) fn complete(&mut self, number: u64, into: &mut [u8]) -> io::Result<()> {
        self.check_alive()?;
        let op = self.in_flight.get(&number).expect("an operation completes once").clone();
        let result = match op.action {
            Action::Read => self.read(op.inode, into, op.offset),
            Action::Write => self.write(op.inode, &op.bytes, op.offset),
            Action::WriteThrough => self.write_through(op.inode, &op.bytes, op.offset),
            Action::Sync => self.sync(op.inode, op.covers, SyncScope::All),
            // Any written byte may become durable at any time, so these actions change nothing.
            Action::Prefetch | Action::StartWriteback => Ok(()),
            Action::Allocate => self.allocate(op.inode, op.offset, op.len),
            Action::Punch => self.clear(op.inode, op.offset, op.len, false),
            Action::Zero => self.clear(op.inode, op.offset, op.len, true),
        };
        // If the machine ended at this step, the operation stays in flight, and its bytes may have been stored.
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

/// Fails if a host would not accept the offset and length.
fn check_range(offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(errno(libc::EFBIG)),
    }
}
