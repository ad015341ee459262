//! Which granule leaves memory when another needs its frame: the clock.
//!
//! The hand goes round the frames. A granule that was looked at since it came by last stays for another round; one that
//! the file does not know all of, or that a request under way needs, stays in any case. Where all do, there is a frame
//! more than there should be: commits bound the first (`most_dirty`), the depth of the queues the second.

use super::bitmaps::Bitmaps;
use super::granule::{Entry, Locked};

/// Frames that are tried for one that is needed.
const TRIES: usize = 256;

/// Frames that belong to nobody, and the hand of the clock.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Vec<u32>,
    /// Frames that were ever given out: numbers below this.
    made: u32,
    hand: u32,
}

impl Pool {
    pub(super) fn made(&self) -> usize {
        self.made as usize
    }
}

impl Bitmaps {
    /// A frame that belongs to nobody.
    pub(super) fn vacate(&self) -> (u32, Locked<'_>) {
        // Frames are only tried while the pool is locked, or belong to nobody: who holds one may ask for the pool.
        let mut pool = self.pool();
        // After a time of many dirty ones more than one has to leave.
        while pool.made() - pool.free.len() >= self.most() {
            let Some(number) = self.turn(&mut pool) else { break };
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
    fn turn(&self, pool: &mut Pool) -> Option<u32> {
        // Twice round: the first round may be that of those that were looked at. But not for long: where most have to stay,
        // one more frame is cheaper than to look for the few, and the next who come go on from here.
        for _ in 0..(2 * pool.made()).min(TRIES) {
            pool.hand = (pool.hand + 1) % pool.made;
            if self.dismiss(pool.hand) {
                return Some(pool.hand);
            }
        }
        None
    }

    /// Has the granule of a frame leave; false where it has to stay.
    fn dismiss(&self, number: u32) -> bool {
        let frame = self.frame(number);
        if frame.take_used() {
            return false;
        }
        let Some(mut frame) = frame.try_lock() else { return false };
        let Some(granule) = frame.owner() else { return false }; // free, or on its way to be
        if frame.known.pins > 0 || !frame.known.is_in_file() {
            return false;
        }
        self.enter(granule, Entry::Absent(frame.known.times.wrapping_add(1)));
        frame.vacate();
        true
    }

    /// Gives back a frame that is needed no more; the table does not name it.
    pub(super) fn put_back(&self, number: u32, mut frame: Locked<'_>) {
        frame.vacate();
        drop(frame);
        self.pool().free.push(number);
    }
}
