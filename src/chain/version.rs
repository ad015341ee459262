//! A version of the disk: an optional writable layer ([`Top`]) over the read-only layers ([`Frozen`]). Queues plan
//! their requests with a version. The list of layers of a version never changes: a live operation replaces the version
//! by another one.
//!
//! From the switch of a snapshot until its last step, a second [`Top`] is between the top and the frozen layers: the
//! *sealed* layer, which was the top before. The sealed layer takes no writes. It may not be committed yet, so its bits
//! are read from memory.

use std::sync::Arc;

use super::frozen::{Frozen, Layer};
use super::top::{LowerLayers, Top};
use crate::image::{Image, Writable};
use crate::storage::{File, FileSlot};
use crate::units::SECTOR;

/// The layers of a disk: an optional top, an optional sealed layer, and the frozen layers. Clones share the layers.
#[derive(Clone)]
pub struct Version {
    top: Option<Top>,
    sealed: Option<Top>,
    frozen: Arc<Frozen>,
    sectors: u64,
}

impl Version {
    /// Creates a disk of `sectors` sectors from `top` over `frozen`. Without a top the disk is read-only.
    pub fn new(top: Option<Top>, frozen: Frozen, sectors: u64) -> Version {
        Version { top, sealed: None, frozen: Arc::new(frozen), sectors }
    }

    /// Returns the same disk with its top in another file slot. The frozen layers and their cache are shared.
    #[must_use]
    pub fn with_top_slot(&self, slot: FileSlot) -> Version {
        let top = self.top.as_ref().map(|top| Top { slot, image: top.image.clone() });
        Version { top, ..self.clone() }
    }

    /// Returns the same disk with the new, empty child `top` over the old top, which is sealed. No write of the old top
    /// may be under way.
    ///
    /// # Panics
    /// If the disk is read-only, or has a sealed layer.
    #[must_use]
    pub fn with_child(&self, top: Top) -> Version {
        assert!(self.sealed.is_none() && self.top.is_some(), "a disk has at most two tops");
        Version { top: Some(top), sealed: self.top.clone(), ..self.clone() }
    }

    /// Returns the same disk with the sealed layer, which is committed, as the youngest frozen layer. `layer` is the
    /// sealed layer, opened again in the same slot.
    ///
    /// # Panics
    /// If the disk has no sealed layer in that slot.
    #[must_use]
    pub fn with_sealed_frozen(&self, layer: Layer) -> Version {
        assert!(
            self.sealed.as_ref().is_some_and(|sealed| sealed.slot == layer.slot),
            "the sealed layer keeps its slot"
        );
        Version { sealed: None, frozen: Arc::new(self.frozen.with_layer(layer)), ..self.clone() }
    }

    /// Returns the same disk with `image` in place of the image of its top: the same file, opened again after its
    /// structure has changed. The disk gets the size of `image`.
    #[must_use]
    pub fn with_top_image(&self, image: Arc<Writable>) -> Version {
        let sectors = image.image().size() / SECTOR;
        let top = self.top.as_ref().map(|top| Top { slot: top.slot, image });
        Version { top, sectors, ..self.clone() }
    }

    /// Returns the frozen layers as a read-only disk.
    #[must_use]
    pub fn frozen_disk(&self) -> Version {
        let sectors = self.frozen.sectors();
        Version { top: None, sealed: None, frozen: self.frozen.clone(), sectors }
    }

    /// The writable layer; `None` on a read-only disk.
    #[inline]
    pub fn top(&self) -> Option<&Top> {
        self.top.as_ref()
    }

    /// The sealed layer; `None` if the disk has none.
    #[inline]
    pub fn sealed(&self) -> Option<&Top> {
        self.sealed.as_ref()
    }

    /// The layers that a look-up reads below the top.
    #[inline]
    pub(super) fn lower(&self) -> LowerLayers<'_> {
        LowerLayers { sealed: self.sealed.as_ref(), frozen: &self.frozen }
    }

    /// The top or the sealed layer, by its slot.
    ///
    /// # Panics
    /// If neither has that slot.
    pub(super) fn writable_in(&self, slot: FileSlot) -> &Top {
        let mut both = self.top.iter().chain(&self.sealed);
        both.find(|top| top.slot == slot).expect("only a top has bitmap sectors of its own")
    }

    /// The frozen layers: all layers below the top and the sealed layer.
    #[inline]
    pub fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// The number of sectors of the disk. For an opened disk, that of the youngest layer.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The number of files in the chain.
    pub fn depth(&self) -> usize {
        self.files().count()
    }

    /// The images, youngest first.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        let tops = self.top.iter().chain(&self.sealed).map(|t| t.image.image());
        tops.chain(self.frozen.layers().iter().map(|l| &*l.image))
    }

    /// The files, youngest first, with their slots in the engines.
    pub fn files(&self) -> impl Iterator<Item = (FileSlot, &File)> {
        let tops = self.top.iter().chain(&self.sealed).map(|t| (t.slot, t.image.file()));
        tops.chain(self.frozen.layers().iter().map(|l| (l.slot, l.image.file())))
    }

    /// The file in a slot of this version.
    ///
    /// # Panics
    /// If the version has no file in that slot.
    pub fn file(&self, slot: FileSlot) -> &File {
        self.files().find(|(s, _)| *s == slot).map(|(_, f)| f).expect("a slot of this version")
    }
}
