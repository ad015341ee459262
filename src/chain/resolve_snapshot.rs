//! Finishes or undoes an unfinished snapshot of a disk, before the disk is opened for writing.
//!
//! | state in the coordinator's note | machine restarted since | resolution |
//! | --- | --- | --- |
//! | decided | - | forward |
//! | switched, with journals | no | settle the previous images of all members, record `decided`, then forward |
//! | switched, without journals | no | back: no write to a child was acknowledged |
//! | switched | yes | back: no flush of a child was acknowledged |
//! | begun, or not decided, as there is no coordinator's note | - | back |
//! | unknown, as neither the coordinator's note nor its disk was found | - | refused; back with `discard` |
//!
//! Forward: X gets its kept name K, and Y gets the name A. Back: Y is removed with its journal, and X stays as it is.
//! If A already is Y, the state counts as decided. The proof is in docs/crash-safety.md (crash-safety 12).
//!
//! Each member is resolved when it is opened. Two rules ensure that all members go in the same direction. A member goes
//! forward only if the state is `decided`. Before a member goes back from `switched`, the coordinator's note durably
//! returns to `begun`.

use std::path::Path;
use std::time::{Duration, Instant};

use super::parent_time;
use super::snapshot_note::{SnapshotNote, SnapshotState};
use super::snapshot_note_file::uuid_of;
use super::unfinished_snapshot::{Coordinator, FoundNote, GroupState};
use crate::error::{Error, ErrorKind, Result, none_if_not_found};
use crate::failpoint;
use crate::image::{self, Image, refuse_if_on_other_machine, refuse_unless_replayable};
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, File, Lock, NameStatus, RuntimeFolder};

/// Maximum time for which another process may have a note or another member of the snapshot locked.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// Time between two attempts to take a lock.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Finishes or undoes each unfinished snapshot of the disk whose active image is at `path`, and returns whether there
/// was one. Does nothing if no note concerns that image. The caller opens the chain whose youngest image is at `path`
/// for writing afterwards. `runtime` are the folders with live journals.
///
/// If acknowledged writes cannot be restored, because a journal is lost or belongs to another machine, the snapshot
/// stays as it is. With `discard`, the snapshot is undone instead, and these writes are lost.
///
/// # Errors
/// - `Busy` if another process has an image of the disk open, or still holds a lock on the note or on another disk of
///   the snapshot after 30 s
/// - `Refused`, with what to do, if acknowledged writes would be lost, or if another file has the kept name
/// - `Invalid`, with the path of the note, if a note is damaged
/// - `Poisoned` if a sync of the killed daemon failed
/// - `Invalid`, `Unsupported`, `NotFound`, `NoSpace`, `Io` for an image of the snapshot; the same call may be repeated
pub fn resolve_snapshot(env: &dyn Env, path: &Path, runtime: &[RuntimeFolder], discard: bool) -> Result<bool> {
    resolve_within(env, path, runtime, discard, LOCK_TIMEOUT)
}

fn resolve_within(
    env: &dyn Env,
    path: &Path,
    runtime: &[RuntimeFolder],
    discard: bool,
    timeout: Duration,
) -> Result<bool> {
    if mutant::enabled(Mutant::SnapshotIgnored) {
        return Ok(false);
    }
    let mut is_resolved = false;
    let notes = FoundNote::at(env, path)?.into_iter().filter(FoundNote::is_active);
    for active_uuid in notes.map(|found| found.member().active_uuid) {
        let deadline = Instant::now() + timeout;
        let is_same = |found: &FoundNote| found.is_active() && found.member().active_uuid == active_uuid;
        let find = || FoundNote::at(env, path).map(|notes| notes.into_iter().find(is_same));
        let Some(found) = find()? else { continue };
        let Some(_lock) = lock_note(env, &found, deadline)? else { continue };
        // Another process may have resolved the snapshot before this process got the lock.
        let Some(found) = find()? else { continue };
        Resolution { env, runtime, discard, deadline, found }.run()?;
        is_resolved = true;
    }
    Ok(is_resolved)
}

/// Locks the coordinator's note or, if there is none, the note that was found. Returns `None` if that note is gone.
///
/// # Errors
/// - `Busy` if another process still holds a lock on the note at `deadline`
/// - `Refused`, `Io`
fn lock_note(env: &dyn Env, found: &FoundNote, deadline: Instant) -> Result<Option<File>> {
    loop {
        let first = match found.folder_of_member(env, 0)? {
            Some(folder) => none_if_not_found(folder.open(&found.note.name(0), Access::Write))?,
            None => None,
        };
        let own = || none_if_not_found(found.folder.open(&found.note.name(found.index), Access::Write));
        let Some(file) = first.map_or_else(own, |file| Ok(Some(file)))? else { return Ok(None) };
        let busy = || {
            let what = "another process is finishing or undoing this snapshot; try again later";
            Error::new(ErrorKind::Busy, what).at_path(file.path())
        };
        lock_before(&file, deadline, busy)?;
        // The note is replaced by a rename, so the lock may be on the file of an older text.
        match file.name_status()? {
            NameStatus::Kept => return Ok(Some(file)),
            _ if Instant::now() >= deadline => return Err(busy()),
            _ => {}
        }
    }
}

/// Locks a file exclusively. If another process still holds a lock at `deadline`, returns the error of `busy`.
fn lock_before(file: &File, deadline: Instant, busy: impl FnOnce() -> Error) -> Result<()> {
    loop {
        match file.lock(Lock::Exclusive) {
            Err(e) if e.kind() != ErrorKind::Busy => return Err(e),
            Err(e) if Instant::now() >= deadline => return Err(busy().caused_by(e)),
            Err(_) => std::thread::sleep(LOCK_PAUSE),
            Ok(()) => return Ok(()),
        }
    }
}

/// The resolution of one member. The note is locked.
struct Resolution<'a> {
    env: &'a dyn Env,
    runtime: &'a [RuntimeFolder],
    discard: bool,
    deadline: Instant,
    found: FoundNote,
}

impl Resolution<'_> {
    fn run(&self) -> Result<()> {
        let (found, member) = (&self.found, self.found.member());
        let active = found.folder.open(&member.active, Access::Write)?;
        active.lock(Lock::Exclusive)?;
        let child = self.lock_child()?;
        let coordinator = found.coordinator(self.env)?;
        let uuid = uuid_of(&active)?;
        if uuid != Some(member.active_uuid) && uuid != Some(member.child_uuid) {
            log::warn!(
                "{}: the note of an unfinished snapshot names other images than this one, so it is out of date; removed",
                active.path().display()
            );
            return self.remove_notes(&coordinator);
        }
        if !self.discard {
            for file in [Some(&active), child.as_ref()].into_iter().flatten() {
                self.refuse_if_used_elsewhere(file)?;
            }
        }
        // The new child gets the name A only after the decision.
        let is_named = uuid == Some(member.child_uuid);
        let state = if is_named { GroupState::Known(SnapshotState::Decided) } else { coordinator.state };
        match mutate_state(state) {
            GroupState::Known(SnapshotState::Decided) => self.go_forward(&coordinator, is_named),
            GroupState::Known(SnapshotState::Switched { boot, has_journal }) => {
                let is_valid = self.env.origin()?.boot == boot || mutant::enabled(Mutant::SnapshotSwitchedAfterBoot);
                if !is_valid || !has_journal {
                    return self.return_to_begun(&coordinator).and_then(|_lock| self.go_back(child.as_ref()));
                }
                match self.settle_members(&active) {
                    Ok(()) => {}
                    Err(e) if self.discard && is_loss(&e) => {
                        log::warn!("{}; the snapshot is undone, with the writes since it was taken", e.line());
                        return self.return_to_begun(&coordinator).and_then(|_lock| self.go_back(child.as_ref()));
                    }
                    Err(e) => return Err(e),
                }
                let _lock = self.record(&coordinator, SnapshotState::Decided)?;
                self.go_forward(&coordinator, is_named)
            }
            GroupState::Known(SnapshotState::Begun) | GroupState::NotDecided => self.go_back(child.as_ref()),
            GroupState::Unknown if self.discard => self.go_back(child.as_ref()),
            GroupState::Unknown => {
                let first = &found.note.members[0];
                let what = format!(
                    "a snapshot of this disk together with {} was not finished, and neither that image nor its note was \
                     found, so it is not known which image has the newest writes: make the folder {} available. If that \
                     disk is gone, --discard-journal undoes the snapshot, and the writes since then are lost",
                    first.active_path().display(),
                    first.folder.display()
                );
                Err(Error::new(ErrorKind::Refused, what).at_path(active.path()))
            }
        }
    }

    /// Opens and locks the new child of this member, if it exists under its first name.
    fn lock_child(&self) -> Result<Option<File>> {
        let (folder, member) = (&self.found.folder, self.found.member());
        let Some(child) = none_if_not_found(folder.open(&member.child, Access::Write))? else { return Ok(None) };
        if uuid_of(&child)? != Some(member.child_uuid) {
            log::warn!("{}: not the image of the unfinished snapshot; it stays as it is", child.path().display());
            return Ok(None);
        }
        child.lock(Lock::Exclusive)?;
        Ok(Some(child))
    }

    /// Refuses a file that is an image with a session of another machine. A file that cannot be opened as an image is
    /// not refused.
    fn refuse_if_used_elsewhere(&self, file: &File) -> Result<()> {
        Image::open(file.clone()).map_or(Ok(()), |image| refuse_if_on_other_machine(self.env, &image))
    }

    /// Replays and commits the live journals of the previous images of all members, so that these images do not change
    /// any more. `active` is that of this member, locked. Checks all images before the first one is changed.
    fn settle_members(&self, active: &File) -> Result<()> {
        let (found, mut files) = (&self.found, Vec::new());
        for (index, member) in found.note.members.iter().enumerate() {
            if index != found.index && mutant::enabled(Mutant::SnapshotOnlyOwnSettled) {
                continue;
            }
            let gone = || {
                let what = "a disk of an unfinished snapshot is missing, so the snapshot cannot be finished: make it \
                            available again, or undo the snapshot with --discard-journal, which loses the writes since";
                Error::new(ErrorKind::Refused, what).at_path(member.active_path())
            };
            let folder = found.folder_of_member(self.env, index)?.ok_or_else(gone)?;
            let file = match index == found.index {
                true => active.clone(),
                false => {
                    self.lock_member(&folder.open(&member.active, Access::Write).map_err(|e| match e.kind() {
                        ErrorKind::NotFound => gone().caused_by(e),
                        _ => e,
                    })?)?
                }
            };
            let child = none_if_not_found(folder.open(&member.child, Access::Read))?.ok_or_else(gone)?;
            if uuid_of(&file)? != Some(member.active_uuid) || uuid_of(&child)? != Some(member.child_uuid) {
                return Err(gone());
            }
            let child = Image::open(child)?;
            for image in [&Image::open(file.clone())?, &child] {
                // The commands in the message work with the active image.
                refuse_unless_replayable(self.env, self.runtime, image, file.path())?;
            }
            files.push((file, child));
        }
        for (file, child) in &files {
            image::settle(self.env, self.runtime, file)?;
            // A fixed image has no journal: its acknowledged writes may be in the page cache alone.
            file.sync()?;
            failpoint::reached("snapshot.member-settled");
            // The changes of the file have moved its time. What the child reads is unchanged, so the file gets the time
            // that the child records.
            parent_time::restore(child, file)?;
        }
        failpoint::reached("snapshot.all-settled");
        Ok(())
    }

    fn lock_member(&self, file: &File) -> Result<File> {
        lock_before(file, self.deadline, || {
            let note = self.found.folder.path_to(&self.found.note.name(self.found.index));
            let what = format!("another process uses this disk of the unfinished snapshot in {}", note.display());
            Error::new(ErrorKind::Busy, what).at_path(file.path())
        })?;
        Ok(file.clone())
    }

    /// Records a state in the coordinator's note, durably, and returns the lock on the new file of the note. Does
    /// nothing and returns `None` if there is no coordinator's note.
    fn record(&self, coordinator: &Coordinator, state: SnapshotState) -> Result<Option<File>> {
        let Some(folder) = &coordinator.folder else { return Ok(None) };
        SnapshotNote { state, ..self.found.note.clone() }.replace_locked(folder).map(Some)
    }

    /// Records, before this member goes back, that no member may go forward any more. First refuses, unless `discard`
    /// is set, if an image of another member has a session of another machine.
    fn return_to_begun(&self, coordinator: &Coordinator) -> Result<Option<File>> {
        for index in (0..self.found.note.members.len()).filter(|index| *index != self.found.index && !self.discard) {
            let member = &self.found.note.members[index];
            let Some(folder) = self.found.folder_of_member(self.env, index)? else { continue };
            for name in [&member.active, &member.child] {
                if let Some(file) = none_if_not_found(folder.open(name, Access::Read))? {
                    self.refuse_if_used_elsewhere(&file)?;
                }
            }
        }
        self.record(coordinator, SnapshotState::Begun)
    }

    /// Gives the images their final names. `is_named` means that the new child is the active image already.
    fn go_forward(&self, coordinator: &Coordinator, is_named: bool) -> Result<()> {
        let found = &self.found;
        if let Some(folder) = &coordinator.folder {
            // A killed daemon may have recorded the decision without a sync of the folder.
            folder.sync()?;
        }
        found.note.name_files(self.env, &found.folder, found.index)?;
        failpoint::reached("snapshot.named");
        if !is_named {
            let (active, kept) = (found.active_path(), found.kept_path());
            log::info!("{}: its unfinished snapshot {} was finished", active.display(), kept.display());
        }
        self.remove_notes(coordinator)
    }

    /// Removes the new child, its journal and the note of this member.
    fn go_back(&self, child: Option<&File>) -> Result<()> {
        let found = &self.found;
        if let Some(child) = child {
            // The journal is found by the stamp in the child.
            if let Ok(image) = Image::open(child.clone()) {
                image::remove_journal_of(self.runtime, &image)?;
            }
            failpoint::reached("snapshot.child-journal-removed");
            found.folder.remove(child.name())?;
            failpoint::reached("snapshot.child-removed");
        }
        // The child is found by the note, so the note is removed last. A killed process may have removed the child
        // without a sync.
        found.folder.sync()?;
        failpoint::reached("snapshot.child-gone");
        found.note.remove(&found.folder, found.index)?;
        let (active, kept) = (found.active_path(), found.kept_path());
        log::info!("{}: its unfinished snapshot {} was undone", active.display(), kept.display());
        Ok(())
    }

    /// Removes the note of this member, and also the coordinator's note if no other member needs it any more.
    fn remove_notes(&self, coordinator: &Coordinator) -> Result<()> {
        let found = &self.found;
        if found.index != 0 {
            found.note.remove(&found.folder, found.index)?;
        }
        let Some(folder) = &coordinator.folder else { return Ok(()) };
        for index in (0..found.note.members.len()).filter(|index| *index != found.index) {
            if !self.is_finished(index)? {
                let (note, other) = (folder.path_to(&found.note.name(0)), found.note.members[index].active_path());
                log::debug!("{}: kept, as {} is not finished or not available", note.display(), other.display());
                return Ok(());
            }
        }
        found.note.remove(folder, 0)
    }

    /// Whether member `index`, another one than this, no longer needs the coordinator's note. False if the folder or
    /// the disk of that member is not found, or its note is damaged.
    fn is_finished(&self, index: usize) -> Result<bool> {
        let (found, member) = (&self.found, &self.found.note.members[index]);
        let Some(uuid) = found.active_uuid_of_member(self.env, index)? else { return Ok(false) };
        if index == 0 {
            return Ok(uuid != Some(member.active_uuid));
        }
        let Some(folder) = found.folder_of_member(self.env, index)? else { return Ok(false) };
        match SnapshotNote::load(&folder, member.active_uuid) {
            Err(e) if e.kind() == ErrorKind::Invalid => Ok(false),
            note => Ok(note?.is_none_or(|note| note.group != found.note.group)),
        }
    }
}

/// Whether an error means that acknowledged writes cannot be restored.
fn is_loss(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Refused | ErrorKind::Poisoned | ErrorKind::Invalid | ErrorKind::Unsupported)
}

/// Mutant `SnapshotAlwaysForward`: every state counts as decided.
fn mutate_state(state: GroupState) -> GroupState {
    let is_mutated = mutant::enabled(Mutant::SnapshotAlwaysForward);
    if is_mutated { GroupState::Known(SnapshotState::Decided) } else { state }
}

#[cfg(all(test, feature = "sim"))]
#[path = "resolve_snapshot_crash_tests.rs"]
mod crash_tests;
#[cfg(all(test, feature = "sim"))]
#[path = "snapshot_testing.rs"]
mod testing;
#[cfg(all(test, feature = "sim"))]
#[path = "resolve_snapshot_tests.rs"]
mod tests;
