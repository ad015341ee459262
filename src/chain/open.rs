//! Opening a chain: the youngest image and all its parents, down to the root.

use std::path::Path;
use std::sync::Arc;

use super::frozen::{Frozen, Layer};
use super::open_mode::OpenMode;
use super::parent_lookup::ParentLookup;
use super::parent_time;
use super::parents::{ParentSearch, Policy};
use super::top::Top;
use super::unfinished_merge::check_chain;
use super::version::Version;
use crate::error::{Error, Result};
use crate::format::{Defect, DiskType, Severity};
use crate::image::refuse_if_live;
use crate::image::{Durability, Image, Writable};
use crate::mutant::{self, Mutant};
use crate::storage::{Access, Env, FileSlot, Lock};
use crate::units::SECTOR;

/// The images of a disk, youngest first; at least one. The last one is a root.
#[derive(Debug)]
pub struct Chain {
    images: Vec<Image>,
    /// Positions of images whose parent's file is newer than they record.
    outdated: Vec<usize>,
}

impl Chain {
    /// Opens the image at `path` and its parents. Locks are taken before anything is read: while a killed predecessor's
    /// I/O can still land, its locks are still held.
    ///
    /// # Errors
    /// Whatever is wrong with any of the files, naming it; `NotFound` for a parent that is in none of its places; `Busy`
    /// where somebody has one of the files open in a way that does not go with ours; `Refused` for a file (but the one to be
    /// written) whose daemon was killed, or that is in use on another machine, and, to read, if an image is partly overwritten
    /// by a merge that was not finished and CHILD of that merge does not hide it.
    pub fn open(env: &dyn Env, path: &Path, policy: &Policy, how: OpenMode) -> Result<Chain> {
        let access = if how == OpenMode::Write { Access::Write } else { Access::Read };
        let file = env.open(path, access)?;
        match how {
            OpenMode::Inspect => {}
            OpenMode::Read | OpenMode::Salvage => file.lock(Lock::Shared)?,
            OpenMode::Write => file.lock(Lock::Exclusive)?,
        }
        Chain::from_image(env, how.open_image(file)?, policy, how)
    }

    /// The chain of an image that is open (and, for `Read` and `Write`, locked) already.
    ///
    /// # Errors
    /// As `open`.
    pub fn from_image(env: &dyn Env, youngest: Image, policy: &Policy, how: OpenMode) -> Result<Chain> {
        match Chain::until_missing(env, youngest, policy, how)? {
            (chain, None) => Ok(chain),
            (_, Some(missing)) => Err(missing),
        }
    }

    /// The chain of an image that is open already, down to the first parent that is not there or may not be opened; the
    /// error says why.
    ///
    /// # Errors
    /// As `open`, but for such parents.
    pub fn until_missing(
        env: &dyn Env,
        youngest: Image,
        policy: &Policy,
        how: OpenMode,
    ) -> Result<(Chain, Option<Error>)> {
        let mut search = ParentSearch::new(env, youngest.file(), policy, how)?;
        search.visit(&youngest)?;
        // Who writes takes the journal of the youngest in; parents are asked by everybody.
        if matches!(how, OpenMode::Read | OpenMode::Salvage) {
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
            if how != OpenMode::Inspect && !mutant::enabled(Mutant::IgnoreParentStamp) {
                refuse_if_live(env, &policy.runtime, &parent)?;
            }
            if parent.size() != child.size() {
                let (c, p) = (child.file().path().display(), parent.file().path().display());
                log::info!(
                    "{c} has {} bytes and its parent {p} has {}: beyond it is zero",
                    child.size(),
                    parent.size()
                );
            }
            images.push(parent);
        }
        if how != OpenMode::Inspect {
            images.iter().for_each(warn_of_defects);
        }
        let all: Vec<&Image> = images.iter().collect();
        let receiving = check_chain(env, &all, &policy.allowed, policy.merging, how)?;
        let mut outdated = Vec::new();
        for (number, pair) in images.windows(2).enumerate().filter(|(number, _)| !receiving.contains(&(number + 1))) {
            if let Some(defect) = parent_time::changed(&pair[0], &pair[1])? {
                parent_time::warn(&pair[0], &pair[1], &defect);
                outdated.push(number);
            }
        }
        Ok((Chain { images, outdated }, missing))
    }

    /// The images, youngest first, whose parent was written to since they recorded its time; each with that parent. What an
    /// unfinished merge of a younger image wrote to the parent does not count.
    pub fn outdated(&self) -> impl Iterator<Item = (&Image, &Image)> {
        self.outdated.iter().map(|&number| (&self.images[number], &self.images[number + 1]))
    }

    /// The images, youngest first.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The image that was asked for.
    pub fn youngest(&self) -> &Image {
        &self.images[0]
    }

    /// The whole chain as one map that is only read.
    pub fn into_frozen(self) -> Version {
        let sectors = self.youngest().size() / SECTOR;
        Version::new(None, Frozen::new(layers(0, self.images)), sectors)
    }

    /// The youngest image, and what lies beneath it as a map of its own.
    pub fn into_parts(mut self) -> (Image, Version) {
        let parents = self.images.split_off(1);
        let youngest = self.images.pop().expect("a chain has an image");
        let sectors = youngest.size() / SECTOR;
        (youngest, Version::new(None, Frozen::new(layers(0, parents)), sectors))
    }

    /// The youngest image as writable top over the others. The chain was opened to be written.
    ///
    /// # Errors
    /// As `Writable::new`.
    pub fn into_writable(mut self, env: &dyn Env, keep: &Durability) -> Result<Version> {
        let sectors = self.youngest().size() / SECTOR;
        let parents = self.images.split_off(1);
        let youngest = self.images.pop().expect("a chain has an image");
        let top = Top { slot: FileSlot(0), image: Arc::new(Writable::new(env, youngest, keep)?) };
        Ok(Version::new(Some(top), Frozen::new(layers(1, parents)), sectors))
    }
}

/// Logs one line for an image with defects that do not prevent its use.
fn warn_of_defects(image: &Image) {
    // XenServer hides every parent, which is no fault.
    let told =
        |d: &&Defect| d.severity() > Severity::Note && !matches!(d, Defect::Hidden { .. } | Defect::BlockCutOff { .. });
    let mut told = image.notes().iter().filter(told);
    let (Some(first), more) = (told.next(), told.count()) else { return };
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    log::warn!("{}: {first}{more}; see `diffdisk check`", image.file().path().display());
}

/// Images as layers whose slots are numbered from `first` on.
fn layers(first: u16, images: Vec<Image>) -> Vec<Layer> {
    (first..).zip(images).map(|(number, image)| Layer { slot: FileSlot(number), image }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, read_sector_bytes};
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn who_reads_shares_and_who_writes_does_not() {
        let rig = ChainFolder::new();
        rig.dynamic("root", 2 << 20, 100);
        rig.child("a", "root", 2 << 20, 100);
        rig.child("b", "root", 2 << 20, 100);
        let busy = |name, how| matches!(rig.chain(name, how), Err(e) if e.kind() == ErrorKind::Busy);
        let a = rig.chain("a", OpenMode::Write).unwrap();
        assert!(busy("a", OpenMode::Write) && busy("a", OpenMode::Read), "one writer, alone");
        assert!(!busy("a", OpenMode::Inspect), "headers may be looked at");
        assert!(!busy("b", OpenMode::Write), "children share their parent");
        assert!(busy("root", OpenMode::Write) && !busy("root", OpenMode::Read), "a parent does not change");
        drop(a);
        let _reader = rig.chain("a", OpenMode::Read).unwrap();
        assert!(busy("a", OpenMode::Write) && !busy("a", OpenMode::Read));
    }

    #[test]
    fn the_disk_is_as_large_as_the_youngest() {
        let rig = ChainFolder::new();
        rig.fixed("root", 50);
        rig.fill("root", &[(0, 50, 1)]);
        rig.child("larger", "root", 4 << 10, 60);
        rig.child("smaller", "larger", 4 << 10, 20);
        let version = rig.read("larger");
        assert_eq!((version.sectors(), version.depth()), (60, 2));
        assert_eq!(read_sector_bytes(&version, 45, 60), [[1; 5].as_slice(), &[0; 10]].concat());
        let version = rig.write("smaller");
        assert_eq!((version.sectors(), version.depth(), read_sector_bytes(&version, 0, 20)), (20, 3, vec![1; 20]));
    }
}
