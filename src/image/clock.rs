//! Which granule leaves memory when another needs its frame: the clock.
//!
//! The hand goes round the frames. A granule that was looked at since it came by last stays for another round; one that
//! the file does not know all of, or that a request under way needs, stays in any case. Where all do, there is a frame
//! more than there should be: commits bound the first (`most_dirty`), the depth of the queues the second.

use super::bitmap_frame::{BitmapEntry, LockedFrame};
use super::bitmaps::Bitmaps;

/// Frames that are tried for one that is needed.
const MAX_TRIES: usize = 256;

/// Frames that belong to nobody, and the hand of the clock.
#[derive(Debug, Default)]
pub(super) struct FramePool {
    free: Vec<u32>,
    /// Frames that were ever given out: numbers below this.
    made: u32,
    hand: u32,
}

impl FramePool {
    pub(super) fn made(&self) -> usize {
        self.made as usize
    }
}

impl Bitmaps {
    /// A frame that belongs to nobody.
    pub(super) fn allocate_frame(&self) -> (u32, LockedFrame<'_>) {
        // Frames are only tried while the pool is locked, or belong to nobody: who holds one may ask for the pool.
        let mut pool = self.pool();
        // After a time of many dirty ones more than one has to leave.
        while pool.made() - pool.free.len() >= self.max_frames() {
            let Some(number) = self.evict_one(&mut pool) else { break };
            pool.free.push(number);
        }
        if let Some(number) = pool.free.pop() {
            drop(pool);
            return (number, self.frame(number).lock());
        }
        let number = pool.made;
        pool.made += 1;
        (number, self.new_frame(number as usize).lock())
    }

    /// Turns the hand until a granule leaves: its frame. `None` where all have to stay.
    fn evict_one(&self, pool: &mut FramePool) -> Option<u32> {
        // Twice round: the first round may be that of those that were looked at. But not for long: where most have to stay,
        // one more frame is cheaper than to look for the few, and the next who come go on from here.
        for _ in 0..(2 * pool.made()).min(MAX_TRIES) {
            pool.hand = (pool.hand + 1) % pool.made;
            if self.try_evict(pool.hand) {
                return Some(pool.hand);
            }
        }
        None
    }

    /// Has the granule of a frame leave; false where it has to stay.
    fn try_evict(&self, number: u32) -> bool {
        let frame = self.frame(number);
        if frame.take_used() {
            return false;
        }
        let Some(mut frame) = frame.try_lock() else { return false };
        let Some(granule) = frame.owner() else { return false }; // free, or on its way to be
        if frame.state.pins > 0 || !frame.state.is_clean() {
            return false;
        }
        self.set_entry(granule, BitmapEntry::Absent(frame.state.evictions.wrapping_add(1)));
        frame.release();
        true
    }

    /// Gives back a frame that is needed no more; the table does not name it.
    pub(super) fn free_frame(&self, number: u32, mut frame: LockedFrame<'_>) {
        frame.release();
        drop(frame);
        self.pool().free.push(number);
    }
}
