//! The steps of a snapshot on one disk.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::snapshot_types::SnapshotRequest;
use crate::chain::{Layer, MAX_DEPTH, SnapshotMember, Top, record_child};
use crate::disk::file_table::ServedFile;
use crate::disk::options::WhenFull;
use crate::disk::pending_commit::PendingCommit;
use crate::disk::served_version::ServedVersion;
use crate::disk::shared::Disk;
use crate::disk::version_change::ChangeTurn;
use crate::disk::version_swap::VersionSwap;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Defect;
use crate::image::{
    self, AtomicFile, Commit, Growth, Image, ImageKind, ImageSpec, ParentLink, Writable, file_name, folder_of,
};
use crate::storage::{File, Folder, Lock, ModifiedTime, NameStatus};
use crate::units::BlockSize;

/// Extended attribute of the active image of a disk: the serial that the guest sees.
pub(in crate::disk) const SERIAL_ATTRIBUTE: &str = "user.diffdisk.serial";

/// One disk of a snapshot.
pub(super) struct Member {
    pub(super) disk: Arc<Disk>,
    pub(super) name: String,
    /// The version before the snapshot. Its top is the image X.
    before: Arc<ServedVersion>,
    /// Folder of the active image, with its real path.
    pub(super) folder: Folder,
    active: OsString,
    kept: OsString,
    child_uuid: Uuid,
    /// Whether the note of this disk may exist.
    pub(super) has_note: bool,
    /// The modification time that X gets, and that the child records.
    time: ModifiedTime,
    /// The new child, once it exists.
    child: Option<Top>,
    /// The swap to the new child, once it exists.
    pub(super) swap: Option<VersionSwap>,
    /// The commit of X before the switch.
    pub(super) commit: Option<PendingCommit>,
    // Dropped last: the next change may begin then.
    _turn: ChangeTurn,
}

impl Member {
    /// Checks that a snapshot of the disk can be taken.
    ///
    /// # Errors
    /// - `Busy` if another change of the disk is in progress, or the disk is closed.
    /// - `Refused`, `NotFound` and that of a chain that is too deep, for the reasons listed at [`super::snapshot`].
    /// - `Poisoned` if the image refuses writes.
    /// - `Io`.
    pub(super) fn begin(request: &SnapshotRequest) -> Result<Member> {
        let disk = request.disk.clone();
        let turn = ChangeTurn::take(&disk)?;
        let before = disk.version();
        let Some(top) = before.top() else {
            return Err(Error::new(ErrorKind::Refused, "a read-only disk has no writable layer to keep"));
        };
        let path = top.image.path();
        let refused = |what: String| Err(Error::new(ErrorKind::Refused, what).at_path(path));
        top.image.check_poison()?;
        if before.sealed().is_some() {
            return refused("an earlier snapshot of the disk is not complete; restart the daemon".to_owned());
        }
        if before.depth() >= MAX_DEPTH {
            return Err(Error::from(Defect::ChainTooDeep { limit: MAX_DEPTH }).at_path(path));
        }
        if top.image.file().name_status()? != NameStatus::Kept {
            return refused("the name of the active image leads to another file; a snapshot needs it".to_owned());
        }
        let real = disk.env().canonical(path)?;
        let folder = disk.env().folder(folder_of(&real))?;
        let keep_as = folder_of(&real).join(&request.keep_as);
        let kept = file_name(&keep_as)?.to_os_string();
        if !disk.env().folder(folder_of(&keep_as))?.is_same(&folder) {
            let what = format!("a snapshot is kept in the folder of the active image, {}", folder.path().display());
            return Err(Error::new(ErrorKind::Refused, what).at_path(keep_as));
        }
        if folder.exists(&kept)? {
            return Err(Error::new(
                ErrorKind::Refused,
                "the file exists already; keep the snapshot under another name",
            )
            .at_path(keep_as));
        }
        Ok(Member {
            name: request.name.clone(),
            time: top.image.time_for_child()?,
            active: file_name(&real)?.to_os_string(),
            child_uuid: disk.env().uuid(),
            disk,
            before,
            folder,
            kept,
            has_note: false,
            child: None,
            swap: None,
            commit: None,
            _turn: turn,
        })
    }

    /// The image X.
    pub(super) fn old(&self) -> &Arc<Writable> {
        &self.old_top().image
    }

    fn old_top(&self) -> &Top {
        self.before.writable_top()
    }

    /// The new child.
    ///
    /// # Panics
    /// If the child has not been created.
    pub(super) fn child(&self) -> &Top {
        self.child.as_ref().expect("the child was created")
    }

    /// The swap to the new child.
    ///
    /// # Panics
    /// If the child has not been created.
    pub(super) fn swap(&mut self) -> &mut VersionSwap {
        self.swap.as_mut().expect("the child was created")
    }

    /// Absolute path of the kept image.
    pub(super) fn kept_path(&self) -> PathBuf {
        self.folder.path_to(&self.kept)
    }

    /// First name of the new child.
    fn child_name(&self) -> OsString {
        format!(".{}.child", self.child_uuid.simple()).into()
    }

    /// The entry of the disk in the note.
    pub(super) fn entry(&self) -> SnapshotMember {
        SnapshotMember {
            folder: self.folder.path().to_path_buf(),
            active: self.active.clone(),
            kept: self.kept.clone(),
            child: self.child_name(),
            active_uuid: self.old().image().uuid(),
            child_uuid: self.child_uuid,
        }
    }

    /// Creates the new child, opens it for writing, and grows its file.
    ///
    /// # Errors
    /// - `Refused` if all file slots are in use.
    /// - `Unsupported`, `NoSpace`, `Io`, and the errors of opening the child.
    pub(super) fn create_child(&mut self) -> Result<()> {
        let (disk, env) = (&self.disk, self.disk.env());
        let name = self.child_name();
        let path = self.folder.path_to(&name);
        let mut draft = AtomicFile::begin(env, &path, self.folder.clone(), &name)?;
        let file = draft.file().renamed(self.old().path())?;
        file.lock(Lock::Exclusive)?;
        image::write_new(draft.file(), env, self.child_uuid, &self.child_spec())?;
        self.pass_on_serial(&file);
        draft.publish()?;
        drop(draft);
        let options = disk.options();
        let image = Arc::new(Writable::new(env, Image::open(file)?, &options.keep)?);
        image.set_allocation(options.allocation);
        image.report_events_to(options.events.clone());
        let served = ServedFile::new(image.file(), options.direct)?;
        let slot = disk.take_slot_for(self.old().path())?;
        let top = Top { slot, image };
        let swap = VersionSwap::new(disk, self.before.with_child(top.clone(), served), slot, None);
        (self.child, self.swap) = (Some(top.clone()), Some(swap));
        // The file grows now, so that the first writes of the guest need not wait for growth.
        if let Some(mut growth) = Growth::begin(&top.image, top.slot) {
            image::run_to_completion(env, top.image.file(), slot, |failed, ops| growth.next(failed, ops))?;
        }
        Ok(())
    }

    fn child_spec(&self) -> ImageSpec {
        let image = self.old().image();
        let block_size = image.block_size().unwrap_or(BlockSize::DEFAULT);
        let table_blocks = image.bat().map_or(0, |table| u64::from(table.len()));
        let name = PathBuf::from(&self.kept);
        let link = ParentLink {
            uuid: image.uuid(),
            modified: self.time.seconds,
            relative: Some(name.clone()),
            absolute: Some(self.kept_path()),
            name,
        };
        ImageSpec {
            kind: ImageKind::Differencing(link),
            size: image.size(),
            block_size,
            reserve: table_blocks * u64::from(block_size.bytes()),
        }
    }

    /// Records, in the new active image, the serial that the guest sees. The default serial comes from the UUID, and
    /// the new image has another UUID. Logs a failure.
    fn pass_on_serial(&self, file: &File) {
        let serial = self.disk.serial();
        let len = serial.iter().position(|byte| *byte == 0).unwrap_or(serial.len());
        if let Err(e) = file.set_attribute(SERIAL_ATTRIBUTE, Some(&serial[..len])) {
            let text = String::from_utf8_lossy(&serial[..len]).into_owned();
            log::warn!("{}; start the daemon with serial={text}, or the guest sees another serial then", e.line());
        }
    }

    /// Commits X, which takes no writes any more, and ends its session. All flushes wait.
    ///
    /// # Errors
    /// - `Poisoned` if X refuses writes.
    /// - `NoSpace`, `Io`: if no sync failed, nothing is lost, and the call may be repeated.
    pub(super) fn retire_old(&self) -> Result<()> {
        let (env, top) = (self.disk.env(), self.old_top());
        let mut commit = Commit::new(top.image.clone(), top.slot);
        let result = image::run_to_completion(env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops));
        self.disk.record_commit(&result, commit.barriers());
        result?;
        top.image.retire(self.time)
    }

    /// Records the new child in an attribute of its parent, after both have their names.
    pub(super) fn record_child(&self) {
        record_child(self.disk.env(), self.old().image(), &self.folder.path_to(&self.active));
    }

    /// Makes X, which has its new name, a frozen layer that other chains may share.
    ///
    /// # Errors
    /// - Those of [`Image::open`]; the daemon then serves the disk with the sealed layer.
    /// - `Io`.
    pub(super) fn freeze_old(&self) -> Result<()> {
        let top = self.old_top();
        let file = top.image.file().renamed(&self.kept_path())?;
        let layer = Layer { slot: top.slot, image: Arc::new(Image::open(file.clone())?) };
        let current = self.disk.version();
        self.disk.publish(Arc::new(current.with_sealed_frozen(layer)));
        if let Err(e) = file.lock(Lock::Shared) {
            log::warn!("{}; no other process can open the kept image until the daemon ends", e.line());
        }
        Ok(())
    }

    /// Removes the new child, which took no writes, and its journal. Returns whether both are gone, durably. Logs a
    /// failure.
    pub(super) fn remove_child(&mut self) -> bool {
        if let Some(commit) = self.commit.take() {
            commit.leave(&self.disk);
        }
        // Dropping the swap opens the gates, if they are closed, and frees the slot of the child.
        self.swap = None;
        let ended = self.child.take().map_or(Ok(()), |child| child.image.abandon());
        let name = self.child_name();
        let removed = match self.folder.remove(&name) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| self.folder.sync()),
        };
        ended
            .and(removed)
            .inspect_err(|e| log::warn!("{}; the next open of the disk removes what is left of the snapshot", e.line()))
            .is_ok()
    }

    /// Fails the flushes that must not wait until the snapshot is decided. These are the flushes of queues that stop
    /// or, if the disk reports a full file system to the guest, all flushes.
    pub(super) fn fail_flushes_that_must_not_wait(&self) {
        match self.disk.options().when_full {
            WhenFull::Park => self.disk.group_commit.stall(),
            WhenFull::Fail => self.disk.group_commit.fail_waiters(),
        }
    }

    /// Lets commit rounds of the disk begin again, so that flushes are answered. Returns how long the rounds were held;
    /// zero if they were not held.
    pub(super) fn release_rounds(&mut self) -> Duration {
        self.swap.as_mut().map_or(Duration::ZERO, VersionSwap::release_rounds)
    }
}
