//! The steps of a merge, and the state between preparing and running it.

use std::path::{Path, PathBuf};

use super::plan::{MergePlan, plan_merge};
use super::resume::{check_same_merge, is_copy_complete, resume_from, uuid_at};
use crate::chain::{
    Chain, Copied, ExistingRecord, FileStamp, MergeRecord, OpenMode, Policy, mark_receiver, receiver_mark,
    record_child, relative_path, unmark_receiver,
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

/// Bytes of the disk between two notes of progress: a quarter of it, but no more than this.
const CHECKPOINT_BYTES: u64 = 512 << 20;

/// What one start of a merge did; one that was ended before it may have done the rest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merged {
    /// The image that has received.
    pub ancestor: PathBuf,
    /// Bytes of data that were copied by this start.
    pub copied: u64,
    /// Children that this start linked to the ancestor.
    pub relinked: Vec<PathBuf>,
    /// Images that this start removed.
    pub removed: Vec<PathBuf>,
}

/// A merge that may be done; nothing is changed yet.
pub struct PreparedMerge<'a> {
    env: &'a dyn Env,
    policy: Policy,
    record: MergeRecord,
    /// What is to be copied; none where all is.
    plan: Option<MergePlan>,
    /// Where children of CHILD may be.
    child_folders: Vec<Folder>,
    /// The note's folder, and that of each layer: what is removed is removed there, wherever their paths lead by then.
    record_folder: Folder,
    layer_folders: Vec<Folder>,
    /// Whether the note is there.
    is_recorded: bool,
}

impl<'a> PreparedMerge<'a> {
    /// Looks at the image at `child` and its chain, and at who else lives on it; takes the locks. Where a merge of it was
    /// begun, it goes on with that: `child` may be gone by then. With `changed_parent` parents may have been written to
    /// since their children recorded their times.
    ///
    /// # Errors
    /// Whatever is wrong with a file of the chain; `Busy` where somebody has one open in a way that does not go with
    /// ours; `Refused` where another child would change, where the sizes do not fit, where another merge of it was
    /// begun, or where a parent was written to.
    pub fn prepare(
        env: &'a dyn Env,
        child: &Path,
        into: Option<&Path>,
        changed_parent: bool,
        policy: &Policy,
    ) -> Result<PreparedMerge<'a>> {
        // The file a link leads to is what is folded and removed.
        let child = &env.canonical(child).unwrap_or_else(|_| child.to_path_buf());
        let present = uuid_at(env, child)?;
        let earlier = MergeRecord::find(env, child, present)?;
        let mut policy = policy.clone();
        policy.merging = present;
        if let ExistingRecord::Record(record) = &earlier {
            check_same_merge(env, record, child, into)?;
            policy.merging = Some(record.layers[0].uuid);
            if record.copied == Copied::All && is_copy_complete(env, record, present.is_some())? {
                let home = env.folder(&record.folder)?.absolute()?;
                let place = |path: &Path| env.folder(folder_of(&record.folder.join(path)))?.absolute();
                let places = record.layers.iter().map(|layer| place(&layer.path)).collect::<Result<Vec<_>>>()?;
                let own = [home.clone(), place(&record.ancestor_path)?];
                let folders = folder_scan::folders_to_scan(
                    env,
                    own.into_iter().chain(places.iter().cloned()).map(Ok),
                    &policy.allowed,
                )?;
                let record = MergeRecord::clone(record);
                return Ok(PreparedMerge {
                    env,
                    policy,
                    record,
                    plan: None,
                    child_folders: folders,
                    record_folder: home,
                    layer_folders: places,
                    is_recorded: true,
                });
            }
        }
        let survey = plan_merge(env, child, into, changed_parent, &policy)?;
        let folder = env.canonical(folder_of(child))?;
        let ancestor_path = relative_path(&folder, &env.canonical(survey.ancestor.file().path())?);
        let mut record = MergeRecord {
            folder,
            layers: survey.merged_layers.clone(),
            ancestor: survey.ancestor.uuid(),
            ancestor_path,
            // It is looked at again under the lock.
            ancestor_stamp: FileStamp::of(survey.ancestor.file())?,
            copied: Copied::Nothing,
            abandoned: false,
        };
        let (folders, begun) = (survey.child_folders.clone(), earlier != ExistingRecord::None);
        resume_from(earlier, &mut record, &survey)?;
        let (home, places) = (survey.layer_folders[0].clone(), survey.layer_folders.clone());
        Ok(PreparedMerge {
            env,
            policy,
            record,
            plan: Some(survey),
            child_folders: folders,
            record_folder: home,
            layer_folders: places,
            is_recorded: begun,
        })
    }

    /// Bytes of the disk, which is what progress is told of; none where only names and links are left to do.
    pub fn bytes(&self) -> u64 {
        self.plan.as_ref().map_or(0, |survey| survey.ancestor.size())
    }

    /// Does it.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`, `Busy`; what `progress` fails with. All images are valid and the disk is the same;
    /// the same command goes on.
    pub fn run(mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let done = self.run_steps(progress);
        done.map_err(|e| match self.is_recorded {
            false => e,
            true => {
                let what =
                    "not finished; all images are valid. Run the same command again to continue, or add --abandon";
                Error::new(e.kind(), what).caused_by(e)
            }
        })
    }

    fn run_steps(&mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let path = self.record.folder.join(&self.record.ancestor_path);
        if self.is_recorded {
            // A killed start may have left its note in memory alone, and what follows builds on it.
            self.record_folder.sync()?;
        }
        // Holds the locks to the end.
        let survey = self.plan.take();
        let (copied, file) = match &survey {
            Some(survey) => self.copy_layers(survey, &path, progress)?,
            None => {
                let file = self.env.open(&path, Access::Read)?;
                file.lock(Lock::Shared)?;
                if FileStamp::of(&file)? != self.record.ancestor_stamp {
                    return Err(Error::new(ErrorKind::Busy, "it changed while it was looked at").at_path(path));
                }
                (0, file)
            }
        };
        let ancestor = self.check_ancestor(Image::open(file)?)?;
        unmark_receiver(ancestor.file())?;
        failpoint::reached("merge.receiver-unmarked");
        let relinked = self.relink_children(&ancestor, survey.as_ref().map_or(&[], |survey| &survey.children))?;
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

    /// Steps 1 to 4. The ancestor's file stays locked as long as the one that is returned.
    fn copy_layers(&mut self, survey: &MergePlan, path: &Path, progress: &mut Progress<'_>) -> Result<(u64, File)> {
        // The ancestor's own parents may lie wherever the child's chain may.
        let mut policy = self.policy.clone();
        policy.allowed.push(self.record.folder.clone());
        let ancestor = survey.ancestor.file();
        let file = ancestor.folder().open(ancestor.name(), Access::Write)?;
        file.lock(Lock::Exclusive)?;
        // Before it is opened as an image, which may recover it.
        if FileStamp::of(&file)? != self.record.ancestor_stamp && self.record.copied != Copied::Nothing {
            self.record.copied = Copied::Before(0);
        }
        let chain = Chain::from_image(self.env, Image::open(file.clone())?, &policy, OpenMode::Write)?;
        let mut writer = ImageWriter::open(self.env, chain, &Durability::FlushOnly)?;
        let (image, seen) = (writer.top().image.image(), survey.ancestor.file().stat()?.id);
        if image.uuid() != self.record.ancestor || file.stat()?.id != seen || image.size() != survey.ancestor.size() {
            return Err(Error::new(ErrorKind::Busy, "it changed while it was looked at").at_path(path));
        }
        let from = match self.record.copied {
            Copied::Nothing => 0,
            Copied::Before(sector) => sector,
            Copied::All => unreachable!("then nothing is copied"),
        };
        let blocks = survey.layers.new_blocks(image)?;
        let has_room = survey.layers.check_space(blocks, image);
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
        let copied = survey.layers.copy(from, &mut writer, &mut |writer, sector| {
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
                // What is copied stays copied, and the ancestor is left as an image at rest.
                log_secondary_error(
                    writer.commit().and_then(|()| writer.close()).and_then(|()| self.checkpoint(done, &file)),
                );
                Err(e)
            }
        }
    }

    /// Marks the ancestor as partly overwritten, and then records that copying has begun: durable before the first byte.
    fn mark_ancestor(&mut self, ancestor: &File) -> Result<()> {
        let child = self.record.layers[0].uuid;
        if receiver_mark(ancestor)?.is_none_or(|(uuid, _)| uuid != child) {
            match mark_receiver(ancestor, child, &self.record.child()) {
                // Then the record alone shows it, if it lies in the same folder.
                Err(e) if self.record.ancestor_path.components().count() == 1 => log::info!("{}", e.line()),
                Err(e) => log::warn!("{}; do not open the image by itself before the merge is finished", e.line()),
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

    /// Notes that all before a sector is copied, durably. Where there is no room for a note, the last one still holds.
    fn checkpoint(&mut self, sector: u64, ancestor: &File) -> Result<()> {
        self.record.copied = Copied::Before(sector);
        self.record.ancestor_stamp = FileStamp::of(ancestor)?;
        match self.record.save(&self.record_folder) {
            Err(e) if e.kind() == ErrorKind::NoSpace => Ok(()),
            saved => saved,
        }
    }

    /// Step 5: CHILD's children, those that were found at first and any that came since. And those that are the
    /// ancestor's already, where an earlier start was ended while it linked them: they are tidied up unless in use.
    fn relink_children(&self, ancestor: &Image, locked: &[(FileId, File)]) -> Result<Vec<PathBuf>> {
        let mut relinked = Vec::new();
        for child in folder_scan::scan(self.env, &self.child_folders)? {
            let is_folded = self.record.layers.iter().any(|layer| layer.uuid == child.identity.uuid);
            let is_linked = child.identity.parent == Some(ancestor.uuid());
            if is_folded || !(is_linked || child.identity.parent == Some(self.record.layers[0].uuid)) {
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

    /// Step 6.
    fn remove_layers(&self) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        for (layer, folder) in self.record.layers.iter().zip(&self.layer_folders) {
            let path = self.record.folder.join(&layer.path);
            let name = file_name(&path)?;
            let file = match folder.open(name, Access::Read) {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    // Whoever removed it may not have come to make that durable.
                    folder.sync()?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            if ImageIdentity::peek(&file)?.map(|glance| glance.uuid) != Some(layer.uuid) {
                log::warn!("{}: another image has this name now; it stays", path.display());
                continue;
            }
            file.lock(Lock::Shared)?;
            if FileStamp::of(&file)? != layer.stamp {
                let what = "it was changed since it was copied; it stays";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            folder.remove(name)?;
            failpoint::reached("merge.layer-removed");
            // Before its parent goes, lest it come back without one.
            folder.sync()?;
            failpoint::reached("merge.layer-gone");
            removed.push(path);
        }
        Ok(removed)
    }
}
