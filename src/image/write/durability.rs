//! Durability: how acknowledged writes survive a killed daemon.

use super::journal_validation::ReplaySlot;
use super::session::Session;
use crate::error::Result;
use crate::format::DiskType;
use crate::image::open::Image;
use crate::image::session_state::refuse_if_live;
use crate::storage::{Env, RuntimeFolder};

/// Way in which acknowledged writes survive the end of the process (crash-safety 7). After a power cut or a kernel
/// crash, only flushed writes are guaranteed, regardless of this choice.
#[derive(Clone, Debug)]
pub enum Durability {
    /// A live journal records the marks of acknowledged writes.
    Journal {
        /// Folders in memory, in the order to try. If one of them already has the journal of the image, that folder is
        /// used.
        folders: Vec<RuntimeFolder>,
        /// Whether an open fails if the first folder has no space for a journal. In all other cases in which no journal
        /// can be created, each write is committed before it is acknowledged.
        required: bool,
    },
    /// Each write is committed before it is acknowledged.
    Commit,
    /// Only committed writes survive: for tools, which repeat their work after a kill.
    FlushOnly,
}

impl Durability {
    /// Returns the folders of live journals.
    pub fn folders(&self) -> &[RuntimeFolder] {
        match self {
            Durability::Journal { folders, .. } => folders,
            Durability::Commit | Durability::FlushOnly => &[],
        }
    }
}

/// The [`Durability`] in effect for one open image.
pub(super) enum DurabilityState {
    Session(Box<Session>),
    Commit,
    FlushOnly,
}

impl DurabilityState {
    /// Opens the session of the image if a journal is requested. Also returns the journal slots of a killed daemon.
    ///
    /// # Errors
    /// - `Refused` if the image has a session whose journal is not requested, not found or does not fit, or a session
    ///   of another machine;
    /// - `Poisoned` if a sync of the killed daemon failed;
    /// - `Busy` if a process has the journal open;
    /// - `NoSpace` if a journal is required and the first folder has no space for it;
    /// - `Io`.
    pub(super) fn begin(
        env: &dyn Env,
        image: &Image,
        durability: &Durability,
    ) -> Result<(DurabilityState, Vec<ReplaySlot>)> {
        if image.kind() == DiskType::Fixed {
            return Ok((DurabilityState::FlushOnly, Vec::new()));
        }
        if let Durability::Journal { folders, required } = durability {
            let (session, found) = Session::open_or_new(env, folders, *required, image)?;
            return Ok((DurabilityState::Session(Box::new(session)), found));
        }
        refuse_if_live(env, &[], image)?;
        let state = match durability {
            Durability::Commit => DurabilityState::Commit,
            Durability::Journal { .. } | Durability::FlushOnly => DurabilityState::FlushOnly,
        };
        Ok((state, Vec::new()))
    }
}
