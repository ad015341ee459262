//! The modification time of an image's file: it tells children whether the disk beneath them was changed.
//!
//! A child records the time of its parent's file, in whole seconds (vhd-format 4.3). So the time must move exactly when
//! the disk's contents do:
//!
//! - What leaves the contents as they are (an open without a write, growth, trim, repair, compact, resize, a safe rebase)
//!   puts the time back that the file had before.
//! - What changes them leaves a time that lies at least a second after the one before, so that a child made within the
//!   same second does not miss the change. The file may thus be dated up to a second into the future.
//!
//! A process that is killed leaves the time of its last write. A parent that was not changed is then called changed: a
//! false alarm, never a missed one. A power cut may bring back the time of the last sync of the whole file, which
//! every clean close does.

use crate::error::Result;
use crate::storage::{File, ModifiedTime};

/// The time that a file had at a moment.
#[derive(Clone, Debug)]
pub struct SavedMtime {
    file: File,
    before: ModifiedTime,
}

impl SavedMtime {
    /// Keeps the time that `file` has now. The file is open for writing and locked exclusively.
    ///
    /// # Errors
    /// `Io`.
    pub fn save(file: &File) -> Result<SavedMtime> {
        Ok(SavedMtime { file: file.clone(), before: file.stat()?.last_change() })
    }

    /// Puts the time back, durably: the disk's contents are what they were.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn restore_and_sync(&self) -> Result<()> {
        if self.restore()? { self.file.sync_all() } else { Ok(()) }
    }

    /// Puts the time back as the file is opened. A power cut may undo that, which is a false alarm; no order of durable
    /// writes may rely on a sync that the owner of the file alone would get.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn restore_at_open(&self) -> Result<()> {
        self.restore().map(drop)
    }

    /// Puts the time back in the host's memory. Returns whether there is something to make durable.
    fn restore(&self) -> Result<bool> {
        Ok(self.file.stat()?.last_change() != self.before && self.set(self.before)?)
    }

    /// Sets the time; false if nobody but the owner of the file may: it keeps its new time, and children warn in vain.
    fn set(&self, time: ModifiedTime) -> Result<bool> {
        match self.file.set_modified(time) {
            Err(e) if e.is_denied() => {
                log::info!("{}; its children will warn that it was written to", e.line());
                Ok(false)
            }
            set => set.map(|()| true),
        }
    }

    /// Does `work`, which leaves the contents as they are also if it fails, and puts the time of `file` back, durably.
    ///
    /// # Errors
    /// What the work fails with; `Io`.
    pub fn preserve<T>(file: &File, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let time = SavedMtime::save(file)?;
        let outcome = work();
        let put_back = time.restore_and_sync();
        let done = outcome?;
        put_back.map(|()| done)
    }

    /// Sees to it that the time lies in a later second than before, durably: the disk's contents have changed.
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
    use crate::units::SectorRange;

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
        image.reserve(0).unwrap();
        assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
        commit(&host, &image);
        image.trim().unwrap();
        drop(image);
        assert!(time().seconds > before.seconds, "whole seconds are what a child records");
        // Recovery after a kill puts nothing into the disk that was not there.
        let killed = time();
        let f = file(&host);
        f.set_len(f.stat().unwrap().len - 512).unwrap();
        f.set_modified(killed).unwrap();
        drop(f);
        drop(open(&host).unwrap());
        assert_eq!(time(), killed, "the trailing footer was written, and the time put back");
    }
}
