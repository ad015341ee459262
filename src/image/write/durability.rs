//! How acknowledged writes outlive a killed process: what was asked for, and what came of it.

use super::journal_replay::ReplaySlot;
use super::session::Session;
use crate::error::Result;
use crate::format::DiskType;
use crate::image::open::Image;
use crate::image::session_state::refuse_if_live;
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
