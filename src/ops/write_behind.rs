//! Has the host write early what is written anyway, while the next is being copied: the sync at the end then waits for
//! little, and the device is never idle before it. A hint: what is durable when does not depend on it.

use crate::storage::File;

/// Bytes that the host is asked to write at once.
const WRITEBACK_BYTES: u64 = 8 << 20;
/// Bytes between two writes that are asked for with them: bitmaps between blocks.
const MAX_GAP_BYTES: u64 = 64 << 10;

/// A run of a file that was written and that the host was not asked to write yet.
#[derive(Default)]
pub(super) struct WriteBehind {
    start: u64,
    end: u64,
}

impl WriteBehind {
    /// Bytes at `offset` were written.
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
