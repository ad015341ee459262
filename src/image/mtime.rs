//! Keeps the modification time of an image's file, by which children detect changes of their parent's contents.
//!
//! A child records the time of its parent's file, in whole seconds (format 4.3). So the time must change exactly
//! when the disk's contents change:
//!
//! - An operation that preserves the contents (an open without a write, growth, trim, repair, compact, resize, a safe
//!   rebase) restores the file's previous time.
//! - An operation that changes the contents advances the time by at least a second, so that a child created within the
//!   same second detects the change. The file's time may thus lie up to a second in the future.
//!
//! A killed process leaves the time of its last write, so an unchanged parent may be reported as changed, which is a
//! false alarm. A change can be missed only if the last write before the kill was not later than the recorded second. A
//! power cut may restore the time of the last sync of the whole file, which is part of every clean close.

use crate::error::Result;
use crate::storage::{File, ModifiedTime};

/// The saved modification time of a file.
#[derive(Clone, Debug)]
pub struct SavedMtime {
    file: File,
    before: ModifiedTime,
}

impl SavedMtime {
    /// Saves the present time of `file`, which is open for writing and locked exclusively.
    ///
    /// # Errors
    /// `Io`.
    pub fn save(file: &File) -> Result<SavedMtime> {
        Ok(SavedMtime { file: file.clone(), before: file.stat()?.last_change() })
    }

    /// Returns the time `seconds` (Unix) of `file` as if it had been saved. `file` is open for writing and locked
    /// exclusively.
    pub fn at(file: &File, seconds: i64) -> SavedMtime {
        SavedMtime { file: file.clone(), before: ModifiedTime { seconds, nanos: 0 } }
    }

    /// Restores the time, durably, after an operation that preserved the disk's contents. If this process may not set
    /// the time, the file keeps the time that it has now.
    ///
    /// # Errors
    /// `Io`.
    pub fn restore_and_sync(&self) -> Result<()> {
        if self.restore()? { self.file.sync_all() } else { Ok(()) }
    }

    /// Restores the time during an open, without a sync. A power cut may undo the change of the time, which causes a
    /// false alarm. Only the file's owner may set its time, so a sync here would not always happen, and no order of
    /// durable writes could rely on that sync.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn restore_at_open(&self) -> Result<()> {
        self.restore().map(drop)
    }

    /// Restores the time without a sync. Returns whether there is a change to make durable.
    fn restore(&self) -> Result<bool> {
        Ok(self.file.stat()?.last_change() != self.before && self.set(self.before)?)
    }

    /// Sets the time. Returns false if this process may not set it, because only the file's owner may: the file keeps
    /// the time that it has now.
    fn set(&self, time: ModifiedTime) -> Result<bool> {
        match self.file.set_modified(time) {
            Err(e) if e.is_denied() => {
                log::info!("{}; children of this image will warn that it was changed", e.line());
                Ok(false)
            }
            set => set.map(|()| true),
        }
    }

    /// Runs `work`, which preserves the disk's contents even if it fails, and restores the time of `file`, durably.
    ///
    /// # Errors
    /// The error of `work`; `Io`. If `work` and the restoration fail, the error of the restoration is returned if it is
    /// from a failed sync, and the error of `work` otherwise.
    pub fn preserve<T>(file: &File, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let time = SavedMtime::save(file)?;
        let outcome = work();
        let put_back = time.restore_and_sync();
        match (outcome, put_back) {
            (Err(e), Err(of_sync)) => Err(if of_sync.is_from_sync() { of_sync } else { e }),
            (outcome, put_back) => outcome.and_then(|done| put_back.map(|()| done)),
        }
    }

    /// Returns a time that is, in whole seconds, later than the saved one and not earlier than the present one. The
    /// file gets this time when it stops taking writes, and a new child records the time in advance.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn later(&self) -> Result<ModifiedTime> {
        let seconds = self.file.stat()?.modified.max(self.before.seconds.saturating_add(1));
        Ok(ModifiedTime { seconds, nanos: 0 })
    }

    /// Sets the time, durably. If this process may not set the time, the file keeps the time that it has now.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn set_and_sync(&self, time: ModifiedTime) -> Result<()> {
        if self.set(time)? { self.file.sync_all() } else { Ok(()) }
    }

    /// Advances the time, durably, to a later second than the saved one, because the disk's contents have changed. If
    /// this process may not set the time, the file keeps the time that it has now.
    ///
    /// # Errors
    /// `Io`.
    pub fn advance(&self) -> Result<()> {
        let is_later = self.file.stat()?.modified > self.before.seconds;
        let later = ModifiedTime { seconds: self.before.seconds.saturating_add(1), nanos: 0 };
        if is_later || self.set(later)? { self.file.sync_all() } else { Ok(()) }
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::super::testing::{child, commit, file, grow, host_with, open};
    use crate::units::{BlockIndex, SectorRange};

    #[test]
    fn only_changes_of_contents_move_the_time() {
        let host = host_with(child(), 128 * 40);
        let time = || file(&host).stat().unwrap().last_change();
        let before = time();
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        assert_ne!(time(), before, "growth writes");
        image.trim().unwrap();
        drop(image);
        assert_eq!(time(), before, "an open without a write");
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        image.note_content_change();
        image.reserve(BlockIndex::new(0)).unwrap();
        assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
        commit(&host, &image);
        image.trim().unwrap();
        drop(image);
        assert!(time().seconds > before.seconds, "whole seconds are what a child records");
        // Recovery after a kill preserves the disk's contents.
        let killed = time();
        let f = file(&host);
        f.set_len(f.stat().unwrap().len - 512).unwrap();
        f.set_modified(killed).unwrap();
        drop(f);
        drop(open(&host).unwrap());
        assert_eq!(time(), killed, "the trailing footer was written, and the time restored");
    }
}
