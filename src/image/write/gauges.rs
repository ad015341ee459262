//! Gauges of a writable image: numbers that are computed when they are requested, not counted.

use super::journal::Journal;
use super::journal_layout::JOURNAL_SLOTS;
use super::writable::Writable;

/// The state of a writable image at one moment. A number is `None` if the image has no such thing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WritableGauges {
    /// Slots of the live journal that are in use.
    pub journal_slots_used: Option<u64>,
    /// Slots of the live journal.
    pub journal_slots: Option<u64>,
    /// Bitmap sectors with bits that are not in the file and that no running commit has taken.
    pub dirty_bitmap_sectors: u64,
    /// Bytes at the end of the file in which new blocks can be placed before the file has to grow. Also `None` while
    /// another thread begins a session or grows the file.
    pub reserved_bytes: Option<u64>,
}

impl Writable {
    /// Returns the gauges of the image. Makes no system call, and waits for no lock that is held during one.
    pub fn gauges(&self) -> WritableGauges {
        let used = self.journal().map(Journal::len);
        // A thread that holds this lock may be writing a stamp, and the storage may not respond.
        let tail = self.sparse.as_ref().and_then(|sparse| sparse.free_tail.try_lock().ok());
        WritableGauges {
            journal_slots_used: used.map(|slots| slots as u64),
            journal_slots: used.map(|_| u64::from(JOURNAL_SLOTS)),
            dirty_bitmap_sectors: self.dirty().len() as u64,
            reserved_bytes: tail.map(|tail| tail.usable_end().byte_offset().saturating_sub(tail.next.byte_offset())),
        }
    }
}
