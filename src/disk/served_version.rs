//! A version of the chain as lanes serve it: the layers, the number of the version, and the attributes of its files.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use super::file_table::{FileTable, ServedFile};
use crate::chain::{Layer, Top, Version};
use crate::image::Writable;
use crate::storage::FileSlot;

/// A version of the chain as lanes serve it. It never changes.
pub struct ServedVersion {
    epoch: u32,
    version: Version,
    files: FileTable,
}

impl ServedVersion {
    pub(super) fn new(epoch: u32, version: Version, files: FileTable) -> ServedVersion {
        ServedVersion { epoch, version, files }
    }

    /// The number of the version. It increases by one with each version of the disk.
    #[inline]
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The attributes of a file.
    #[inline]
    pub(super) fn served_file(&self, slot: FileSlot) -> &ServedFile {
        self.files.get(slot)
    }

    /// Creates the next version: the same layers, with the top in the free slot `slot`.
    pub(super) fn with_top_slot(&self, slot: FileSlot) -> ServedVersion {
        let files = self.files.with_copy(self.writable_top().slot, slot);
        ServedVersion { epoch: self.epoch + 1, version: self.version.with_top_slot(slot), files }
    }

    /// Creates the next version, with the file of the top opened again as `image` after its structure has changed.
    pub(super) fn with_top_image(&self, image: Arc<Writable>) -> ServedVersion {
        let version = self.version.with_top_image(image);
        ServedVersion { epoch: self.epoch + 1, version, files: self.files.clone() }
    }

    /// Creates the next version, with the new child `top` over the old top, which is sealed.
    pub(super) fn with_child(&self, top: Top, file: ServedFile) -> ServedVersion {
        let files = self.files.with(top.slot, file);
        ServedVersion { epoch: self.epoch + 1, version: self.version.with_child(top), files }
    }

    /// Creates the next version, in which the sealed layer, which is committed, is a frozen layer. `layer` is the
    /// sealed layer, opened again.
    pub(super) fn with_sealed_frozen(&self, layer: Layer) -> ServedVersion {
        let version = self.version.with_sealed_frozen(layer);
        ServedVersion { epoch: self.epoch + 1, version, files: self.files.clone() }
    }

    /// The writable layer. A read-only disk refuses writes, commits and changes before they call this function.
    ///
    /// # Panics
    /// If the disk is read-only.
    #[inline]
    pub(super) fn writable_top(&self) -> &Top {
        self.version.top().expect("only a writable disk writes, commits or grows")
    }

    /// Path of the image that takes the writes.
    ///
    /// # Panics
    /// If the disk is read-only.
    pub(super) fn top_path(&self) -> &Path {
        self.writable_top().image.path()
    }
}

impl Deref for ServedVersion {
    type Target = Version;

    #[inline]
    fn deref(&self) -> &Version {
        &self.version
    }
}
