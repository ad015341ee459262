//! Early writeback of a file that is being filled.
//!
//! The kernel starts to write finished ranges while the next ones are copied, so the sync at the end has little left to
//! write. This is a hint: durability does not depend on it.

use crate::storage::File;

/// Length of a range for which writeback is started at once.
const WRITEBACK_BYTES: u64 = 8 << 20;
/// Longest gap between two writes of one range: the bitmap between two blocks.
const MAX_GAP_BYTES: u64 = 64 << 10;

/// The last written range of a file for which writeback was not started yet.
#[derive(Default)]
pub(super) struct WriteBehind {
    start: u64,
    end: u64,
}

impl WriteBehind {
    /// Records that `len` bytes at `offset` were written, and starts writeback if the range is long enough.
    pub(super) fn add(&mut self, file: &File, offset: u64, len: u64) {
        if !(self.end..=self.end.saturating_add(MAX_GAP_BYTES)).contains(&offset) {
            self.start_writeback(file);
            self.start = offset;
        }
        self.end = offset + len;
        if self.end - self.start >= WRITEBACK_BYTES {
            self.start_writeback(file);
        }
    }

    fn start_writeback(&mut self, file: &File) {
        if self.end > self.start {
            file.start_writeback(self.start, self.end - self.start);
        }
        self.start = self.end;
    }
}
