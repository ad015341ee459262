//! Writeback of a file while the file is being filled.
//!
//! The kernel writes finished ranges while the following ranges are copied, so the sync at the end is short. Starting
//! writeback is a hint: durability does not depend on it.

use crate::storage::File;

/// Minimum length of a range for which writeback is started while the range may still grow.
const WRITEBACK_BYTES: u64 = 8 << 20;
/// Maximum gap between two writes of one range. The bitmap between two blocks is such a gap.
const MAX_GAP_BYTES: u64 = 64 << 10;

/// The range of a file that was written last and whose writeback has not been started.
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
