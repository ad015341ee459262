//! Writes, reads, replaces and removes the notes of a snapshot, and gives the images of a member their final names.
//!
//! The text of the coordinator's note is replaced in two steps: the next text is written under a second name and made
//! durable, and then that name is renamed over the note. So the switch of a running disk needs only the rename.
//!
//! Only one process changes the notes of a snapshot at a time. The daemon that serves the members has their images
//! locked. A process that finishes or undoes the snapshot has the coordinator's note locked, or the note of its own
//! member if there is no coordinator's note.

use std::ffi::OsStr;

use uuid::Uuid;

use super::note_text::read_note;
use super::snapshot_note::{SnapshotNote, note_name};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::failpoint;
use crate::image::{AtomicFile, ImageIdentity};
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, File, Folder, Lock};

impl SnapshotNote {
    /// Writes the note of member `index`, which must not exist, in the member's folder. Then text, name and folder are
    /// durable.
    ///
    /// # Errors
    /// - `Refused` if a note of the same image exists
    /// - `NoSpace`, `Io`
    pub fn write_new(&self, env: &dyn Env, folder: &Folder, index: usize) -> Result<()> {
        let (name, active) = (self.name(index), &self.members[index].active);
        let path = folder.path_to(&name);
        if folder.exists(&name)? {
            let what = format!(
                "an earlier snapshot of {} was not finished: run `diffdisk settle` on that image while it is not served",
                folder.path_to(active).display()
            );
            return Err(Error::new(ErrorKind::Refused, what).at_path(path));
        }
        let mut note = AtomicFile::begin(env, &path, folder.clone(), &name)?;
        let written = note.file().write_at(self.encode().as_bytes(), 0).and_then(|()| note.file().sync());
        written.map_err(|e| note.with_requested_path(e))?;
        failpoint::reached("snapshot.note-written");
        note.publish().map_err(|e| note.with_requested_path(e))?;
        failpoint::reached("snapshot.noted");
        Ok(())
    }

    /// Checks that the active image of member `index` can have a second name, before the snapshot depends on it.
    ///
    /// # Errors
    /// - `Unsupported` if the file system has no hard links
    /// - `NoSpace`, `Io`
    pub fn check_links(&self, folder: &Folder, index: usize) -> Result<()> {
        let second = self.second_name(index);
        folder.link(&self.members[index].active, &second).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS) => {
                let what = "a snapshot gives the image a second name, and the file system has no hard links";
                Error::new(ErrorKind::Unsupported, what).at_path(folder.path()).caused_by(e)
            }
            _ => e,
        })?;
        folder.remove(&second)
    }

    /// Writes the coordinator's next text durably under the second name. The name itself is not durable.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the note is unchanged.
    pub fn prepare(&self, _env: &dyn Env, folder: &Folder) -> Result<()> {
        self.write_prepared(folder)?;
        failpoint::reached("snapshot.prepared");
        Ok(())
    }

    /// Replaces the coordinator's note by the prepared text. Nothing is made durable.
    ///
    /// # Errors
    /// - `NotFound` if no text was prepared
    /// - `NoSpace`, `Io`
    pub fn switch(&self, folder: &Folder) -> Result<()> {
        folder.rename(&self.second_name(0), folder, &self.name(0))?;
        failpoint::reached("snapshot.switched");
        Ok(())
    }

    /// Replaces the coordinator's note. Then text, name and folder are durable.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the note has the old or the new text.
    pub fn replace(&self, _env: &dyn Env, folder: &Folder) -> Result<()> {
        let next = self.write_prepared(folder)?;
        self.rename_prepared(folder, &next)
    }

    /// Replaces the coordinator's note as [`SnapshotNote::replace`] does. The new file has the exclusive lock of the
    /// returned handle before it has the name of the note.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the note has the old or the new text.
    pub(super) fn replace_locked(&self, folder: &Folder) -> Result<File> {
        let next = self.write_prepared(folder)?;
        next.lock(Lock::Exclusive)?;
        self.rename_prepared(folder, &next).map(|()| next)
    }

    fn write_prepared(&self, folder: &Folder) -> Result<File> {
        let name = self.second_name(0);
        remove_if_present(folder, &name)?;
        let next = folder.create(&name)?;
        let written = next.write_at(self.encode().as_bytes(), 0).and_then(|()| next.sync());
        if written.is_err() {
            let _ = folder.remove(&name);
        }
        written.map(|()| next)
    }

    fn rename_prepared(&self, folder: &Folder, prepared: &File) -> Result<()> {
        failpoint::reached("snapshot.next-written");
        folder.rename(prepared.name(), folder, &self.name(0))?;
        failpoint::reached("snapshot.next-named");
        if !mutant::enabled(Mutant::SnapshotNoteUnsynced) {
            folder.sync()?;
        }
        failpoint::reached("snapshot.next-durable");
        Ok(())
    }

    /// Removes the note of member `index` durably, and also its second name. The second name of the coordinator's note
    /// is the prepared text. Names that do not exist are no error.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, folder: &Folder, index: usize) -> Result<()> {
        // The second name is found by the note, so the note is removed last.
        if remove_if_present(folder, &self.second_name(index))? {
            folder.sync()?;
            failpoint::reached("snapshot.prepared-removed");
        }
        remove_if_present(folder, &self.name(index))?;
        failpoint::reached("snapshot.note-removed");
        folder.sync()
    }

    /// Gives the images of member `index` their final names after the decision: links A as K and renames T over A, in
    /// the member's folder. Does nothing if A is the new child already, except that the names are made durable.
    /// Idempotent.
    ///
    /// # Errors
    /// - `Refused` if K is another file, if A is neither of the two images, if T is not the new child, or if a name
    ///   leads to no regular file
    /// - `NotFound` if A or T does not exist
    /// - `NoSpace`, `Io`: the same call may be repeated
    pub fn name_files(&self, _env: &dyn Env, folder: &Folder, index: usize) -> Result<()> {
        let member = &self.members[index];
        let refuse =
            |name: &OsStr, what: String| Err(Error::new(ErrorKind::Refused, what).at_path(folder.path_to(name)));
        let file = folder.open(&member.active, Access::Read)?;
        let active = uuid_of(&file)?;
        if active == Some(member.child_uuid) {
            return folder.sync();
        }
        let [shown_kept, shown_note] = [&member.kept, &self.name(index)].map(|name| folder.path_to(name));
        if active != Some(member.active_uuid) {
            let what = format!("another image has this name than {} records", shown_note.display());
            return refuse(&member.active, what);
        }
        if uuid_of(&folder.open(&member.child, Access::Read)?)? != Some(member.child_uuid) {
            let what = format!("the new child of the snapshot {} is not in this file", shown_kept.display());
            return refuse(&member.child, what);
        }
        match none_if_not_found(folder.open(&member.kept, Access::Read))? {
            None => folder.link(&member.active, &member.kept)?,
            Some(kept) if kept.stat()?.id == file.stat()?.id => {}
            Some(_) => {
                let what = format!(
                    "the name of the unfinished snapshot of {} belongs to another file: rename that file",
                    folder.path_to(&member.active).display()
                );
                return refuse(&member.kept, what);
            }
        }
        failpoint::reached("snapshot.kept");
        // The rename removes the name A of X. If the rename were durable without the link, X would have no name. The
        // sync is necessary even if K exists, since a killed process may have linked K without a sync.
        if !mutant::enabled(Mutant::SnapshotKeptUnsynced) {
            folder.sync()?;
        }
        failpoint::reached("snapshot.kept-durable");
        folder.rename(&member.child, folder, &member.active)?;
        failpoint::reached("snapshot.renamed");
        folder.sync()
    }

    /// Reads the note of the member whose active image was `active_uuid`. Returns `None` if there is none.
    ///
    /// # Errors
    /// - `Invalid` if the note is damaged, or has no member whose active image was `active_uuid`
    /// - `Refused` if the name leads to no regular file
    /// - `Io`
    pub(super) fn load(folder: &Folder, active_uuid: Uuid) -> Result<Option<SnapshotNote>> {
        let name = note_name(active_uuid);
        if !folder.exists(&name)? {
            return Ok(None);
        }
        let Some(file) = none_if_not_found(folder.open(&name, Access::Read))? else { return Ok(None) };
        let note = read_note(&file)?.and_then(|text| SnapshotNote::decode(&text));
        note.filter(|note| note.position(active_uuid).is_some()).map(Some).ok_or_else(|| {
            let what = "the note of an unfinished snapshot is damaged, so it is not known which image has the newest \
                        writes: restore the note, or remove it if the image with the UUID in its name is to be used \
                        as it is";
            Error::new(ErrorKind::Invalid, what).at_path(file.path())
        })
    }
}

/// Returns the UUID of the image in a file; `None` if the file is no image.
///
/// # Errors
/// `Io`.
pub(super) fn uuid_of(file: &File) -> Result<Option<Uuid>> {
    Ok(ImageIdentity::peek(file)?.map(|identity| identity.uuid))
}

/// Removes a name. Returns whether the name existed.
fn remove_if_present(folder: &Folder, name: &OsStr) -> Result<bool> {
    Ok(folder.exists(name)? && none_if_not_found(folder.remove(name))?.is_some())
}
