//! The operations that a lane passes to its I/O engine.

use std::collections::VecDeque;
use std::io;

use super::cached_reads::CachedReads;
use crate::storage::{Engine, File, FileSlot, Op};

/// A lane's engine, and the operations for which the engine had no room.
pub(super) struct OpQueue {
    // Declared first, so that it is dropped first: its drop waits for the operations in flight.
    pub(super) engine: Box<dyn Engine>,
    /// Operations that did not fit into the engine because its maximum number was in flight, oldest first.
    backlog: VecDeque<Op>,
}

impl OpQueue {
    pub(super) fn new(engine: Box<dyn Engine>) -> OpQueue {
        OpQueue { engine, backlog: VecDeque::new() }
    }

    /// Whether the engine has accepted all operations that were pushed.
    #[inline]
    pub(super) fn has_no_backlog(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Pushes an operation to the engine, or to the backlog if the engine is full.
    #[inline]
    pub(super) fn push(&mut self, op: Op) {
        if !self.backlog.is_empty() {
            return self.backlog.push_back(op);
        }
        if let Err(op) = self.engine.push(op) {
            self.backlog.push_back(op);
        }
    }

    /// Drops the backlog, and waits for the operations in flight, without evaluating them. The engine may fail
    /// meanwhile; then its drop deals with the rest.
    pub(super) fn finish(&mut self) {
        self.backlog.clear();
        let mut completed = Vec::new();
        while self.engine.outstanding() > 0 && self.engine.wait().is_ok() {
            self.engine.reap(&mut completed);
            completed.clear();
        }
    }

    /// Registers a file with the engine and with the page cache of a lane.
    ///
    /// # Errors
    /// Those of [`Engine::register`] and [`CachedReads::register`].
    pub(super) fn register(&mut self, cached_reads: &mut CachedReads, slot: FileSlot, file: &File) -> io::Result<()> {
        self.engine.register(slot, file)?;
        cached_reads.register(slot, file)
    }

    /// Removes the file in a slot from the engine. No operation uses the slot.
    pub(super) fn unregister(&mut self, slot: FileSlot) {
        if let Err(e) = self.engine.unregister(slot) {
            log::warn!("a file that is not used any more stays open: {e}");
        }
    }

    /// Pushes operations of the backlog until the engine is full again.
    pub(super) fn push_backlog(&mut self) {
        while let Some(op) = self.backlog.pop_front() {
            if let Err(op) = self.engine.push(op) {
                self.backlog.push_front(op);
                break;
            }
        }
    }
}
