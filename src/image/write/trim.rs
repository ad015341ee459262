//! Trim: truncates a committed file so that the footer follows the last block.

use std::sync::atomic::Ordering;

use super::writable::Writable;
use crate::error::{ErrorKind, Result};
use crate::format::layout::PAGE;
use crate::mutant::{self, Mutant};
use crate::units::{FileSector, SECTOR};

impl Writable {
    /// Truncates the file after its last block, durably, and sets its final modification time. Called last, after a
    /// commit.
    ///
    /// The new footer is durable before the file is truncated, so that there is always a footer.
    ///
    /// # Errors
    /// `Poisoned`, `Io`. A file system without space for the new footer is no error: the file keeps its length, and the
    /// stamp is erased instead. With copy on write, `NoSpace` if the erasure fails.
    pub fn trim(&self) -> Result<()> {
        self.check_poison()?;
        let end = self.used_end().byte_offset();
        let file = self.file();
        if file.stat()?.len != end + SECTOR {
            if let Err(e) = file.write_at(&self.footer_bytes(), end) {
                // The free tail after the last block reads as zeros: freeing its space may be enough for the footer.
                let tail = end.next_multiple_of(PAGE)..self.free_tail().end.byte_offset() / PAGE * PAGE;
                if e.kind() != ErrorKind::NoSpace {
                    return Err(e);
                }
                // The file system may have no space for the punch either (XFS).
                let freed = file.punch_hole(tail.start, tail.end.saturating_sub(tail.start));
                if let Err(e) = freed.and_then(|()| file.write_at(&self.footer_bytes(), end)) {
                    log::warn!("{}; the file keeps its free space at the end until it is next closed", e.line());
                    // The stamp is still in the file, and its journal is about to be removed.
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

    /// The file sector after the last block whose BAT entry is in the file; the end of the metadata if no block ends
    /// later.
    fn used_end(&self) -> FileSector {
        let Some(block_size) = self.image().block_size() else {
            return FileSector::containing(self.image().data_end());
        };
        let (tail, table) = (self.free_tail(), self.image().bat().expect("sparse images have a table"));
        // The entry of a block beyond the end of the disk may contain any place. An entry outside the file is ignored
        // (O12).
        let in_file = table.used().filter(|(block, _)| !tail.fresh.contains(block));
        let ends = in_file.map(|(_, place)| place.end(block_size)).filter(|end| *end <= tail.end);
        ends.chain([FileSector::at_or_after(self.image().metadata_end())]).max().expect("the end of the metadata")
    }

    /// Restores the modification time after a change of the file's structure, unless the contents of the disk have
    /// changed. No write may be in flight.
    ///
    /// # Errors
    /// `Io`.
    pub fn restore_mtime(&self) -> Result<()> {
        if self.content_changed.load(Ordering::SeqCst) { Ok(()) } else { self.mtime_at_open.restore_and_sync() }
    }

    /// Sets the modification time before the file is closed. A retired image gets the time that was given to `retire`.
    /// Otherwise advances the time if the contents of the disk have changed, and restores the saved time if not.
    pub(super) fn finish_mtime(&self) -> Result<()> {
        if let Some(time) = self.retired_time.get() {
            return self.mtime_at_open.set_and_sync(*time);
        }
        match self.content_changed.load(Ordering::SeqCst) {
            true => self.mtime_at_open.advance(),
            false => self.mtime_at_open.restore_and_sync(),
        }
    }
}
