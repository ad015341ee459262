//! The session of a writable image: the first write begins it, the stamp moves with the end of the file, commits renew
//! the generation, and the session ends.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::free_tail::{FreeTail, stamp_sector_from};
use super::journal::Journal;
use super::session::{Session, write_zeros_and_footer};
use super::writable::Writable;
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::units::FileSector;

impl Writable {
    /// The folder in which the live journal is, or will be; `None` without a journal.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.session().and_then(Session::folder)
    }

    /// Begins the session if it has not begun. `tail` is the free tail of this image.
    ///
    /// The stamp is written to the sector before the footer. If a block or metadata occupies that sector, the stamp and
    /// a second footer are written after the existing footer. The next step of growth overwrites the existing footer
    /// with zeros; `trim` removes the second one.
    pub(super) fn begin_session(&self, tail: &mut FreeTail) {
        // A poison after the end of the session must not change the file, whose structure may be another one now.
        let may_begin = |session: &&Session| !session.is_begun() && !self.has_ended.load(Ordering::SeqCst);
        let Some(session) = self.session().filter(may_begin) else { return };
        let Some(stamp) = session.prepared_stamp(self.image()) else { return };
        let old = tail.footer;
        if old > tail.next {
            // `begin` logs a failure, and abandons the journal.
            if session.begin(stamp, old - 1, None, false).is_ok() {
                self.sync_first_stamp();
            }
            return self.record_poison_in_journal();
        }
        let at = stamp_sector_from(old + 2, old);
        match session.begin(stamp, at, Some(&self.footer_bytes()), false) {
            Ok(()) => {
                tail.stale.push(old);
                tail.footer = at + 1;
                self.sync_first_stamp();
            }
            Err(_) => self.truncate_after_footer(old),
        }
        self.record_poison_in_journal();
    }

    /// Makes the first stamp of a session durable if other machines use the file system: they must see it before the
    /// first write is acknowledged. From then on, one stamp of the session is durable until the session ends. If the
    /// sync fails, poisons the image.
    ///
    /// The caller holds the lock of the free tail. If the kernel reports the failure of a concurrent sync of a commit
    /// to this sync, the commit waits for the lock, and then sees the poison.
    fn sync_first_stamp(&self) {
        if !self.file().is_on_shared_file_system() || mutant::enabled(Mutant::StampUnsynced) {
            return;
        }
        if let Err(e) = self.file().sync() {
            self.poison(&format!("a sync failed as a session began ({})", e.line()));
        }
    }

    /// Records in the journal of a session that has just begun that the image was poisoned before.
    fn record_poison_in_journal(&self) {
        if let (Some(why), Some(journal)) = (self.poison_reason(), self.session().and_then(Session::any_journal)) {
            journal.poison(why);
        }
    }

    /// Begins the session if it has not begun. Called before sectors are marked.
    #[inline]
    pub(super) fn ensure_session(&self) {
        if self.session().is_some_and(|session| !session.is_begun()) {
            self.begin_session(&mut self.free_tail());
        }
    }

    /// Truncates the file after the footer at file sector `footer`. Poisons the image if the truncation fails.
    fn truncate_after_footer(&self, footer: FileSector) {
        if let Err(e) = self.file().set_len((footer + 1).byte_offset()) {
            self.poison(&format!("the end of the file is unknown ({})", e.line()));
        }
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
    /// file. The caller holds the lock of the free tail.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the caller truncates the file after the old footer, which is valid then.
    pub(super) fn write_new_end(&self, at: FileSector) -> Result<()> {
        match self.session() {
            Some(session) => {
                let begins = !session.is_begun();
                session.move_stamp(self.image(), at, &self.footer_bytes())?;
                if begins && session.is_stamped() {
                    self.sync_first_stamp();
                }
                Ok(())
            }
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
    /// [`Writable::trim`] next, or removes the file. From now on, the image writes to its file only in `trim`.
    pub fn end_session(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
        self.session().into_iter().for_each(Session::end);
    }

    /// Overwrites the stamp of a session that has ended, durably, if the file cannot be truncated.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the journal must not be removed.
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
