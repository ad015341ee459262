//! Decides by an image's session stamp whether the image may be opened, and describes a live session to the operator.
//!
//! | session stamp | readers and tools | a daemon with a runtime folder |
//! | --- | --- | --- |
//! | none | open the image | opens the image |
//! | of this boot of this machine | are refused | replays the journal, or is refused if no journal matches |
//! | of an earlier boot of this machine | open the image: the guest ended with the machine | recovers as after a power cut |
//! | of another machine | are refused: that machine may be running | is refused |
//!
//! Tools that read only metadata (`info`, `children`) are never refused, and `settle` replays the journal as a daemon
//! does. With `--discard-journal` the session is discarded.

use std::path::Path;

use uuid::Uuid;

use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SessionStamp;
use crate::format::session_stamp::escape_for_display;
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, Origin, RuntimeFolder};

/// The state of an image's last session, by its stamp.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SessionState {
    /// No stamp, or a stamp of an earlier boot of this machine: all existing data is in the file.
    Closed,
    /// A stamp of this boot: a daemon has the image open, or was killed.
    Open(SessionStamp),
    /// A stamp of another machine: a daemon there has the image open, or was killed.
    OnOtherMachine(SessionStamp),
}

impl SessionState {
    /// Reads the stamp of an image and compares its origin with this machine and boot.
    ///
    /// # Errors
    /// `Io`.
    pub fn of(env: &dyn Env, image: &Image) -> Result<SessionState> {
        let Some((stamp, _)) = image.stamp()? else { return Ok(SessionState::Closed) };
        let here = env.origin()?;
        Ok(if stamp.boot == here.boot || (mutant::enabled(Mutant::IgnoreBootId) && stamp.machine == here.machine) {
            SessionState::Open(stamp)
        } else if stamp.machine == here.machine {
            let path = image.file().path().display();
            log::info!(
                "{path}: the host was restarted while the image was in use; its contents are as after a power cut"
            );
            SessionState::Closed
        } else {
            SessionState::OnOtherMachine(stamp)
        })
    }
}

/// Refuses an image whose session has not ended, because the file may lack writes that were acknowledged to a guest.
///
/// # Errors
/// - `Refused`, with the command or the option that ends the session. The message names the owner of the session unless
///   the journal is in one of `folders`.
/// - `Io`.
pub fn refuse_if_live(env: &dyn Env, folders: &[RuntimeFolder], image: &Image) -> Result<()> {
    if mutant::enabled(Mutant::ToolIgnoresStamp) {
        return Ok(());
    }
    match SessionState::of(env, image)? {
        SessionState::Closed => Ok(()),
        SessionState::Open(stamp) => Err(live_session_error(&stamp, &env.origin()?, folders, image.file().path())),
        SessionState::OnOtherMachine(stamp) => Err(other_machine_error(&stamp, image.file().path())),
    }
}

/// Refuses a file as [`refuse_if_live`] does, if it is an image that can be opened. Other files are not refused.
///
/// # Errors
/// `Refused`, `Io`, for the reasons listed at [`refuse_if_live`].
pub fn refuse_if_file_is_live(env: &dyn Env, folders: &[RuntimeFolder], file: &File) -> Result<()> {
    Image::open(file.clone()).map_or(Ok(()), |image| refuse_if_live(env, folders, &image))
}

/// Refuses an image with a session that cannot be replayed here: its journal is in none of `folders`, or the session
/// belongs to another machine. The message suggests a command for the image at `path`.
///
/// # Errors
/// - `Refused`, with the command or the option that ends the session
/// - `Io`
pub fn refuse_unless_replayable(env: &dyn Env, folders: &[RuntimeFolder], image: &Image, path: &Path) -> Result<()> {
    match SessionState::of(env, image)? {
        SessionState::Closed => Ok(()),
        SessionState::Open(stamp) => match folder_with_journal(folders, &stamp) {
            Some(_) => Ok(()),
            None => Err(live_session_error(&stamp, &env.origin()?, folders, path)),
        },
        SessionState::OnOtherMachine(stamp) => Err(other_machine_error(&stamp, path)),
    }
}

/// Refuses an image whose session belongs to another machine.
///
/// # Errors
/// - `Refused`, with the option that ends the session
/// - `Io`
pub fn refuse_if_on_other_machine(env: &dyn Env, image: &Image) -> Result<()> {
    match SessionState::of(env, image)? {
        SessionState::OnOtherMachine(stamp) => Err(other_machine_error(&stamp, image.file().path())),
        SessionState::Closed | SessionState::Open(_) => Ok(()),
    }
}

/// Returns the folder that has the journal of a session.
fn folder_with_journal<'a>(folders: &'a [RuntimeFolder], stamp: &SessionStamp) -> Option<&'a RuntimeFolder> {
    let name = journal_name(stamp.session);
    folders.iter().find(|folder| folder.list().is_ok_and(|names| names.contains(&name)))
}

/// Returns the file name of a session's journal.
pub(super) fn journal_name(session: Uuid) -> String {
    format!("{}.live", session.simple())
}

/// Makes the error for an image whose daemon runs or was killed on this machine.
pub(super) fn live_session_error(stamp: &SessionStamp, here: &Origin, folders: &[RuntimeFolder], path: &Path) -> Error {
    let name = journal_name(stamp.session);
    let ours = folder_with_journal(folders, stamp);
    let settle = format!("diffdisk settle {}", shell_quoted(&path.display().to_string()));
    let what = if let Some(ours) = ours {
        format!(
            "the image's daemon did not end cleanly, and {} contains writes that it acknowledged. Run `{settle} \
             --runtime-dir={}`, or start diffdiskd on the image again",
            ours.path().join(&name).display(),
            shell_quoted(&ours.path().display().to_string())
        )
    } else {
        let sudo = if stamp.user_id == here.user_id {
            String::new()
        } else {
            format!("sudo -u {} ", shell_quoted(&stamp.user))
        };
        let searched: Vec<String> = folders.iter().map(|folder| folder.path().display().to_string()).collect();
        let looked = match searched.is_empty() {
            true => "no runtime folder was searched".to_owned(),
            false => format!("the journal is not in {}", searched.join(" or ")),
        };
        format!(
            "the image's daemon did not end cleanly, and writes that it acknowledged are in the live journal {name} of user \
             {} ({}) in {}; {looked}. Run `{sudo}{settle} --runtime-dir={}`. If the journal is gone, it may have been \
             replayed into a copy of this image; --discard-journal gives those writes up",
            escape_for_display(&stamp.user),
            stamp.user_id,
            escape_for_display(&stamp.folder),
            shell_quoted(&stamp.folder)
        )
    };
    Error::new(ErrorKind::Refused, what).at_path(path)
}

/// Makes the error for an image whose session belongs to another machine.
pub(super) fn other_machine_error(stamp: &SessionStamp, path: &Path) -> Error {
    let what = format!(
        "the image is in use on the host {} by user {} ({}), or was when that host stopped: the file may lack writes \
         that were acknowledged there. If that host is certainly down (fenced), use --discard-journal",
        escape_for_display(&stamp.host),
        escape_for_display(&stamp.user),
        stamp.user_id
    );
    Error::new(ErrorKind::Refused, what).at_path(path)
}

/// Quotes a text as one word of a shell command, so that texts from an image cannot change a command that an operator
/// runs.
fn shell_quoted(text: &str) -> String {
    let text = escape_for_display(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_an_image_are_quoted_for_the_shell() {
        assert_eq!(shell_quoted("/run/user/107/diffdisk"), "/run/user/107/diffdisk");
        assert_eq!(shell_quoted("/x; rm -rf '$HOME'"), "'/x; rm -rf '\\''$HOME'\\'''");
        assert_eq!(shell_quoted("a\nb"), "'a\\nb'");
        assert_eq!(shell_quoted(""), "''");
    }
}
