//! The simulated engine: operations complete in an order drawn from the seed ([`CompletionOrder`]), and a crash may
//! interrupt them.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::file::SimFile;
use super::machine::{InFlightOp, errno};
use super::names::InodeId;
use super::page_cache::SimPageCache;
use super::shared::SharedMachine;
use super::types::CompletionOrder;
use crate::storage::backend::File;
use crate::storage::engine::{Engine, PageCache};
use crate::storage::op::{Action, Completion, FILE_SLOTS, FileSlot, Op};
use crate::storage::payload::Payload;
use crate::storage::types::Access;

/// Engine of a [`SimHost`](super::SimHost).
pub(super) struct SimEngine {
    shared: SharedMachine,
    /// Registered files. They stay open and locked while they are registered.
    files: Vec<Option<(Arc<SimFile>, InodeId, Access)>>,
    pushed: Vec<Op>,
    /// Operations in flight, with their numbers in the machine.
    in_flight: Vec<(u64, Op)>,
    completed: Vec<Completion>,
    depth: usize,
    calls: u64,
}

impl SimEngine {
    pub(super) fn new(shared: SharedMachine, depth: usize) -> SimEngine {
        assert!(depth > 0, "an engine takes at least one operation");
        let files = (0..FILE_SLOTS).map(|_| None).collect();
        let (pushed, in_flight, completed) = (Vec::new(), Vec::new(), Vec::new());
        SimEngine { shared, files, pushed, in_flight, completed, depth, calls: 0 }
    }

    /// Checks what the caller of `register` and `unregister` guarantees.
    fn check_unused(&self, slot: FileSlot) {
        let mut ops = self.pushed.iter().chain(self.in_flight.iter().map(|(_, op)| op));
        assert!(ops.all(|op| op.slot != slot), "the file in slot {} changes under an operation", slot.0);
    }

    fn complete(&mut self, at: usize) {
        let (number, op) = &mut self.in_flight[at];
        let mut bytes = vec![0; if op.action == Action::Read { op.payload.len() } else { 0 }];
        let result = {
            let mut machine = self.shared.lock();
            let result = machine.complete(*number, &mut bytes);
            if machine.dead {
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
        let (_, op) = self.in_flight.remove(at);
        self.completed.push(Completion { op, result });
    }

    fn complete_one(&mut self) {
        let at = {
            let mut machine = self.shared.lock();
            let late = |(number, _): &(u64, Op)| machine.in_flight.get(number).is_some_and(|op| op.late);
            let on_time: Vec<usize> = (0..self.in_flight.len()).filter(|&at| !late(&self.in_flight[at])).collect();
            match (machine.order, on_time.len()) {
                (_, 0) | (CompletionOrder::Pushed, _) => on_time.first().copied().unwrap_or(0),
                (CompletionOrder::Any, count) => on_time[machine.random.index(count)],
            }
        };
        self.complete(at);
    }

    /// Returns whether another operation may complete now. Uses up one completion of the limit, if there is one.
    fn may_complete(&self) -> bool {
        let mut machine = self.shared.lock();
        if let Some(left) = machine.completion_limit {
            machine.completion_limit = Some(left.saturating_sub(1));
            return !machine.dead && left > 0;
        }
        !machine.dead && (machine.order == CompletionOrder::Pushed || machine.random.chance(1, 2))
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
        let entry = self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)?;
        *entry = Some(SimFile::of(file, &self.shared)?);
        self.check_unused(slot);
        Ok(())
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        self.check_unused(slot);
        *self.files.get_mut(slot.as_usize()).ok_or(io::ErrorKind::InvalidInput)? = None;
        Ok(())
    }

    fn page_cache(&self) -> Option<Box<dyn PageCache>> {
        Some(Box::new(SimPageCache::new(self.shared.clone())))
    }

    fn push(&mut self, op: Op) -> Result<(), Op> {
        if self.outstanding() == self.depth {
            return Err(op);
        }
        self.pushed.push(op);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut machine = self.shared.lock();
        machine.check_alive()?;
        if self.pushed.is_empty() {
            return Ok(());
        }
        self.calls += 1;
        for op in self.pushed.drain(..) {
            let file = self.files.get(op.slot.as_usize()).and_then(Option::as_ref);
            let inode = match file {
                Some((_, inode, Access::Write)) => *inode,
                Some((_, inode, Access::Read))
                    if matches!(op.action, Action::Read | Action::Sync | Action::Prefetch) =>
                {
                    *inode
                }
                _ => {
                    self.completed.push(Completion { op, result: Err(errno(libc::EBADF)) });
                    continue;
                }
            };
            let covers = machine.last_number();
            let number = machine.next_number();
            let bytes = bytes_of(&op);
            machine.counts.submitted += 1;
            let late = machine.faults.late.contains(&machine.counts.submitted);
            let flying = InFlightOp { inode, action: op.action, offset: op.offset, len: op.len, bytes, covers, late };
            machine.in_flight.insert(number, flying);
            self.in_flight.push((number, op));
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        while !self.in_flight.is_empty() && self.may_complete() {
            self.complete_one();
        }
        out.append(&mut self.completed);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.completed.is_empty() && !self.in_flight.is_empty() {
            self.complete_one();
        }
        self.shared.lock().check_alive()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn outstanding(&self) -> usize {
        self.pushed.len() + self.in_flight.len() + self.completed.len()
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
        while !self.in_flight.is_empty() && !self.shared.lock().dead {
            self.complete_one();
        }
    }
}
