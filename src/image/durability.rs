//! How acknowledged writes outlive a killed process: what was asked for, and what came of it.

use std::path::Path;

use super::bitmap_frame::LockedFrame;
use super::bitmaps::NewBits;
use super::journal_replay::ReplaySlot;
use super::open::Image;
use super::session::Session;
use super::session_state::refuse_if_live;
use super::writable::Writable;
use crate::error::Result;
use crate::format::DiskType;
use crate::mutant::{self, Mutant};
use crate::storage::{Env, RuntimeFolder};

/// How acknowledged writes outlive the process (crash-safety 3.9). Host crashes are another matter: there flushes count.
#[derive(Clone, Debug)]
pub enum Durability {
    /// By a live journal in one of these folders.
    Journal {
        /// Folders in memory, in the order to try. One that holds a journal of the image already is used.
        folders: Vec<RuntimeFolder>,
        /// Whether it is an error if there is no room for a journal. If not, each write is committed instead.
        required: bool,
    },
    /// By a commit before the acknowledgement.
    Commit,
    /// Not at all: whoever writes will write again (tools).
    FlushOnly,
}

impl Durability {
    /// The folders of live journals.
    pub fn folders(&self) -> &[RuntimeFolder] {
        match self {
            Durability::Journal { folders, .. } => folders,
            Durability::Commit | Durability::FlushOnly => &[],
        }
    }
}

/// What came of [`Durability`].
pub(super) enum DurabilityState {
    Session(Box<Session>),
    Commit,
    FlushOnly,
}

impl DurabilityState {
    /// The session of the image, if a journal is asked for, with the marks of a killed predecessor.
    ///
    /// # Errors
    /// `Refused` if the image has a session whose journal is not at hand or does not fit, `Poisoned` if a predecessor's sync
    /// failed, `Busy`, `Io`; `NoSpace` if a journal is required and there is no room for it.
    pub(super) fn begin(env: &dyn Env, image: &Image, keep: &Durability) -> Result<(DurabilityState, Vec<ReplaySlot>)> {
        if image.kind() == DiskType::Fixed {
            return Ok((DurabilityState::FlushOnly, Vec::new()));
        }
        if let Durability::Journal { folders, required } = keep {
            let (session, found) = Session::open_or_new(env, folders, *required, image)?;
            return Ok((DurabilityState::Session(Box::new(session)), found));
        }
        refuse_if_live(env, &[], image)?;
        Ok((
            if matches!(keep, Durability::Commit) { DurabilityState::Commit } else { DurabilityState::FlushOnly },
            Vec::new(),
        ))
    }
}

impl Writable {
    /// Puts new bits of a granule where they outlive the process; false where a commit has to.
    pub(super) fn make_bits_durable(&self, index: usize, granule: &mut LockedFrame<'_>, news: &NewBits) -> bool {
        let session = match &self.durability {
            DurabilityState::FlushOnly => return true,
            DurabilityState::Commit => return false,
            DurabilityState::Session(_) if mutant::enabled(Mutant::NoJournal) => return true,
            DurabilityState::Session(session) => session,
        };
        let Some(journal) = session.journal() else { return false };
        if granule.state.journal_slot.is_none() {
            let (block, place, _) = self.bitmap_sector_place(index);
            granule.state.journal_slot =
                journal.claim_slot(index, block, place, granule.state.unplaced, granule.words());
            self.note_commit_due(journal);
        }
        let Some(slot) = granule.state.journal_slot else { return false };
        journal.set_bits(slot, news.bit, news.count);
        session.check_journal(journal)
    }

    /// The folder of its live journal, or in which it will be; `None` if it has none.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.session().and_then(Session::folder)
    }
}
