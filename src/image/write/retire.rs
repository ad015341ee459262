//! The end of an image as the top of a running disk. The writes of the disk go to a new child from then on.

use super::writable::Writable;
use crate::error::Result;
use crate::storage::ModifiedTime;

impl Writable {
    /// Returns the modification time that a new child records for this image. The file gets this time when it is
    /// retired.
    ///
    /// # Errors
    /// `Io`.
    pub fn time_for_child(&self) -> Result<ModifiedTime> {
        self.mtime_at_open.later()
    }

    /// Ends the session of the image, which is committed and takes no writes any more: first removes the stamp, and
    /// then the journal. The file gets the modification time `time`, if this process may set it. If the call is
    /// repeated, the time of the first call counts.
    ///
    /// # Errors
    /// - `Poisoned` if the image refuses writes
    /// - `NoSpace`, `Io`
    pub fn retire(&self, time: ModifiedTime) -> Result<()> {
        let _ = self.retired_time.set(time);
        self.end_session();
        self.trim()?;
        self.remove_journal()
    }

    /// Ends the session of a new image that never took a write, and removes its journal. The caller removes the file.
    ///
    /// # Errors
    /// `Io`.
    pub fn abandon(&self) -> Result<()> {
        self.end_session();
        self.remove_journal()
    }
}
