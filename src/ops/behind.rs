//! Has the host write early what is written anyway, while the next is being copied: the sync at the end then waits for
//! little, and the device is never idle before it. A hint: what is durable when does not depend on it.

use crate::storage::File;

/// Bytes that the host is asked to write at once.
const STEP: u64 = 8 << 20;
/// Bytes between two writes that are asked for with them: bitmaps between blocks.
const GAP: u64 = 64 << 10;

/// A run of a file that was written and that the host was not asked to write yet.
#[derive(Default)]
pub(super) struct Behind {
    start: u64,
    end: u64,
}

impl Behind {
    /// Bytes at `offset` were written.
    pub(super) fn wrote(&mut self, file: &File, offset: u64, len: u64) {
        if !(self.end..=self.end.saturating_add(GAP)).contains(&offset) {
            self.ask(file);
            self.start = offset;
        }
        self.end = offset + len;
        if self.end - self.start >= STEP {
            self.ask(file);
        }
    }

    fn ask(&mut self, file: &File) {
        if self.end > self.start {
            file.start_writeback(self.start, self.end - self.start);
        }
        self.start = self.end;
    }
}
