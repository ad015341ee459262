//! Finds the notes of unfinished snapshots in the folder of an image, and refuses images that lack the newest writes.
//!
//! A note is found by the image's UUID (the image is the previous active image X of the snapshot), or by the UUID of
//! its parent (the image is the new child Y, which is active already). Whether it concerns the image is decided by the
//! file name and the UUIDs, not by the folder in the note, so the folder of a disk may be moved.
//!
//! | image | begun | switched | decided |
//! | --- | --- | --- | --- |
//! | X under its name A | may be used | refused | refused |
//! | X under the kept name K | refused | refused | may be read; writes are refused |
//! | X, renamed or copied | may be used | refused | may be read; writes are refused |
//! | Y under the name A | may be used | may be used | may be used |
//!
//! Only the state in the coordinator's note counts. If that note does not exist, but the coordinator's disk does, and
//! its active image is not the new child, the snapshot was not decided, because the coordinator's note is removed last.
//! If the coordinator's disk does not exist either, its folder may be moved or not mounted. Then the state is unknown,
//! and X is refused. X is not refused under another name than A if A is no longer X: the disk is finished then.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::open_mode::OpenMode;
use super::snapshot_note::{SnapshotMember, SnapshotNote, SnapshotState, is_note_name};
use super::snapshot_note_file::uuid_of;
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::image::{Image, ImageIdentity, file_name, folder_of};
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, Folder, Lock};

/// Maximum number of names in a folder that are searched for notes. In a folder with more names, notes are looked up by
/// the UUIDs of the image.
const MAX_LISTED: usize = 4096;

/// A note in the folder of an image that concerns this image.
pub(super) struct FoundNote {
    /// The folder of the image and the note.
    pub(super) folder: Folder,
    /// The file name of the image.
    name: OsString,
    pub(super) note: SnapshotNote,
    /// The position of the image's disk among the members.
    pub(super) index: usize,
}

/// The state of a snapshot, as the members have to act on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum GroupState {
    /// The state in the coordinator's note. Without that note: `Decided` if the active image of the coordinator is its
    /// new child.
    Known(SnapshotState),
    /// There is no coordinator's note, and the coordinator's disk is not its new child: the snapshot was not decided.
    NotDecided,
    /// Neither the coordinator's note nor its disk was found.
    Unknown,
}

impl GroupState {
    fn word(self) -> &'static str {
        match self {
            GroupState::Known(SnapshotState::Begun) | GroupState::NotDecided => "begun",
            GroupState::Known(SnapshotState::Switched { .. }) => "switched",
            GroupState::Known(SnapshotState::Decided) => "decided",
            GroupState::Unknown => "unknown",
        }
    }

    fn is_begun(self) -> bool {
        matches!(self, GroupState::Known(SnapshotState::Begun) | GroupState::NotDecided)
    }
}

/// Returns whether a file in a folder has the name of a note; `None` if the folder cannot be listed. Reads no file.
///
/// # Errors
/// `Io`.
fn has_note(folder: &Folder) -> Result<Option<bool>> {
    match folder.list_at_most(MAX_LISTED) {
        Err(e) if e.is_denied() => Ok(None),
        listed => Ok(listed?.map(|names| names.iter().any(|name| is_note_name(name)))),
    }
}

/// The coordinator of a snapshot.
pub(super) struct Coordinator {
    /// The folder with its note; `None` if there is no note.
    pub(super) folder: Option<Folder>,
    pub(super) state: GroupState,
}

impl FoundNote {
    /// Returns the notes that concern the image at `path`, older ones first. Returns none if no image is at `path`.
    ///
    /// # Errors
    /// - `Invalid`, with the path of the note, if a note is damaged
    /// - `Refused` if the name of a note leads to no regular file
    /// - `Io`
    pub(super) fn at(env: &dyn Env, path: &Path) -> Result<Vec<FoundNote>> {
        let Some((folder, name)) = locate(env, path)? else { return Ok(Vec::new()) };
        // The image is not locked yet: I/O of a killed daemon may still reach it. Nearly always there is no note, and the
        // image is not read here.
        let has_note = has_note(&folder)?;
        if has_note == Some(false) {
            return Ok(Vec::new());
        }
        let file = match folder.open(&name, Access::Read) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Refused) => return Ok(Vec::new()),
            opened => opened?,
        };
        if has_note.is_none() {
            // The lock waits for I/O of a killed daemon. If a live process has the image locked, its header may be read.
            let _ = file.lock(Lock::Shared);
        }
        let Some(ImageIdentity { uuid, parent, .. }) = ImageIdentity::peek(&file)? else { return Ok(Vec::new()) };
        // A note by the parent's UUID does not concern other children of X.
        let by_parent = match parent {
            Some(parent) => FoundNote::load(&folder, &name, parent)?.filter(FoundNote::is_active),
            None => None,
        };
        Ok(by_parent.into_iter().chain(FoundNote::load(&folder, &name, uuid)?).collect())
    }

    /// Returns the note of the snapshot whose previous active image is `image`.
    fn of_previous(env: &dyn Env, image: &Image) -> Result<Option<FoundNote>> {
        let Some((folder, name)) = locate(env, image.file().path())? else { return Ok(None) };
        FoundNote::load(&folder, &name, image.uuid())
    }

    /// Reads the note of the member whose previous active image is `active_uuid`, for the image called `name`.
    fn load(folder: &Folder, name: &OsStr, active_uuid: Uuid) -> Result<Option<FoundNote>> {
        let Some(note) = SnapshotNote::load(folder, active_uuid)? else { return Ok(None) };
        let Some(index) = note.position(active_uuid) else { return Ok(None) };
        Ok(Some(FoundNote { folder: folder.clone(), name: name.to_os_string(), note, index }))
    }

    pub(super) fn member(&self) -> &SnapshotMember {
        &self.note.members[self.index]
    }

    /// Whether the image has the name of the active image.
    pub(super) fn is_active(&self) -> bool {
        self.name == self.member().active
    }

    /// The path of the active image.
    pub(super) fn active_path(&self) -> PathBuf {
        self.folder.path_to(&self.member().active)
    }

    /// The path of the kept image.
    pub(super) fn kept_path(&self) -> PathBuf {
        self.folder.path_to(&self.member().kept)
    }

    /// Opens the folder of member `index`; `None` if there is no such folder.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn folder_of_member(&self, env: &dyn Env, index: usize) -> Result<Option<Folder>> {
        match index == self.index {
            true => Ok(Some(self.folder.clone())),
            false => none_if_not_found(env.folder(&self.note.members[index].folder)),
        }
    }

    /// Returns the UUID of the active image of member `index`. The outer `None` means that there is no such file, the
    /// inner one that the file is no image.
    ///
    /// # Errors
    /// - `Refused` if the name leads to no regular file
    /// - `Io`
    pub(super) fn active_uuid_of_member(&self, env: &dyn Env, index: usize) -> Result<Option<Option<Uuid>>> {
        let Some(folder) = self.folder_of_member(env, index)? else { return Ok(None) };
        let file = none_if_not_found(folder.open(&self.note.members[index].active, Access::Read))?;
        file.map(|file| uuid_of(&file)).transpose()
    }

    /// Finds the coordinator's note, and decides the state of the snapshot.
    ///
    /// # Errors
    /// - `Invalid`, with the path of the note, if the coordinator's note is damaged
    /// - `Refused`, `Io`
    pub(super) fn coordinator(&self, env: &dyn Env) -> Result<Coordinator> {
        if self.index == 0 {
            return Ok(Coordinator { folder: Some(self.folder.clone()), state: GroupState::Known(self.note.state) });
        }
        let first = &self.note.members[0];
        if let Some(folder) = self.folder_of_member(env, 0)?
            && let Some(note) = SnapshotNote::load(&folder, first.active_uuid)?.filter(|n| n.group == self.note.group)
        {
            return Ok(Coordinator { folder: Some(folder), state: GroupState::Known(note.state) });
        }
        let state = match self.active_uuid_of_member(env, 0)? {
            None => GroupState::Unknown,
            Some(Some(uuid)) if uuid == first.child_uuid => GroupState::Known(SnapshotState::Decided),
            Some(_) => GroupState::NotDecided,
        };
        Ok(Coordinator { folder: None, state })
    }
}

/// Returns the folder and the name of the file at `path`, with symbolic links resolved. Returns `None` if this process
/// cannot resolve the path, as for a file that was passed as a descriptor: no note could be read in its folder.
fn locate(env: &dyn Env, path: &Path) -> Result<Option<(Folder, OsString)>> {
    let Ok(path) = env.canonical(path) else { return Ok(None) };
    let Ok(folder) = env.folder(folder_of(&path)) else { return Ok(None) };
    Ok(Some((folder, file_name(&path)?.to_os_string())))
}

/// Refuses an image that lacks the newest writes of its disk because of an unfinished snapshot, or that must not change
/// before the snapshot is finished. Does nothing in mode `Inspect`.
///
/// A writable open first calls [`resolve_snapshot`](super::resolve_snapshot::resolve_snapshot), so that this function
/// then refuses only an image under another name than that of the active image.
///
/// # Errors
/// - `Refused`, with the command that finishes or undoes the snapshot, or if the name of a note leads to no regular
///   file
/// - `Invalid`, with the path of the note, if a note is damaged
/// - `Io`
pub fn refuse_unfinished_snapshot(env: &dyn Env, image: &Image, mode: OpenMode) -> Result<()> {
    if mode == OpenMode::Inspect || mutant::enabled(Mutant::SnapshotIgnored) {
        return Ok(());
    }
    let Some(found) = FoundNote::of_previous(env, image)? else { return Ok(()) };
    if !found.is_active() && found.active_uuid_of_member(env, found.index)? != Some(Some(image.uuid())) {
        // The disk is finished, and its note waits for other disks of the snapshot.
        return Ok(());
    }
    let (state, active) = (found.coordinator(env)?.state, found.active_path());
    let is_decided = state == GroupState::Known(SnapshotState::Decided);
    let is_usable = match (found.is_active(), found.name == found.member().kept) {
        (true, _) => state.is_begun(),
        (false, is_kept) => (state.is_begun() && !is_kept) || (is_decided && mode != OpenMode::Write),
    };
    if is_usable {
        return Ok(());
    }
    let what = match found.is_active() {
        true => format!(
            "a snapshot of this image as {} was not finished, and the newest writes may be in {}: open the image for \
             writing with diffdiskd, or run `diffdisk settle {}`",
            found.kept_path().display(),
            found.folder.path_to(&found.member().child).display(),
            active.display()
        ),
        false => format!(
            "a snapshot of {0}, which had this image before, was not finished: open {0} for writing with diffdiskd, or \
             run `diffdisk settle {0}`",
            active.display()
        ),
    };
    Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
}

/// An unfinished snapshot of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnfinishedSnapshot {
    /// The path of the active image.
    pub active: PathBuf,
    /// The path that the previous active image keeps.
    pub kept: PathBuf,
    /// `begun`, `switched`, `decided`; `unknown` if the first disk of the snapshot was not found.
    pub state: &'static str,
}

/// Returns the unfinished snapshot of which an image is part. A daemon may be taking this snapshot now.
///
/// # Errors
/// - `Invalid`, with the path of the note, if a note is damaged
/// - `Refused`, `Io`
pub fn unfinished_snapshot(env: &dyn Env, image: &Image) -> Result<Option<UnfinishedSnapshot>> {
    let Some(found) = FoundNote::at(env, image.file().path())?.pop() else { return Ok(None) };
    let state = found.coordinator(env)?.state.word();
    Ok(Some(UnfinishedSnapshot { active: found.active_path(), kept: found.kept_path(), state }))
}
