//! Journals that no stamp names: what is left in the runtime folder when a daemon is killed at its beginning or its end, when
//! an image is replaced, or when its session is discarded.
//!
//! A sweep removes a journal if nothing in it counts, no process has it open, and the file for which it was last held is still
//! there and does not name it. A journal with marks stays, with a warning: the image that it belongs to may come back. So does
//! one whose file is not where it was: that file may have been moved, and name it still.

use super::journal::Journal;
use crate::error::{ErrorKind, Result};
use crate::image::open::Image;
use crate::image::session_state::journal_name;
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, RuntimeFolder};

/// Sweeps a runtime folder: at the start of a daemon.
///
/// # Errors
/// `Io`.
pub fn remove_stale_journals(env: &dyn Env, runtime: &RuntimeFolder) -> Result<()> {
    for name in runtime.list()?.iter().filter(|name| name.ends_with(".live")) {
        let journal = match Journal::open(runtime, name) {
            Ok(journal) => journal,
            // In use, or gone meanwhile.
            Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::NotFound) => continue,
            Err(e) => {
                log::warn!("not a live journal: {}", e.line());
                continue;
            }
        };
        match (is_named_by_its_file(env, &journal, name), journal.has_marks()) {
            (Some(true), _) | (None, false) => {}
            (Some(false), false) => journal.remove()?,
            (_, true) if mutant::enabled(Mutant::StaleJournalRemoved) => journal.remove()?,
            (_, true) => log::warn!(
                "{}: holds what was acknowledged for {}, which does not name it (any more). It stays until it is removed, or \
                 until the host is restarted",
                journal.path().display(),
                journal.recorded_file().1.map_or("an unknown file".into(), |path| path.display().to_string())
            ),
        }
    }
    Ok(())
}

/// Whether the file for which a journal was last held names it in its stamp; `None` if that file is not found.
fn is_named_by_its_file(env: &dyn Env, journal: &Journal, name: &str) -> Option<bool> {
    let (id, path) = journal.recorded_file();
    let file = env.open(&path?, Access::Read).ok()?;
    if file.stat().ok()?.id != id {
        return None;
    }
    let stamp = Image::open(file).ok()?.stamp().ok()?;
    Some(stamp.is_some_and(|(stamp, _)| journal_name(stamp.session) == name))
}
