//! Opens a chain: the youngest image and all its parents, down to the root.

use std::path::Path;
use std::sync::Arc;

use super::frozen::{Frozen, Layer};
use super::open_mode::OpenMode;
use super::parent_lookup::ParentLookup;
use super::parent_time;
use super::parents::{ParentSearch, Policy};
use super::top::Top;
use super::unfinished_merge::check_chain;
use super::unfinished_snapshot::refuse_unfinished_snapshot;
use super::version::Version;
use crate::error::{Error, Result};
use crate::format::{Defect, DiskType, Severity};
use crate::image::{Durability, Image, SavedMtime, Writable, open_reconciled, refuse_if_live};
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, FileSlot, Lock};
use crate::units::SECTOR;

/// The images of a disk, youngest first; at least one. The last one is a root, unless a parent is missing
/// ([`Chain::until_missing`]).
#[derive(Debug)]
pub struct Chain {
    images: Vec<Image>,
    /// Positions of the images whose parent's file is newer than the time that the image records.
    outdated: Vec<usize>,
}

impl Chain {
    /// Opens the image at `path` and its parents. Except in mode `Inspect`, each file is locked before it is read: the
    /// lock of a killed daemon is held as long as I/O of that daemon can still reach the file.
    ///
    /// # Errors
    /// - the errors of [`Image::open`] for any file of the chain
    /// - `NotFound` if there is no file at `path`, if a parent is at none of its recorded places, or if an allowed
    ///   folder does not exist
    /// - `Invalid` if the chain has a cycle, or one UUID twice
    /// - `Refused` if the chain has too many files, or block tables of more than 128 MiB
    /// - `Refused` if a parent lies outside the allowed folders, or if two files match its name and UUID
    /// - `Busy` if another process holds a conflicting lock on any file of the chain
    /// - `Unsupported` if a recorded path must be looked up in a subfolder and the kernel has no openat2
    /// - `Refused`, except in mode `Inspect`, if a file that is not opened for writing has a live journal, since its
    ///   daemon was killed or runs on another machine
    /// - `Refused`, except in mode `Inspect`, if an unfinished merge has partly overwritten an image, and the chain
    ///   does not contain the image CHILD of that merge, which hides the overwritten sectors
    /// - `Refused`, except in mode `Inspect`, if the newest writes may be in another image because of an unfinished
    ///   snapshot, or if the image is needed to finish the snapshot; `Invalid` if the note of the snapshot is damaged
    pub fn open(env: &dyn Env, path: &Path, policy: &Policy, mode: OpenMode) -> Result<Chain> {
        let access = if mode == OpenMode::Write { Access::Write } else { Access::Read };
        let file = env.open(path, access)?;
        match mode {
            OpenMode::Inspect => {}
            OpenMode::Read | OpenMode::Salvage => file.lock(Lock::Shared)?,
            OpenMode::Write => file.lock(Lock::Exclusive)?,
        }
        Chain::from_image(env, mode.open_image(file)?, policy, mode)
    }

    /// If a killed resize, rebase, flatten or merge left the two footers of the youngest image different, completes the
    /// change of the footers. The chain is open for writing, and nothing forbids a change of the image. An image with a
    /// live journal stays as it is: these verbs never run on such an image.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, and the errors of [`Image::open`].
    pub fn reconcile_footers(&mut self, env: &dyn Env, policy: &Policy) -> Result<()> {
        let image = &mut self.images[0];
        let is_difference = |d: &Defect| matches!(d, Defect::FootersDiffer { .. } | Defect::FooterKindsDiffer { .. });
        if image.notes().iter().any(is_difference) && refuse_if_live(env, &policy.runtime, image).is_ok() {
            let file = image.file().clone();
            *image = SavedMtime::preserve(&file, || open_reconciled(&file))?;
        }
        Ok(())
    }

    /// Opens the parents of an image that is already open and, unless `mode` is `Inspect`, locked.
    ///
    /// # Errors
    /// `Invalid`, `Unsupported`, `NotFound`, `Refused`, `Busy`, `Io`, for the reasons listed at [`Chain::open`].
    pub fn from_image(env: &dyn Env, youngest: Image, policy: &Policy, mode: OpenMode) -> Result<Chain> {
        match Chain::until_missing(env, youngest, policy, mode)? {
            (chain, None) => Ok(chain),
            (_, Some(missing)) => Err(missing),
        }
    }

    /// Opens the parents as `from_image` does, up to the first parent that is missing or that may not be opened.
    /// Returns the images above that parent, and the error of that parent; or the whole chain and `None`.
    ///
    /// # Errors
    /// `Invalid`, `Unsupported`, `NotFound`, `Refused`, `Busy`, `Io`, for the reasons listed at [`Chain::open`]. The
    /// error of a parent that is missing or may not be opened is in the returned pair instead.
    pub fn until_missing(
        env: &dyn Env,
        youngest: Image,
        policy: &Policy,
        mode: OpenMode,
    ) -> Result<(Chain, Option<Error>)> {
        let mut search = ParentSearch::new(env, youngest.file(), policy, mode)?;
        search.visit(&youngest)?;
        refuse_unfinished_snapshot(env, &youngest, mode)?;
        // In mode `Write`, the live journal of the youngest image is replayed when the image is made writable. Parents
        // are checked below in every mode except `Inspect`.
        if matches!(mode, OpenMode::Read | OpenMode::Salvage) {
            refuse_if_live(env, &policy.runtime, &youngest)?;
        }
        let (mut images, mut missing) = (vec![youngest], None);
        while let Some(child) = images.last().filter(|image| image.kind() == DiskType::Differencing) {
            let parent = match search.find_parent(child)? {
                ParentLookup::Parent(parent) => *parent,
                ParentLookup::Invalid(_, e) => return Err(e),
                ParentLookup::Refused(e) => {
                    missing = Some(e);
                    break;
                }
                ParentLookup::NotFound(defect) => {
                    let is_missing = matches!(defect, Defect::ParentMissing { .. });
                    let e = Error::from(defect).at_path(child.file().path());
                    if !is_missing {
                        return Err(e);
                    }
                    missing = Some(e);
                    break;
                }
            };
            search.visit(&parent)?;
            if mode != OpenMode::Inspect && !mutant::enabled(Mutant::IgnoreParentStamp) {
                refuse_if_live(env, &policy.runtime, &parent)?;
            }
            if parent.size() != child.size() {
                let (c, p) = (child.file().path().display(), parent.file().path().display());
                log::info!(
                    "{c} has {} bytes and its parent {p} has {}: the disk reads as zeros after the end of the parent",
                    child.size(),
                    parent.size()
                );
            }
            images.push(parent);
        }
        if mode != OpenMode::Inspect {
            images.iter().for_each(warn_of_defects);
        }
        let all: Vec<&Image> = images.iter().collect();
        let receiving = check_chain(env, &all, &policy.allowed, policy.merging, mode)?;
        let mut outdated = Vec::new();
        for (number, pair) in images.windows(2).enumerate().filter(|(number, _)| !receiving.contains(&(number + 1))) {
            if let Some(defect) = parent_time::changed(&pair[0], &pair[1])? {
                parent_time::warn(&pair[0], &pair[1], &defect);
                outdated.push(number);
            }
        }
        Ok((Chain { images, outdated }, missing))
    }

    /// The images, youngest first, that record an earlier modification time than their parent has, each with that
    /// parent. A parent that receives an unfinished merge of a younger image does not count.
    pub fn outdated(&self) -> impl Iterator<Item = (&Image, &Image)> {
        self.outdated.iter().map(|&number| (&self.images[number], &self.images[number + 1]))
    }

    /// The images, youngest first.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The youngest image of the chain.
    pub fn youngest(&self) -> &Image {
        &self.images[0]
    }

    /// Converts the chain to one read-only map.
    pub fn into_frozen(self) -> Version {
        let sectors = self.youngest().size() / SECTOR;
        Version::new(None, Frozen::new(layers(self.images)), sectors)
    }

    /// Splits the chain into the youngest image and a read-only map of its parents.
    pub fn into_parts(mut self) -> (Image, Version) {
        let parents = self.images.split_off(1);
        let youngest = self.images.pop().expect("a chain has an image");
        let sectors = youngest.size() / SECTOR;
        (youngest, Version::new(None, Frozen::new(layers(parents)), sectors))
    }

    /// Converts the chain, which was opened for writing, to a writable top over a read-only map of its parents.
    ///
    /// # Errors
    /// `Refused`, `Poisoned`, `Busy`, `NoSpace`, `Io`, for the reasons listed at [`Writable::new`].
    pub fn into_writable(mut self, env: &dyn Env, keep: &Durability) -> Result<Version> {
        let sectors = self.youngest().size() / SECTOR;
        let parents = self.images.split_off(1);
        let youngest = self.images.pop().expect("a chain has an image");
        let image = Arc::new(Writable::new(env, youngest, keep)?);
        let top = Top { slot: slot_at_depth(parents.len()), image };
        Ok(Version::new(Some(top), Frozen::new(layers(parents)), sectors))
    }
}

/// Logs one line for an image that has defects which do not prevent its use.
fn warn_of_defects(image: &Image) {
    // XenServer sets `hidden` in every parent; this is normal.
    let is_logged =
        |d: &&Defect| d.severity() > Severity::Note && !matches!(d, Defect::Hidden { .. } | Defect::BlockCutOff { .. });
    let mut logged = image.notes().iter().filter(is_logged);
    let (Some(first), more) = (logged.next(), logged.count()) else { return };
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    log::warn!("{}: {first}{more}; see `diffdisk check`", image.file().path().display());
}

/// Assigns file slots to images, youngest first. The root has slot 0, so a new top leaves the slots of all other layers
/// as they are, and the cells that [`Frozen`] has cached stay valid.
fn layers(images: Vec<Image>) -> Vec<Layer> {
    let last = images.len().saturating_sub(1);
    let slots = (0..images.len()).map(|index| slot_at_depth(last - index));
    slots.zip(images).map(|(slot, image)| Layer { slot, image: Arc::new(image) }).collect()
}

/// The file slot of the image that stands on `parents` other images.
fn slot_at_depth(parents: usize) -> FileSlot {
    FileSlot(u16::try_from(parents).expect("a chain is limited to fewer files than slots"))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, read_sector_bytes};
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn readers_share_files_and_writers_do_not() {
        let chains = ChainFolder::new();
        chains.dynamic("root", 2 << 20, 100);
        chains.child("a", "root", 2 << 20, 100);
        chains.child("b", "root", 2 << 20, 100);
        let busy = |name, mode| matches!(chains.chain(name, mode), Err(e) if e.kind() == ErrorKind::Busy);
        let a = chains.chain("a", OpenMode::Write).unwrap();
        assert!(busy("a", OpenMode::Write) && busy("a", OpenMode::Read), "a writer excludes all others");
        assert!(!busy("a", OpenMode::Inspect), "headers may be read");
        assert!(!busy("b", OpenMode::Write), "children share their parent");
        assert!(busy("root", OpenMode::Write) && !busy("root", OpenMode::Read), "a parent may be read but not written");
        drop(a);
        let _reader = chains.chain("a", OpenMode::Read).unwrap();
        assert!(busy("a", OpenMode::Write) && !busy("a", OpenMode::Read));
    }

    #[test]
    fn the_disk_has_the_size_of_the_youngest_image() {
        let chains = ChainFolder::new();
        chains.fixed("root", 50);
        chains.fill("root", &[(0, 50, 1)]);
        chains.child("larger", "root", 4 << 10, 60);
        chains.child("smaller", "larger", 4 << 10, 20);
        let version = chains.read("larger");
        assert_eq!((version.sectors(), version.depth()), (60, 2));
        assert_eq!(read_sector_bytes(&version, 45, 60), [[1; 5].as_slice(), &[0; 10]].concat());
        let version = chains.write("smaller");
        assert_eq!((version.sectors(), version.depth(), read_sector_bytes(&version, 0, 20)), (20, 3, vec![1; 20]));
    }
}
