//! How acknowledged writes outlive a killed process: what was asked for, and what came of it.

use std::path::{Path, PathBuf};

use super::bitmaps::News;
use super::fit::{by_preference, path_of};
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
    /// By a live journal in one of these folders.
    Journal {
        /// Folders in memory, in the order to try. One that holds a journal of the image already comes first.
        folders: Vec<PathBuf>,
        /// Whether it is an error if no folder takes a journal. If not, each write is committed instead.
        required: bool,
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
    /// `Refused` where a journal does not fit the image, `Poisoned` where a predecessor's sync failed, `Io`; `NoSpace`
    /// if a journal is required and there is no room for it.
    pub(super) fn begin(env: &dyn Env, image: &Image, keep: &Keep) -> Result<(Kept, Vec<Found>)> {
        Ok(match keep {
            _ if image.kind() == DiskType::Fixed => (Kept::Nothing, Vec::new()),
            Keep::Commit => (Kept::Commit, Vec::new()),
            Keep::Nothing => (Kept::Nothing, Vec::new()),
            Keep::Journal { folders, required, discard } => {
                let mut failure = None;
                for folder in by_preference(env, folders, image)? {
                    // One that exists may hold acknowledged writes: it is opened, or the image is not.
                    let may_do_without = !required && !env.exists(&path_of(folder, image.file(), image.uuid())?);
                    match Journal::open(env, folder, image, *discard) {
                        Ok((journal, found)) => return Ok((Kept::Journal(journal), found)),
                        Err(e) if e.kind() == ErrorKind::Unsupported => _ = failure.insert(e),
                        Err(e) if may_do_without => _ = failure.insert(e),
                        Err(e) => return Err(e),
                    }
                }
                let why = failure.map_or_else(|| "there is no runtime folder".into(), |e| e.line());
                log::warn!("no live journal: {why}; each write is made durable before it is answered");
                (Kept::Commit, Vec::new())
            }
        })
    }

    /// Removes the journal if it contains nothing that a successor needs: for an open that comes to nothing.
    pub(super) fn abandon(&self, env: &dyn Env) {
        let Kept::Journal(journal) = self else { return };
        if journal.is_vacant()
            && let Err(e) = journal.remove(env)
        {
            log::warn!("an unused live journal is left behind: {}", e.line());
        }
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

    /// The folder of its live journal; `None` if it has none.
    pub fn journal_folder(&self) -> Option<&Path> {
        match &self.keep {
            Kept::Journal(journal) => Some(journal.folder()),
            Kept::Commit | Kept::Nothing => None,
        }
    }

    /// Removes a live journal that contains nothing a successor needs: for a start that failed before the first write.
    /// The image is still locked. A journal that holds marks of a killed predecessor stays.
    pub fn abandon(&self, env: &dyn Env) {
        self.keep.abandon(env);
    }

    /// Removes the journal: all it says is in the file.
    pub fn retire(&self, env: &dyn Env) -> Result<()> {
        match &self.keep {
            Kept::Journal(journal) => journal.remove(env),
            Kept::Commit | Kept::Nothing => Ok(()),
        }
    }
}
