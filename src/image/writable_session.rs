//! What a writable image does with its session: begins it, takes the stamp along when the file grows, renews the generation,
//! ends it.

use super::durability::DurabilityState;
use super::free_tail::FreeTail;
use super::journal::Journal;
use super::session::{Session, write_zeros_and_footer};
use super::writable::Writable;
use crate::error::Result;
use crate::format::layout;
use crate::mutant::{self, Mutant};
use crate::units::SECTOR;

/// The first file sector from `from` on at which a stamp and the footer behind it share a page, at least two sectors behind
/// the footer at `footer`.
pub(super) fn stamp_sector_from(from: u64, footer: u64) -> u64 {
    const PAGE: u64 = layout::PAGE / SECTOR;
    let at = from.max(footer + 2);
    if at % PAGE == PAGE - 1 { at + 1 } else { at }
}

impl Writable {
    pub(super) fn session(&self) -> Option<&Session> {
        match &self.durability {
            DurabilityState::Session(session) => Some(session),
            DurabilityState::Commit | DurabilityState::FlushOnly => None,
        }
    }

    /// The journal, if marks go to it.
    #[inline]
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.session()?.journal()
    }

    /// Begins the session if it has not begun; `room` is that of the image.
    ///
    /// The stamp goes into the gap before the footer. If there is none, stamp and footer go behind the footer, which stays
    /// where it is until the next step of growth wipes it, or the end of the session.
    pub(super) fn begin_session(&self, room: &mut FreeTail) {
        let Some(session) = self.session().filter(|session| !session.is_begun()) else { return };
        let Some(stamp) = session.prepared_stamp(self.image()) else { return };
        let old = room.footer;
        if old > room.next {
            // A failure is told by `begin`.
            let _ = session.begin(stamp, old - 1, None, false);
            return self.record_poison_in_journal();
        }
        let at = stamp_sector_from(old + 2, old);
        match session.begin(stamp, at, Some(&self.footer_bytes()), false) {
            Ok(()) => {
                room.stale.push(old);
                room.footer = at + 1;
            }
            Err(_) => self.truncate_after_footer(old),
        }
        self.record_poison_in_journal();
    }

    /// Notes in the journal of a session that has just begun that the image was poisoned meanwhile: there was no journal to note
    /// it in.
    fn record_poison_in_journal(&self) {
        if let (Err(e), Some(journal)) = (self.check_poison(), self.session().and_then(Session::any_journal)) {
            journal.poison(&e.line());
        }
    }

    /// Wipes the stamp of a session whose journal was lost, after a commit. Otherwise the image is refused after a kill, although
    /// everything is in it.
    pub(super) fn erase_stamp_of_lost_journal(&self) {
        let Some(session) = self.session().filter(|session| session.is_abandoned()) else { return };
        if let Err(e) = session.erase_stamp() {
            log::warn!("{}; after a kill the image is refused until --discard-journal", e.line());
        }
    }

    /// Begins the session, if it has not begun, before something is marked.
    #[inline]
    pub(super) fn ensure_session(&self) {
        if self.session().is_some_and(|session| !session.is_begun()) {
            self.begin_session(&mut self.free_tail());
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

    /// Cuts the file behind the footer at a sector, after a longer end could not be written.
    fn truncate_after_footer(&self, footer: u64) {
        if let Err(e) = self.file().set_len((footer + 1) * SECTOR) {
            self.poison(&format!("the end of the file is unknown ({})", e.line()));
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

    /// Gives the stamp a new generation after a journal was taken in, before anything is served.
    ///
    /// # Errors
    /// As for [`Session::renew`].
    pub(super) fn renew_after_replay(&self) -> Result<()> {
        let Some(session) = self.session().filter(|session| session.is_stamped()) else { return Ok(()) };
        #[cfg(feature = "mutants")]
        if mutant::enabled(Mutant::NewSessionOnTakeover) {
            session.mutate_session(self.image());
        }
        if mutant::enabled(Mutant::NoTakeoverGeneration) { Ok(()) } else { session.renew() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_and_footer_share_a_page_behind_the_old_footer() {
        for footer in 0..64 {
            for from in 0..96 {
                let at = stamp_sector_from(from, footer);
                assert!(at >= from && at >= footer + 2 && at / 8 == (at + 1) / 8, "{footer} {from} {at}");
                assert!(at <= from.max(footer + 2) + 1, "no more than needed");
            }
        }
    }
}
