//! The session of a writable image after it has begun: the stamp moves with the end of the file, the generation is
//! renewed by commits, and the session ends.

use std::path::Path;

use super::journal::Journal;
use super::session::{Session, write_zeros_and_footer};
use super::writable::Writable;
use crate::error::Result;
use crate::mutant::{self, Mutant};

impl Writable {
    /// The folder in which the live journal is, or will be; `None` without a journal.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.session().and_then(Session::folder)
    }

    /// Overwrites the stamp of a session whose journal was lost. Called after a commit: with the stamp, the image would
    /// be refused after a kill, although the file has all acknowledged writes.
    pub(super) fn erase_stamp_of_lost_journal(&self) {
        let Some(session) = self.session().filter(|session| session.is_abandoned()) else { return };
        if let Err(e) = session.erase_stamp() {
            log::warn!(
                "{}; if the daemon is killed, the image is refused until it is opened with --discard-journal",
                e.line()
            );
        }
    }

    /// Writes the stamp, or zeros in its place, at file sector `at`, and the footer after it, as the new end of the
    /// file.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the caller truncates the file after the old footer, which is valid then.
    pub(super) fn write_new_end(&self, at: u64) -> Result<()> {
        match self.session() {
            Some(session) => session.move_stamp(self.image(), at, &self.footer_bytes()),
            None => write_zeros_and_footer(self.file(), at, &self.footer_bytes()),
        }
    }

    /// Renews the generation, after a commit has written new bits.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp has the old or the new generation, and the journal fits both.
    pub(super) fn renew_generation(&self) -> Result<()> {
        let skipped = mutant::enabled(Mutant::NoCommitGeneration);
        self.session().filter(|_| !skipped).map_or(Ok(()), Session::renew)
    }

    /// Ends the session after the last commit: no slot of the journal is valid any more. The caller calls
    /// [`Writable::trim`] next.
    pub fn end_session(&self) {
        self.session().into_iter().for_each(Session::end);
    }

    /// Overwrites the stamp of a session that has ended, durably, if the file cannot be truncated.
    ///
    /// # Errors
    /// `Io`: the journal must not be removed.
    pub(super) fn erase_stamp(&self) -> Result<()> {
        self.session().map_or(Ok(()), Session::erase_stamp)
    }

    /// Removes the journal of a session that has ended, after the file was trimmed.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove_journal(&self) -> Result<()> {
        self.session().and_then(Session::any_journal).map_or(Ok(()), Journal::remove)
    }
}
