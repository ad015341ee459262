//! A version of the disk: Top over Frozen. What queues hold while they plan; structure changes only by a new version.

use super::frozen::Frozen;
use super::top::Top;
use crate::storage::{File, FileSlot};

/// The layers of a disk at one moment.
pub struct Version {
    top: Option<Top>,
    frozen: Frozen,
    sectors: u64,
}

impl Version {
    /// A disk of `sectors`: what `top` has, else what `frozen` has. Without a top it is read-only.
    pub fn new(top: Option<Top>, frozen: Frozen, sectors: u64) -> Version {
        Version { top, frozen, sectors }
    }

    /// The writable layer; `None` on a read-only disk.
    #[inline]
    pub fn top(&self) -> Option<&Top> {
        self.top.as_ref()
    }

    /// Everything beneath the top.
    #[inline]
    pub fn frozen(&self) -> &Frozen {
        &self.frozen
    }

    /// Sectors that the guest sees: those of the youngest layer.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Files in the chain.
    pub fn depth(&self) -> usize {
        self.files().count()
    }

    /// The files, youngest first, with their places in the engines' tables.
    pub fn files(&self) -> impl Iterator<Item = (FileSlot, &File)> {
        let top = self.top.iter().map(|t| (t.slot, t.image.file()));
        top.chain(self.frozen.layers().iter().map(|l| (l.slot, l.image.file())))
    }

    /// The file at a slot of this version.
    pub fn file(&self, slot: FileSlot) -> &File {
        self.files().find(|(s, _)| *s == slot).map(|(_, f)| f).expect("a slot of this version")
    }
}
