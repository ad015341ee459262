//! Removal of stale journals: journals in the runtime folder that no image's stamp names.
//!
//! A stale journal remains if a daemon is killed at the beginning or the end of a session, or if an image is replaced
//! or the session of an image is discarded. A stale journal is removed if all of these hold:
//!
//! - it has no valid slots: a journal with marks stays, with a warning, as its image may come back;
//! - no process has it open;
//! - the image file that the journal records is still at the recorded path, and the stamp of that file does not name
//!   the journal. A file that is not at its path may have been moved, and its stamp may still name the journal.

use super::journal::Journal;
use crate::error::{ErrorKind, Result};
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, RuntimeFolder};

/// Removes the stale journals in a runtime folder. A daemon calls this when it starts.
///
/// # Errors
/// `Io`.
pub fn remove_stale_journals(env: &dyn Env, runtime: &RuntimeFolder) -> Result<()> {
    for name in runtime.list()?.iter().filter(|name| name.ends_with(".live")) {
        let journal = match Journal::open(runtime, name) {
            Ok(journal) => journal,
            // The journal is in use, or was removed meanwhile.
            Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::NotFound) => continue,
            Err(e) => {
                log::warn!("this file is not a live journal: {}", e.line());
                continue;
            }
        };
        match (is_named_by_its_file(env, &journal, name), journal.has_marks()) {
            (Some(true), _) | (None, false) => {}
            (Some(false), false) => journal.remove()?,
            (_, true) if mutant::enabled(Mutant::StaleJournalRemoved) => journal.remove()?,
            (_, true) => log::warn!(
                "{}: holds what was acknowledged for {}, but no image was found there whose stamp names this journal. The \
                 journal stays until you remove it, or until this machine restarts",
                journal.path().display(),
                journal.recorded_file().1.map_or("an unknown file".into(), |path| path.display().to_string())
            ),
        }
    }
    Ok(())
}

/// Whether the stamp of the file that the journal records names the journal. `None` if that file is not at its path, or
/// if it cannot be read.
fn is_named_by_its_file(env: &dyn Env, journal: &Journal, name: &str) -> Option<bool> {
    let (id, path) = journal.recorded_file();
    let file = env.open(&path?, Access::Read).ok()?;
    if file.stat().ok()?.id != id {
        return None;
    }
    let stamp = Image::open(file).ok()?.stamp().ok()?;
    Some(stamp.is_some_and(|(stamp, _)| journal_name(stamp.session) == name))
}
