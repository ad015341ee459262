//! Which granule leaves memory when another needs its frame: the clock.
//!
//! The hand goes round the frames. A granule that was looked at since it came by last stays for another round; one that
//! the file does not know all of, or that a request under way needs, stays in any case. Where all do, there is a frame
//! more than there should be: commits bound the first (`most_dirty`), the depth of the queues the second.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::entry::{BitmapEntry, EntryTable};
use super::frame::{BitmapFrame, LockedFrame};
use crate::image::sparse_array::SparseArray;

/// Frames that are tried for one that is needed.
const MAX_TRIES: usize = 256;

/// The frames of an image, and which of them are free.
#[derive(Debug)]
pub(super) struct FramePool {
    frames: SparseArray<BitmapFrame>,
    clock: Mutex<Clock>,
    max_frames: AtomicUsize,
}

/// Frames that belong to nobody, and the hand of the clock.
#[derive(Debug, Default)]
struct Clock {
    free: Vec<u32>,
    /// Frames that were ever given out: numbers below this.
    made: u32,
    hand: u32,
}

impl FramePool {
    /// A pool of at most `len` frames, which tries to do with `max_frames`.
    pub(super) fn new(len: usize, max_frames: usize) -> FramePool {
        FramePool {
            frames: SparseArray::new(len, BitmapFrame::new),
            clock: Mutex::default(),
            max_frames: AtomicUsize::new(max_frames),
        }
    }

    pub(super) fn max_frames(&self) -> usize {
        self.max_frames.load(Ordering::Relaxed)
    }

    pub(super) fn set_max_frames(&self, frames: usize) {
        self.max_frames.store(frames, Ordering::Relaxed);
    }

    /// Frames that were ever given out.
    pub(super) fn made(&self) -> usize {
        self.clock().made as usize
    }

    #[inline]
    pub(super) fn frame(&self, number: u32) -> &BitmapFrame {
        self.frames.get(number as usize).expect("a number that was given out")
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame that belongs to nobody.
    pub(super) fn allocate(&self, table: &EntryTable) -> (u32, LockedFrame<'_>) {
        // Frames are only tried while the pool is locked, or belong to nobody: who holds one may ask for the pool.
        let mut clock = self.clock();
        // After a time of many dirty ones more than one has to leave.
        while clock.made as usize - clock.free.len() >= self.max_frames() {
            let Some(number) = self.evict_one(&mut clock, table) else { break };
            clock.free.push(number);
        }
        if let Some(number) = clock.free.pop() {
            drop(clock);
            return (number, self.frame(number).lock());
        }
        let number = clock.made;
        clock.made += 1;
        (number, self.frames.get_or_init(number as usize).lock())
    }

    /// Turns the hand until a granule leaves: its frame. `None` where all have to stay.
    fn evict_one(&self, clock: &mut Clock, table: &EntryTable) -> Option<u32> {
        // Twice round: the first round may be that of those that were looked at. But not for long: where most have to stay,
        // one more frame is cheaper than to look for the few, and the next who come go on from here.
        for _ in 0..(2 * clock.made as usize).min(MAX_TRIES) {
            clock.hand = (clock.hand + 1) % clock.made;
            if self.try_evict(clock.hand, table) {
                return Some(clock.hand);
            }
        }
        None
    }

    /// Has the granule of a frame leave; false where it has to stay.
    fn try_evict(&self, number: u32, table: &EntryTable) -> bool {
        let frame = self.frame(number);
        if frame.take_used() {
            return false;
        }
        let Some(mut frame) = frame.try_lock() else { return false };
        let Some(granule) = frame.owner() else { return false }; // free, or on its way to be
        if frame.state.pins > 0 || !frame.state.is_clean() {
            return false;
        }
        table.set(granule, BitmapEntry::Absent(frame.state.evictions.wrapping_add(1)));
        frame.release();
        true
    }

    /// Gives back a frame that is needed no more; the table does not name it.
    pub(super) fn free(&self, number: u32, mut frame: LockedFrame<'_>) {
        frame.release();
        drop(frame);
        self.clock().free.push(number);
    }
}
