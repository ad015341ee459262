//! Opening a chain: the youngest image and all its parents, down to the root.

use std::path::Path;
use std::sync::Arc;

use super::frozen::{Frozen, Layer};
use super::parents::{Policy, Search};
use super::top::Top;
use super::version::Version;
use crate::error::Result;
use crate::format::DiskType;
use crate::image::{Image, Writable};
use crate::storage::{Access, Env, Lock, Slot};
use crate::units::SECTOR;

/// The images of a disk, youngest first; at least one. The last one is a root.
#[derive(Debug)]
pub struct Chain {
    images: Vec<Image>,
}

impl Chain {
    /// Opens the image at `path`, for reading or writing, and its parents, for reading.
    ///
    /// # Errors
    /// Whatever is wrong with any of the files, naming it; `NotFound` for a parent that is in none of its places.
    pub fn open(env: &dyn Env, path: &Path, policy: &Policy, access: Access) -> Result<Chain> {
        let youngest = Image::open(env.open(path, access)?)?;
        Chain::of(env, youngest, policy)
    }

    /// The chain of an image that is open already.
    ///
    /// # Errors
    /// As `open`.
    pub fn of(env: &dyn Env, youngest: Image, policy: &Policy) -> Result<Chain> {
        let mut search = Search::new(env, youngest.file().path(), policy)?;
        search.pass(&youngest)?;
        let mut images = vec![youngest];
        while let Some(child) = images.last().filter(|image| image.kind() == DiskType::Differencing) {
            let parent = search.parent_of(child)?;
            search.pass(&parent)?;
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
        Ok(Chain { images })
    }

    /// The images, youngest first.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The image that was asked for.
    pub fn youngest(&self) -> &Image {
        &self.images[0]
    }

    /// Takes the locks and makes the map: writable with the youngest image as top, or all of it frozen.
    ///
    /// # Errors
    /// `Busy` where somebody else has one of the files open in a way that does not go with ours; `Refused` where the
    /// youngest image forbids writing; `Io`.
    pub fn into_version(self, access: Access) -> Result<Version> {
        let sectors = self.youngest().size() / SECTOR;
        let mut layers = Vec::with_capacity(self.images.len());
        let mut top = None;
        for (number, image) in (0..).zip(self.images) {
            let slot = Slot(number);
            if number == 0 && access == Access::Write {
                top = Some(Top { slot, image: Arc::new(Writable::new(image)?) });
            } else {
                image.file().lock(Lock::Shared)?;
                layers.push(Layer { slot, image });
            }
        }
        Ok(Version::new(top, Frozen::new(layers), sectors))
    }
}
