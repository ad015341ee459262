//! How a file system gives room to a file, and how much it has left.

/// What a file system promises about room: whether a page that was reserved can be written when nothing else can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocationMode {
    /// A write that finds no room is refused by the call, and a page that has room keeps it: ext4, XFS, tmpfs, and btrfs
    /// for files without copy on write.
    InPlace,
    /// A write that finds no room is refused by the call, but a write over old bytes takes new room, too: btrfs.
    CopyOnWrite,
    /// Nothing is known of the file system.
    Unknown,
}

/// The room of a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystemSpace {
    /// Bytes that an unprivileged user may still take.
    pub available: u64,
    /// Bytes in all.
    pub total: u64,
}
