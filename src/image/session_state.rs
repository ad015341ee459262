//! Who may open an image: whether its stamp counts, whose session it names, and what to do about it.
//!
//! | the stamp | readers and tools | a daemon with a runtime folder |
//! | --- | --- | --- |
//! | none | open it | opens it |
//! | of this start of the host | are refused | takes the journal in, or is refused if there is none that fits |
//! | of another start of this machine | open it: the guest is gone with the host | recovers as after a power cut |
//! | of another machine | are refused: that machine may be running | is refused |

use std::path::Path;

use uuid::Uuid;

use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SessionStamp;
use crate::format::session_stamp::escape_for_display;
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, Origin, RuntimeFolder};

/// Whether a stamp counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SessionState {
    /// There is none, or it is of an earlier start of this machine: what is in the file is all there is.
    Closed,
    /// A daemon of this start of the host has the image open, or was killed.
    Open(SessionStamp),
    /// A daemon of another machine has it open, or had it open when it ended.
    OnOtherMachine(SessionStamp),
}

impl SessionState {
    /// Looks at the stamp of an image.
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
            log::info!("{path}: the host was restarted while it was in use: it is as after a power cut");
            SessionState::Closed
        } else {
            SessionState::OnOtherMachine(stamp)
        })
    }
}

/// Refuses an image whose session is not over: it may lack what was acknowledged to a guest.
///
/// # Errors
/// `Refused`, with whose session it is and what to do; `Io`.
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

/// As [`refuse_if_live`], for a file that may not be an image at all; one that is none is not refused.
///
/// # Errors
/// As for [`refuse_if_live`].
pub fn refuse_if_file_is_live(env: &dyn Env, folders: &[RuntimeFolder], file: &File) -> Result<()> {
    Image::open(file.clone()).map_or(Ok(()), |image| refuse_if_live(env, folders, &image))
}

/// The name of the journal of a session.
pub(super) fn journal_name(session: Uuid) -> String {
    format!("{}.live", session.simple())
}

/// Why an image whose daemon was killed is refused.
pub(super) fn live_session_error(stamp: &SessionStamp, here: &Origin, folders: &[RuntimeFolder], path: &Path) -> Error {
    let name = journal_name(stamp.session);
    let ours = folders.iter().find(|folder| folder.list().is_ok_and(|names| names.contains(&name)));
    let settle = format!("diffdisk settle {}", shell_quoted(&path.display().to_string()));
    let what = if let Some(ours) = ours {
        format!(
            "its daemon did not end cleanly, and {} holds what it acknowledged. Run `{settle} --runtime-dir={}`, or start \
             diffdiskd on it again",
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
            false => format!("it is not in {}", searched.join(" or ")),
        };
        format!(
            "its daemon did not end cleanly, and what it acknowledged is in the live journal {name} of user {} ({}) in {}; \
             {looked}. Run `{sudo}{settle} --runtime-dir={}`. If the journal is gone, a copy of this image may have taken it \
             in; --discard-journal gives it up",
            escape_for_display(&stamp.user),
            stamp.user_id,
            escape_for_display(&stamp.folder),
            shell_quoted(&stamp.folder)
        )
    };
    Error::new(ErrorKind::Refused, what).at_path(path)
}

/// Why an image of another machine is refused.
pub(super) fn other_machine_error(stamp: &SessionStamp, path: &Path) -> Error {
    let what = format!(
        "it is in use on the host {} by user {} ({}), or was when that host stopped: what was acknowledged there may not be in \
         the file. If that host is down for certain (fenced), use --discard-journal",
        escape_for_display(&stamp.host),
        escape_for_display(&stamp.user),
        stamp.user_id
    );
    Error::new(ErrorKind::Refused, what).at_path(path)
}

/// A text as one word of a shell command: an image must not choose what an operator runs.
fn shell_quoted(text: &str) -> String {
    let text = escape_for_display(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_does_not_choose_what_is_run() {
        assert_eq!(shell_quoted("/run/user/107/diffdisk"), "/run/user/107/diffdisk");
        assert_eq!(shell_quoted("/x; rm -rf '$HOME'"), "'/x; rm -rf '\\''$HOME'\\'''");
        assert_eq!(shell_quoted("a\nb"), "'a\\nb'");
        assert_eq!(shell_quoted(""), "''");
    }
}
