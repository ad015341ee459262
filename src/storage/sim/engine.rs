//! The simulated engine: operations complete in an order drawn from the seed, and may be cut in the middle by a crash.

use std::io;
use std::os::fd::BorrowedFd;

use super::SharedMachine;
use super::machine::{InFlightOp, errno};
use super::names::InodeId;
use super::{CompletionOrder, Random, SimFile};
use crate::storage::engine::{Engine, FILE_SLOTS};
use crate::storage::env::{Access, File};
use crate::storage::op::{Action, Completion, FileSlot, Op};
use crate::storage::payload::{GuestIovecs, Payload};
use crate::storage::reader::CachedRange;

/// See the file's first line.
pub(super) struct SimEngine {
    shared: SharedMachine,
    /// The files stay open, and locked, as long as they stand here.
    files: Vec<Option<(SimFile, InodeId, Access)>>,
    pushed: Vec<Op>,
    /// With the machine, by its number there.
    flying: Vec<(u64, Op)>,
    over: Vec<Completion>,
    depth: usize,
    calls: u64,
    copies: u64,
    /// For copies only: who makes none has the same course of events.
    random: Random,
}

impl SimEngine {
    pub(super) fn new(shared: SharedMachine, depth: usize) -> SimEngine {
        assert!(depth > 0, "an engine takes at least one operation");
        let files = (0..FILE_SLOTS).map(|_| None).collect();
        let (pushed, flying, over) = (Vec::new(), Vec::new(), Vec::new());
        SimEngine { shared, files, pushed, flying, over, depth, calls: 0, copies: 0, random: Random::new(1) }
    }

    fn complete(&mut self, at: usize) {
        let (number, op) = &mut self.flying[at];
        let mut bytes = vec![0; if op.action == Action::Read { op.payload.len() } else { 0 }];
        let result = {
            let mut world = self.shared.lock();
            let result = world.complete(*number, &mut bytes);
            if world.dead {
                return;
            }
            result
        };
        if op.action == Action::Read && result.is_ok() {
            match &mut op.payload {
                Payload::None => {}
                Payload::Own(b) => b.copy_from_slice(&bytes),
                Payload::Guest(s) => s.copy_from(0, &bytes),
            }
        }
        let (_, op) = self.flying.remove(at);
        self.over.push(Completion { op, result });
    }

    fn complete_one(&mut self) {
        let at = {
            let mut world = self.shared.lock();
            let late = |(number, _): &(u64, Op)| world.in_flight.get(number).is_some_and(|op| op.late);
            let on_time: Vec<usize> = (0..self.flying.len()).filter(|&at| !late(&self.flying[at])).collect();
            match (world.order, on_time.len()) {
                (_, 0) | (CompletionOrder::Pushed, _) => on_time.first().copied().unwrap_or(0),
                (CompletionOrder::Any, count) => on_time[world.random.index(count)],
            }
        };
        self.complete(at);
    }

    /// Whether the machine goes on after what is complete now.
    fn goes_on(&self) -> bool {
        let mut world = self.shared.lock();
        if let Some(left) = world.completion_limit {
            world.completion_limit = Some(left.saturating_sub(1));
            return !world.dead && left > 0;
        }
        !world.dead && (world.order == CompletionOrder::Pushed || world.random.chance(1, 2))
    }
}

fn bytes_of(op: &Op) -> Vec<u8> {
    if !matches!(op.action, Action::Write | Action::WriteThrough) {
        return Vec::new();
    }
    let mut bytes = vec![0; op.payload.len()];
    match &op.payload {
        Payload::None => {}
        Payload::Own(b) => bytes.copy_from_slice(b),
        Payload::Guest(s) => s.copy_to(0, &mut bytes),
    }
    bytes
}

impl Engine for SimEngine {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)?;
        match file {
            File::Sim(f) => {
                let (inode, access) = f.inode_in(&self.shared).ok_or_else(|| errno(libc::EBADF))?;
                *entry = Some((f.clone(), inode, access));
                Ok(())
            }
            File::Host(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "a host's file in a simulated engine")),
        }
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        *self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)? = None;
        Ok(())
    }

    fn find_cached(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        (self.shared.lock().cached_reads && self.random.chance(7, 8)).then(|| CachedRange::new(slot, offset, len))
    }

    fn copy_cached(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        let Some(Some((_, inode, _))) = self.files.get(usize::from(found.slot().0)) else { return false };
        let mut bytes = vec![0; found.len()];
        let there = self.shared.lock().read_mapped(*inode, &mut bytes, found.offset()).is_ok();
        let whole = there && self.random.chance(7, 8);
        if !whole {
            // Half of it.
            bytes.truncate(found.len() / 2);
            bytes.fill(0xA5);
        }
        into.copy_from(at, &bytes);
        self.copies += u64::from(whole);
        whole
    }

    fn copy_count(&self) -> u64 {
        self.copies
    }

    fn push(&mut self, op: Op) -> Result<(), Op> {
        if self.outstanding() == self.depth {
            return Err(op);
        }
        self.pushed.push(op);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut world = self.shared.lock();
        world.check_alive()?;
        if self.pushed.is_empty() {
            return Ok(());
        }
        self.calls += 1;
        for op in self.pushed.drain(..) {
            let file = self.files.get(usize::from(op.slot.0)).and_then(Option::as_ref);
            let inode = match file {
                Some((_, inode, Access::Write)) => *inode,
                Some((_, inode, Access::Read))
                    if matches!(op.action, Action::Read | Action::Sync | Action::Prefetch) =>
                {
                    *inode
                }
                _ => {
                    self.over.push(Completion { op, result: Err(errno(libc::EBADF)) });
                    continue;
                }
            };
            let covers = world.last_number();
            let number = world.next_number();
            let bytes = bytes_of(&op);
            world.counts.submitted += 1;
            let late = world.faults.late.contains(&world.counts.submitted);
            let flying = InFlightOp { inode, action: op.action, offset: op.offset, len: op.len, bytes, covers, late };
            world.in_flight.insert(number, flying);
            self.flying.push((number, op));
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        while !self.flying.is_empty() && self.goes_on() {
            self.complete_one();
        }
        out.append(&mut self.over);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.over.is_empty() && !self.flying.is_empty() {
            self.complete_one();
        }
        self.shared.lock().check_alive()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn outstanding(&self) -> usize {
        self.pushed.len() + self.flying.len() + self.over.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn system_calls(&self) -> u64 {
        self.calls
    }

    fn name(&self) -> &'static str {
        "simulated"
    }
}

impl Drop for SimEngine {
    fn drop(&mut self) {
        while !self.flying.is_empty() && !self.shared.lock().dead {
            self.complete_one();
        }
    }
}
