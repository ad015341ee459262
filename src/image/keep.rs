//! How acknowledged writes outlive a killed process: what was asked for, and what came of it.

use std::path::PathBuf;

use super::bitmaps::News;
use super::granule::Locked;
use super::journal::{Found, Journal};
use super::open::Image;
use super::writable::Writable;
use crate::error::{ErrorKind, Result};
use crate::format::DiskType;
use crate::mutant::{self, Mutant};
use crate::storage::Env;

/// How acknowledged writes outlive the process (crash-safety 3.9). Host crashes are another matter: there flushes count.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Keep {
    /// By a live journal in this folder. `discard`: give up what a predecessor's journal says.
    Journal {
        /// The folder, in memory.
        folder: PathBuf,
        /// Give up what a predecessor's journal says.
        discard: bool,
    },
    /// By a commit before the acknowledgement.
    Commit,
    /// Not at all: whoever writes will write again (tools).
    Nothing,
}

/// What came of [`Keep`].
pub(super) enum Kept {
    Journal(Journal),
    Commit,
    Nothing,
}

impl Kept {
    /// Opens the journal where one is asked for and can be had; with the marks of a killed predecessor.
    ///
    /// # Errors
    /// `Refused` where a journal does not fit the image, `Poisoned` where a predecessor's sync failed, `Io`.
    pub(super) fn begin(env: &dyn Env, image: &Image, keep: &Keep) -> Result<(Kept, Vec<Found>)> {
        Ok(match keep {
            _ if image.kind() == DiskType::Fixed => (Kept::Nothing, Vec::new()),
            Keep::Commit => (Kept::Commit, Vec::new()),
            Keep::Nothing => (Kept::Nothing, Vec::new()),
            Keep::Journal { folder, discard } => match Journal::open(env, folder, image, *discard) {
                Ok((journal, found)) => (Kept::Journal(journal), found),
                Err(e) if e.kind() == ErrorKind::Unsupported => {
                    log::warn!("no live journal: {}; each write is made durable before it is answered", e.line());
                    (Kept::Commit, Vec::new())
                }
                Err(e) => return Err(e),
            },
        })
    }
}

impl Writable {
    /// Puts new bits of a granule where they outlive the process; false where a commit has to.
    pub(super) fn keep(&self, index: usize, granule: &mut Locked<'_>, news: &News) -> bool {
        let journal = match &self.keep {
            Kept::Nothing => return true,
            Kept::Commit => return false,
            Kept::Journal(_) if mutant::is(Mutant::NoJournal) => return true,
            Kept::Journal(journal) => journal,
        };
        if let Some(slot) = granule.known.slot {
            journal.set(slot, news.bit, news.count);
            return true;
        }
        let (block, place, _) = self.bitmap_place(index);
        granule.known.slot = journal.claim(index, block, place, granule.known.unplaced, granule.words());
        self.note_due(journal);
        granule.known.slot.is_some()
    }
}
