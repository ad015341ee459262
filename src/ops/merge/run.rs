//! The steps of a merge: [`PreparedMerge::prepare`] opens and checks the files, [`PreparedMerge::run`] does the work.

use std::path::{Path, PathBuf};

use super::plan::{MergePlan, plan_merge};
use super::resume::{check_same_merge, is_copy_complete, resume_from, uuid_at};
use crate::chain::{
    Chain, Copied, ExistingRecord, FileStamp, MergeRecord, OpenMode, Policy, mark_receiver, receiver_mark,
    record_child, relative_path, resolve_snapshot, unmark_receiver,
};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::image::{
    Durability, Image, ImageIdentity, SavedMtime, file_name, folder_of, is_reparent_finished, refuse_if_live, reparent,
};
use crate::ops::folder_scan;
use crate::ops::image_writer::{ImageWriter, log_secondary_error};
use crate::ops::parent_link::{Locators, replacement_link};
use crate::ops::source::Progress;
use crate::storage::{Access, Env, File, FileId, Folder, Lock};
use crate::units::SECTOR;

/// Bytes written between two saves of the progress. On small disks a quarter of the disk is used instead.
const CHECKPOINT_BYTES: u64 = 512 << 20;

/// The changes that one run of the merge made. If earlier runs were interrupted, their changes are not included.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merged {
    /// The ancestor that received the data.
    pub ancestor: PathBuf,
    /// Bytes of data copied by this run.
    pub copied: u64,
    /// Children linked to the ancestor by this run.
    pub relinked: Vec<PathBuf>,
    /// Images removed by this run.
    pub removed: Vec<PathBuf>,
}

/// A merge whose files are checked. No file is changed yet. While data remains to be copied, the merged layers are
/// locked against writers, and the children of CHILD exclusively. The ancestor is not locked yet. If everything is
/// copied already, no file is locked: the run locks each file when it uses the file.
pub struct PreparedMerge<'a> {
    env: &'a dyn Env,
    policy: Policy,
    record: MergeRecord,
    /// The files to copy, with their locks. `None` if an earlier run copied everything.
    plan: Option<MergePlan>,
    /// Folders to search for children of CHILD.
    child_folders: Vec<Folder>,
    /// Folder of the merge record. This folder and those of the layers stay open, so that files are removed from the
    /// checked folders even if the paths are changed to lead to other folders.
    record_folder: Folder,
    /// Folder of each layer.
    layer_folders: Vec<Folder>,
    /// Whether a merge record exists on disk.
    is_recorded: bool,
}

impl<'a> PreparedMerge<'a> {
    /// Opens the files of a merge of the image at `child` into `into` (by default the parent of `child`), and checks
    /// that the merge is possible. If an earlier run was interrupted, this run continues the merge of the earlier run,
    /// even if CHILD is already removed. `changed_parent` allows a parent with a later modification time than its child
    /// records.
    ///
    /// # Errors
    /// - `Busy` if another process holds a conflicting lock on a file, or changed the chain meanwhile
    /// - `Refused` if `child` is a root, if `into` is no ancestor, if the disk of another child would change, if the
    ///   sizes do not allow the merge, if an unfinished merge has another ancestor or forbids the change, if a live
    ///   journal has writes that a file lacks, or (without `changed_parent`) if a parent has a later modification time
    ///   than its child records
    /// - `Refused` if the ancestor was changed after everything was copied, and CHILD no longer exists
    /// - `Unsupported` if the path of the ancestor cannot be recorded in a child of CHILD
    /// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for the merge record, a file of the chain, or a child of
    ///   CHILD
    pub fn prepare(
        env: &'a dyn Env,
        child: &Path,
        into: Option<&Path>,
        changed_parent: bool,
        policy: &Policy,
    ) -> Result<PreparedMerge<'a>> {
        // If `child` is a symbolic link, its target is merged and removed.
        let child = &env.canonical(child).unwrap_or_else(|_| child.to_path_buf());
        resolve_snapshot(env, child, &policy.runtime, false)?;
        let present = uuid_at(env, child)?;
        let earlier = MergeRecord::find(env, child, present)?;
        let mut policy = policy.clone();
        policy.merging = present;
        if let ExistingRecord::Record(record) = &earlier {
            check_same_merge(env, record, child, into)?;
            policy.merging = Some(record.layers[0].uuid);
            if record.copied == Copied::All && is_copy_complete(env, record, present.is_some())? {
                let record_folder = env.folder(&record.folder)?.absolute()?;
                let place = |path: &Path| env.folder(folder_of(&record.folder.join(path)))?.absolute();
                let layer_folders = record.layers.iter().map(|layer| place(&layer.path)).collect::<Result<Vec<_>>>()?;
                let own = [record_folder.clone(), place(&record.ancestor_path)?];
                let child_folders = folder_scan::folders_to_scan(
                    env,
                    own.into_iter().chain(layer_folders.iter().cloned()).map(Ok),
                    &policy.allowed,
                )?;
                let record = MergeRecord::clone(record);
                return Ok(PreparedMerge {
                    env,
                    policy,
                    record,
                    plan: None,
                    child_folders,
                    record_folder,
                    layer_folders,
                    is_recorded: true,
                });
            }
        }
        let plan = plan_merge(env, child, into, changed_parent, &policy)?;
        let folder = env.canonical(folder_of(child))?;
        let ancestor_path = relative_path(&folder, &env.canonical(plan.ancestor.file().path())?);
        let mut record = MergeRecord {
            folder,
            layers: plan.merged_layers.clone(),
            ancestor: plan.ancestor.uuid(),
            ancestor_path,
            // This stamp is compared again under the exclusive lock.
            ancestor_stamp: FileStamp::of(plan.ancestor.file())?,
            copied: Copied::Nothing,
            abandoned: false,
        };
        let (child_folders, is_recorded) = (plan.child_folders.clone(), earlier != ExistingRecord::None);
        resume_from(earlier, &mut record, &plan)?;
        let (record_folder, layer_folders) = (plan.layer_folders[0].clone(), plan.layer_folders.clone());
        Ok(PreparedMerge {
            env,
            policy,
            record,
            plan: Some(plan),
            child_folders,
            record_folder,
            layer_folders,
            is_recorded,
        })
    }

    /// Returns the number of bytes that the progress reaches at the end: the size of the disk, or 0 if everything is
    /// copied already.
    pub fn bytes(&self) -> u64 {
        self.plan.as_ref().map_or(0, |plan| plan.ancestor.size())
    }

    /// Runs the merge.
    ///
    /// # Errors
    /// After any error all images are valid, the contents of the disk are unchanged, and the same command continues the
    /// merge.
    /// - `Busy` if another process holds a conflicting lock on a file
    /// - `Busy`, `Refused` if a file was replaced or changed since [`PreparedMerge::prepare`]
    /// - `Invalid`, `Refused`, `NotFound` for the ancestor, a parent of the ancestor, or a child of CHILD
    /// - `NoSpace`, `Io`, `Poisoned`
    /// - errors of `progress`
    pub fn run(mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let done = self.run_steps(progress);
        done.map_err(|e| match self.is_recorded {
            false => e,
            true => {
                let what =
                    "not finished; all images are valid. Run the same command again to continue, or add --abandon to give it up";
                Error::new(e.kind(), what).caused_by(e)
            }
        })
    }

    fn run_steps(&mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let path = self.record.folder.join(&self.record.ancestor_path);
        if self.is_recorded {
            // The next steps require a durable merge record, but a killed run may not have synced the folder of the
            // record.
            self.record_folder.sync()?;
        }
        // `plan` keeps the locks until this function returns.
        let plan = self.plan.take();
        let (copied, file) = match &plan {
            Some(plan) => self.copy_layers(plan, &path, progress)?,
            None => {
                let file = self.env.open(&path, Access::Read)?;
                file.lock(Lock::Shared)?;
                if FileStamp::of(&file)? != self.record.ancestor_stamp {
                    return Err(Error::new(ErrorKind::Busy, "it changed while it was being opened").at_path(path));
                }
                (0, file)
            }
        };
        let ancestor = self.check_ancestor(Image::open(file)?)?;
        unmark_receiver(ancestor.file())?;
        failpoint::reached("merge.receiver-unmarked");
        let relinked = self.relink_children(&ancestor, plan.as_ref().map_or(&[], |plan| &plan.children))?;
        let removed = self.remove_layers()?;
        self.record.remove(&self.record_folder)?;
        Ok(Merged { ancestor: path, copied, relinked, removed })
    }

    fn check_ancestor(&self, image: Image) -> Result<Image> {
        if image.uuid() == self.record.ancestor {
            return Ok(image);
        }
        let what = format!("another image has this name now: it should be {}", self.record.ancestor);
        Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
    }

    /// Runs steps 1 to 4, except the removal of the mark. Returns the number of copied bytes, and the file of the
    /// ancestor with its lock.
    fn copy_layers(&mut self, plan: &MergePlan, path: &Path, progress: &mut Progress<'_>) -> Result<(u64, File)> {
        // Parents of the ancestor are accepted in the same folders as parents of CHILD.
        let mut policy = self.policy.clone();
        policy.allowed.push(self.record.folder.clone());
        let ancestor = plan.ancestor.file();
        let file = ancestor.folder().open(ancestor.name(), Access::Write)?;
        file.lock(Lock::Exclusive)?;
        // The file stamps are compared before the ancestor is opened for writing, because recovery changes the file
        // stamp.
        if FileStamp::of(&file)? != self.record.ancestor_stamp && self.record.copied != Copied::Nothing {
            self.record.copied = Copied::Before(0);
        }
        let chain = Chain::from_image(self.env, Image::open(file.clone())?, &policy, OpenMode::Write)?;
        let mut writer = ImageWriter::open(self.env, chain, &Durability::FlushOnly)?;
        let (image, seen) = (writer.top().image.image(), plan.ancestor.file().stat()?.id);
        if image.uuid() != self.record.ancestor || file.stat()?.id != seen || image.size() != plan.ancestor.size() {
            return Err(Error::new(ErrorKind::Busy, "it changed while it was being opened").at_path(path));
        }
        let from = match self.record.copied {
            Copied::Nothing => 0,
            Copied::Before(sector) => sector,
            Copied::All => unreachable!("a complete copy has no plan"),
        };
        let blocks = plan.layers.new_blocks(image)?;
        let has_room = plan.layers.check_space(blocks, image);
        let begun = has_room.and_then(|()| writer.grow_for(blocks)).and_then(|()| {
            failpoint::reached("merge.room-made");
            writer.top().image.restore_mtime()?;
            self.record.ancestor_stamp = FileStamp::of(&file)?;
            self.record.save(&self.record_folder)
        });
        if let Err(e) = begun {
            return writer.finish(Err(e));
        }
        self.is_recorded = true;
        failpoint::reached("merge.begun");
        if let Err(e) = self.mark_ancestor(&file) {
            return writer.finish(Err(e));
        }

        let every = (writer.version().sectors() * SECTOR / 4).clamp(1, CHECKPOINT_BYTES);
        let mut done = from;
        let copied = plan.layers.copy(from, &mut writer, &mut |writer, sector| {
            done = sector;
            if writer.uncommitted() >= every {
                writer.commit()?;
                failpoint::reached("merge.committed");
                self.checkpoint(sector, &file)?;
                failpoint::reached("merge.noted");
            }
            progress(sector * SECTOR)
        });
        match copied {
            Ok(copied) => {
                writer.commit()?;
                failpoint::reached("merge.copied");
                writer.close()?;
                failpoint::reached("merge.closed");
                self.record.copied = Copied::All;
                self.record.ancestor_stamp = FileStamp::after_sync(&file)?;
                self.record.save(&self.record_folder)?;
                failpoint::reached("merge.marked");
                Ok((copied, file))
            }
            Err(e) => {
                // The ancestor is committed and closed, so that the next run continues after the copied part.
                log_secondary_error(
                    writer.commit().and_then(|()| writer.close()).and_then(|()| self.checkpoint(done, &file)),
                );
                Err(e)
            }
        }
    }

    /// Marks the ancestor as partly overwritten and saves in the merge record that copying has begun. The mark and the
    /// record are durable before the first byte is copied.
    fn mark_ancestor(&mut self, ancestor: &File) -> Result<()> {
        let child = self.record.layers[0].uuid;
        if receiver_mark(ancestor)?.is_none_or(|(uuid, _)| uuid != child) {
            match mark_receiver(ancestor, child, &self.record.child()) {
                // Without a mark, the merge record shows that the ancestor is partly overwritten, if the record and the
                // ancestor are in the same folder.
                Err(e) if self.record.ancestor_path.components().count() == 1 => log::info!("{}", e.line()),
                Err(e) => log::warn!("{}; do not open the image by itself until the merge is finished", e.line()),
                Ok(()) => {}
            }
        }
        failpoint::reached("merge.receiver-marked");
        if self.record.copied == Copied::Nothing {
            self.record.copied = Copied::Before(0);
            self.record.save(&self.record_folder)?;
        }
        failpoint::reached("merge.copying");
        Ok(())
    }

    /// Saves durably in the merge record that everything before `sector` is copied. If the file system is full, the
    /// previous merge record remains valid, and no error is returned.
    fn checkpoint(&mut self, sector: u64, ancestor: &File) -> Result<()> {
        self.record.copied = Copied::Before(sector);
        self.record.ancestor_stamp = FileStamp::of(ancestor)?;
        match self.record.save(&self.record_folder) {
            Err(e) if e.kind() == ErrorKind::NoSpace => Ok(()),
            saved => saved,
        }
    }

    /// Runs step 5: links the children of CHILD to the ancestor, including children that were created after
    /// [`PreparedMerge::prepare`]. If an interrupted run has linked a child only partly, completes the link, unless
    /// another process has the child open.
    fn relink_children(&self, ancestor: &Image, locked: &[(FileId, File)]) -> Result<Vec<PathBuf>> {
        let mut relinked = Vec::new();
        for child in folder_scan::scan(self.env, &self.child_folders)? {
            let is_layer = self.record.layers.iter().any(|layer| layer.uuid == child.identity.uuid);
            let is_linked = child.identity.parent == Some(ancestor.uuid());
            if is_layer || !(is_linked || child.identity.parent == Some(self.record.layers[0].uuid)) {
                continue;
            }
            if is_linked && is_reparent_finished(&Image::open(child.open(Access::Read)?)?) {
                continue;
            }
            let file = match locked.iter().find(|(id, _)| *id == child.id) {
                Some((_, file)) => file.clone(),
                None => {
                    let file = child.open(Access::Write)?;
                    match file.lock(Lock::Exclusive) {
                        Err(e) if is_linked && e.kind() == ErrorKind::Busy => continue,
                        locked => locked?,
                    }
                    file
                }
            };
            let image = Image::open(file.clone())?;
            refuse_if_live(self.env, &self.policy.runtime, &image)?;
            record_child(self.env, ancestor, &child.path);
            let link = replacement_link(self.env, &image, ancestor, Locators::Relative)?;
            SavedMtime::preserve(&file, || reparent(self.env, &file, Some(&link)))?;
            failpoint::reached("merge.child-relinked");
            relinked.push(child.path);
        }
        failpoint::reached("merge.relinked");
        Ok(relinked)
    }

    /// Runs step 6: removes the layers, youngest first.
    fn remove_layers(&self) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        for (layer, folder) in self.record.layers.iter().zip(&self.layer_folders) {
            let path = self.record.folder.join(&layer.path);
            let name = file_name(&path)?;
            let file = match folder.open(name, Access::Read) {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    // An interrupted run may have removed this layer without a sync of the folder.
                    folder.sync()?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            if ImageIdentity::peek(&file)?.map(|identity| identity.uuid) != Some(layer.uuid) {
                log::warn!("{}: another image has this name now; it is not removed", path.display());
                continue;
            }
            file.lock(Lock::Shared)?;
            if FileStamp::of(&file)? != layer.stamp {
                let what = "it was changed after it was copied; it is not removed";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            folder.remove(name)?;
            failpoint::reached("merge.layer-removed");
            // The removal of a layer is synced before its parent is removed. Otherwise a crash could undo the removal
            // of the layer, but not that of its parent.
            folder.sync()?;
            failpoint::reached("merge.layer-gone");
            removed.push(path);
        }
        Ok(removed)
    }
}
