//! A version of the disk: an optional writable layer ([`Top`]) over the read-only layers ([`Frozen`]). Queues plan
//! their requests with a version. The layers of a version never change: a live operation replaces the version by
//! another one.

use std::sync::Arc;

use super::frozen::Frozen;
use super::top::Top;
use crate::storage::{File, FileSlot};

/// The layers of a disk: at most one writable top over the frozen layers. Clones share the layers.
#[derive(Clone)]
pub struct Version {
    top: Option<Top>,
    frozen: Arc<Frozen>,
    sectors: u64,
}

impl Version {
    /// Creates a disk of `sectors` sectors from `top` over `frozen`. Without a top the disk is read-only.
    pub fn new(top: Option<Top>, frozen: Frozen, sectors: u64) -> Version {
        Version { top, frozen: Arc::new(frozen), sectors }
    }

    /// Returns the same disk with its top in another file slot. The frozen layers and their cache are shared.
    #[must_use]
    pub fn with_top_slot(&self, slot: FileSlot) -> Version {
        let top = self.top.as_ref().map(|top| Top { slot, image: top.image.clone() });
        Version { top, frozen: self.frozen.clone(), sectors: self.sectors }
    }

    /// The writable layer; `None` on a read-only disk.
    #[inline]
    pub fn top(&self) -> Option<&Top> {
        self.top.as_ref()
    }

    /// All layers below the top.
    #[inline]
    pub fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// The number of sectors of the disk, as passed to [`Version::new`]. For an opened disk, that of the youngest
    /// layer.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The number of files in the chain.
    pub fn depth(&self) -> usize {
        self.files().count()
    }

    /// The files, youngest first, with their slots in the engines.
    pub fn files(&self) -> impl Iterator<Item = (FileSlot, &File)> {
        let top = self.top.iter().map(|t| (t.slot, t.image.file()));
        top.chain(self.frozen.layers().iter().map(|l| (l.slot, l.image.file())))
    }

    /// The file in a slot of this version.
    pub fn file(&self, slot: FileSlot) -> &File {
        self.files().find(|(s, _)| *s == slot).map(|(_, f)| f).expect("a slot of this version")
    }
}
