//! The end of a file that was committed: right behind its last block.

use std::sync::atomic::Ordering;

use super::writable::Writable;
use crate::error::{ErrorKind, Result};
use crate::format::layout::PAGE;
use crate::mutant::{self, Mutant};
use crate::units::SECTOR;

impl Writable {
    /// Makes the file end right behind its last block, durably: the last act on an image that was committed.
    /// The new footer is durable before the file is cut, so that there is always one. Settles the file's time, too.
    pub fn trim(&self) -> Result<()> {
        self.check_poison()?;
        let end = self.used_end() * SECTOR;
        let file = self.file();
        if file.stat()?.len != end + SECTOR {
            if let Err(e) = file.write_at(&self.footer_bytes(), end) {
                // What is reserved behind the last block reads as zeros anyway: perhaps it is room enough.
                let tail = end.next_multiple_of(PAGE)..self.free_tail().end * SECTOR / PAGE * PAGE;
                if e.kind() != ErrorKind::NoSpace {
                    return Err(e);
                }
                // A file system may have no room for the change either (XFS).
                let given = file.punch_hole(tail.start, tail.end.saturating_sub(tail.start));
                if let Err(e) = given.and_then(|()| file.write_at(&self.footer_bytes(), end)) {
                    log::warn!("{}; the file keeps its length until it is next closed", e.line());
                    // It is not cut off, and must not stay without its journal.
                    self.erase_stamp()?;
                    return self.finish_mtime();
                }
            }
            if !mutant::enabled(Mutant::TrimUnsynced) {
                file.sync()?;
            }
            file.set_len(end + SECTOR)?;
            file.sync()?;
        }
        self.finish_mtime()
    }
    /// The file sector after the last block the file knows.
    fn used_end(&self) -> u64 {
        let Some(block_size) = self.image().block_size() else { return self.image().data_end() / SECTOR };
        let (room, table) = (self.free_tail(), self.image().bat().expect("sparse images have a table"));
        let stride = u64::from(block_size.stride_sectors());
        // An entry behind the end of the disk may failpoint anywhere: what lies outside the file is no block (O12).
        let known = table.used().filter(|(block, _)| !room.fresh.contains(block));
        let last = known.map(|(_, place)| u64::from(place) + stride).filter(|end| *end <= room.end).max().unwrap_or(0);
        last.max(self.image().metadata_end().div_ceil(SECTOR))
    }

    /// Puts the time of the file back after its structure changed, if the disk's contents did not. Nobody may be writing.
    ///
    /// # Errors
    /// `Io`.
    pub fn restore_mtime(&self) -> Result<()> {
        if self.content_changed.load(Ordering::SeqCst) { Ok(()) } else { self.mtime_at_open.restore_and_sync() }
    }

    /// Gives the file the time that goes with what was done to it; the last act before it is closed.
    pub(super) fn finish_mtime(&self) -> Result<()> {
        match self.content_changed.load(Ordering::SeqCst) {
            true => self.mtime_at_open.advance(),
            false => self.mtime_at_open.restore_and_sync(),
        }
    }
}
