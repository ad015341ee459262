//! Eviction of bitmap sectors from their frames by the clock algorithm.
//!
//! The clock hand passes over the frames. A bitmap sector that was read since the hand last passed stays for another
//! turn of the hand. A bitmap sector that is not clean, or that a request in flight has pinned, is never evicted. If
//! the hand finds no frame to evict within [`MAX_TRIES`] frames, the pool grows beyond its limit. That growth is
//! bounded: commits limit the number of dirty sectors, and the depth of the queues limits the number of pinned ones.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::entry::{BitmapEntry, EntryTable};
use super::frame::{BitmapFrame, LockedFrame};
use crate::image::sparse_array::SparseArray;

/// Maximum number of frames that the hand passes in one allocation.
const MAX_TRIES: usize = 256;

/// The frames of one image.
#[derive(Debug)]
pub(super) struct FramePool {
    frames: SparseArray<BitmapFrame>,
    clock: Mutex<Clock>,
    max_frames: AtomicUsize,
}

/// Free frames, and the hand of the clock.
#[derive(Debug, Default)]
struct Clock {
    free: Vec<u32>,
    /// Number of frames that exist; their numbers are below it.
    made: u32,
    hand: u32,
}

impl FramePool {
    /// Creates an empty pool for at most `len` frames. An allocation tries to evict a bitmap sector if `max_frames` or
    /// more frames are in use.
    pub(super) fn new(len: usize, max_frames: usize) -> FramePool {
        FramePool {
            frames: SparseArray::new(len, BitmapFrame::new),
            clock: Mutex::default(),
            max_frames: AtomicUsize::new(max_frames),
        }
    }

    /// Returns the number of frames in use at which an allocation tries to evict a bitmap sector.
    pub(super) fn max_frames(&self) -> usize {
        self.max_frames.load(Ordering::Relaxed)
    }

    pub(super) fn set_max_frames(&self, frames: usize) {
        self.max_frames.store(frames, Ordering::Relaxed);
    }

    /// Number of frames that exist, used or free.
    pub(super) fn made(&self) -> usize {
        self.clock().made as usize
    }

    /// Returns a frame by its number.
    #[inline]
    pub(super) fn frame(&self, number: u32) -> &BitmapFrame {
        self.frames.get(number as usize).expect("frame numbers come from `allocate`")
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free frame, evicts one, or makes one. The frame is returned locked, without an owner.
    pub(super) fn allocate(&self, table: &EntryTable) -> (u32, LockedFrame<'_>) {
        // Lock order: a thread that holds the lock of a frame may wait for the lock of the clock. So under the clock's
        // lock, a frame in use is locked only by `try_lock`, and `lock` is used only for frames without an owner.
        let mut clock = self.clock();
        // Several bitmap sectors are evicted if the pool has grown beyond its limit.
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

    /// Moves the hand until it has evicted a bitmap sector, and returns the number of the frame. `None` if the hand
    /// found no frame to evict.
    fn evict_one(&self, clock: &mut Clock, table: &EntryTable) -> Option<u32> {
        // At most two turns, as the first one may only clear the `used` flags, and at most `MAX_TRIES` frames. If most
        // frames cannot be evicted, a new frame is cheaper than a longer search. The next allocation continues from
        // here.
        for _ in 0..(2 * clock.made as usize).min(MAX_TRIES) {
            clock.hand = (clock.hand + 1) % clock.made;
            if self.try_evict(clock.hand, table) {
                return Some(clock.hand);
            }
        }
        None
    }

    /// Evicts the bitmap sector in a frame. Returns false if the bitmap sector must stay, or if the frame is free or
    /// locked.
    fn try_evict(&self, number: u32, table: &EntryTable) -> bool {
        let frame = self.frame(number);
        if frame.take_used() {
            return false;
        }
        let Some(mut frame) = frame.try_lock() else { return false };
        let Some(index) = frame.owner() else { return false }; // free, or about to be
        if frame.state.pins > 0 || !frame.state.is_clean() {
            return false;
        }
        table.set(index, BitmapEntry::Absent(frame.state.evictions.wrapping_add(1)));
        frame.release();
        true
    }

    /// Frees a frame to which no entry of the table refers.
    pub(super) fn free(&self, number: u32, mut frame: LockedFrame<'_>) {
        frame.release();
        drop(frame);
        self.clock().free.push(number);
    }
}
