//! What a writable image does with its session: begins it, takes the stamp along when the file grows, renews the generation,
//! ends it.

use super::journal::Journal;
use super::session::{Session, write_zeros_and_footer};
use super::writable::Writable;
use crate::error::Result;
use crate::mutant::{self, Mutant};

impl Writable {
    /// Wipes the stamp of a session whose journal was lost, after a commit. Otherwise the image is refused after a kill, although
    /// everything is in it.
    pub(super) fn erase_stamp_of_lost_journal(&self) {
        let Some(session) = self.session().filter(|session| session.is_abandoned()) else { return };
        if let Err(e) = session.erase_stamp() {
            log::warn!("{}; after a kill the image is refused until --discard-journal", e.line());
        }
    }

    /// Writes the footer at a new end of the file, behind the stamp or the room for one, at file sector `at`.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the end that counts is where it was, once the file is cut behind it.
    pub(super) fn write_new_end(&self, at: u64) -> Result<()> {
        match self.session() {
            Some(session) => session.move_stamp(self.image(), at, &self.footer_bytes()),
            None => write_zeros_and_footer(self.file(), at, &self.footer_bytes()),
        }
    }

    /// Gives the stamp a new generation, after a commit has written new bits.
    ///
    /// # Errors
    /// As for [`Session::renew`].
    pub(super) fn renew_generation(&self) -> Result<()> {
        let skipped = mutant::enabled(Mutant::NoCommitGeneration);
        self.session().filter(|_| !skipped).map_or(Ok(()), Session::renew)
    }

    /// Ends the session after the last commit: nothing that it holds counts any more. The file is to be cut next.
    pub fn end_session(&self) {
        self.session().into_iter().for_each(Session::end);
    }

    /// Wipes the stamp of a session that has ended, durably, if the file is not cut.
    ///
    /// # Errors
    /// `Io`; then the journal is to stay.
    pub(super) fn erase_stamp(&self) -> Result<()> {
        self.session().map_or(Ok(()), Session::erase_stamp)
    }

    /// Removes the journal of a session that has ended, after the file was cut.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove_journal(&self) -> Result<()> {
        self.session().and_then(Session::any_journal).map_or(Ok(()), Journal::remove)
    }
}
