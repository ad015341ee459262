//! How acknowledged writes outlive a killed process: what was asked for, and what came of it.

use std::path::Path;

use super::bitmaps::News;
use super::granule::Locked;
use super::open::Image;
use super::session::Session;
use super::standing::refuse_if_live;
use super::take_in::Found;
use super::writable::Writable;
use crate::error::Result;
use crate::format::DiskType;
use crate::mutant::{self, Mutant};
use crate::storage::{Env, RuntimeFolder};

/// How acknowledged writes outlive the process (crash-safety 3.9). Host crashes are another matter: there flushes count.
#[derive(Clone, Debug)]
pub enum Keep {
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
    Nothing,
}

impl Keep {
    /// The folders of live journals.
    pub fn folders(&self) -> &[RuntimeFolder] {
        match self {
            Keep::Journal { folders, .. } => folders,
            Keep::Commit | Keep::Nothing => &[],
        }
    }
}

/// What came of [`Keep`].
pub(super) enum Kept {
    Session(Box<Session>),
    Commit,
    Nothing,
}

impl Kept {
    /// The session of the image, if a journal is asked for, with the marks of a killed predecessor.
    ///
    /// # Errors
    /// `Refused` if the image has a session whose journal is not at hand or does not fit, `Poisoned` if a predecessor's sync
    /// failed, `Busy`, `Io`; `NoSpace` if a journal is required and there is no room for it.
    pub(super) fn begin(env: &dyn Env, image: &Image, keep: &Keep) -> Result<(Kept, Vec<Found>)> {
        if image.kind() == DiskType::Fixed {
            return Ok((Kept::Nothing, Vec::new()));
        }
        if let Keep::Journal { folders, required } = keep {
            let (session, found) = Session::of(env, folders, *required, image)?;
            return Ok((Kept::Session(Box::new(session)), found));
        }
        refuse_if_live(env, &[], image)?;
        Ok((if matches!(keep, Keep::Commit) { Kept::Commit } else { Kept::Nothing }, Vec::new()))
    }
}

impl Writable {
    /// Puts new bits of a granule where they outlive the process; false where a commit has to.
    pub(super) fn keep(&self, index: usize, granule: &mut Locked<'_>, news: &News) -> bool {
        let session = match &self.keep {
            Kept::Nothing => return true,
            Kept::Commit => return false,
            Kept::Session(_) if mutant::is(Mutant::NoJournal) => return true,
            Kept::Session(session) => session,
        };
        let Some(journal) = session.journal() else { return false };
        if granule.known.slot.is_none() {
            let (block, place, _) = self.bitmap_place(index);
            granule.known.slot = journal.claim(index, block, place, granule.known.unplaced, granule.words());
            self.note_due(journal);
        }
        let Some(slot) = granule.known.slot else { return false };
        journal.set(slot, news.bit, news.count);
        session.check_journal(journal)
    }

    /// The folder of its live journal, or in which it will be; `None` if it has none.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.session().and_then(Session::folder)
    }
}
