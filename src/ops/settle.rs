//! `settle`: replays the live journal of a killed daemon into its image, and finishes or undoes its snapshot. Also `--discard-journal`, which discards the
//! live journal instead.

use std::path::Path;

use crate::chain::resolve_snapshot;
use crate::error::Result;
use crate::image;
use crate::storage::{Access, Env, Lock, RuntimeFolder};

/// Finishes or undoes the unfinished snapshot of the disk at `path`, if there is one. Then replays the live journal of
/// the image at `path` and ends its session. Returns false if there was neither.
///
/// # Errors
/// - `Busy` if another process holds a lock on the image or on another disk of the snapshot, or has its journal open
/// - `Refused`, with a message that contains the command or option to use, if the journal is in none of `folders` or
///   does not belong to the image in its present state, or if the session is of another machine
/// - `Refused` if the image must not be written, or if the kept name of the snapshot belongs to another file
/// - `Poisoned` if a sync of the killed daemon failed
/// - `Invalid`, `Unsupported`, `NotFound`, `NoSpace`, `Io`
pub fn settle(env: &dyn Env, path: &Path, folders: &[RuntimeFolder]) -> Result<bool> {
    let is_resolved = resolve_snapshot(env, path, folders, false)?;
    let file = env.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    Ok(image::settle(env, folders, &file)? || is_resolved)
}

/// Discards the live journals of images. Writes that were acknowledged since the last flush are lost. Finishes the
/// unfinished snapshots of their disks before, or undoes them if that is not possible.
///
/// # Errors
/// - `Busy` if another process holds a lock on an image
/// - `Refused`, `Invalid`, `Unsupported`, `NotFound` if an image cannot be opened
/// - `Io`
pub fn discard(env: &dyn Env, paths: &[&Path], folders: &[RuntimeFolder]) -> Result<()> {
    paths.iter().try_for_each(|path| {
        resolve_snapshot(env, path, folders, true)?;
        image::discard_session(env, folders, path)
    })
}
