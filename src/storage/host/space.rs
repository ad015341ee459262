//! Room on the file systems of Linux: which promises they make, and what they have left.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::IFlags;
use rustix::io::Errno;

use super::HostFile;
use crate::error::{Error, Result};
use crate::storage::space::{AllocationMode, FileSystemSpace};

impl HostFile {
    /// See [`File::room_rule`](crate::storage::File::allocation_mode).
    pub fn allocation_mode(&self) -> AllocationMode {
        rule(self.as_fd())
    }

    /// See [`File::overwrite_in_place`](crate::storage::File::disable_copy_on_write).
    pub fn disable_copy_on_write(&self) -> Result<()> {
        let failed = |e: Errno| Error::io("cannot switch copy on write off", e.into()).at_path(self.path());
        overwrite_in_place(self.as_fd()).map_err(failed)
    }

    /// See [`File::host_room`](crate::storage::File::file_system_space).
    pub fn file_system_space(&self) -> Result<FileSystemSpace> {
        let failed = |e: Errno| Error::io("cannot ask for the room of the file system", e.into()).at_path(self.path());
        room(self.as_fd()).map_err(failed)
    }
}

/// Whether a file lies on btrfs.
fn is_btrfs(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(fd)?.f_type == libc::BTRFS_SUPER_MAGIC)
}

/// What the file system of a file promises about room. Only file systems that were filled by the tests are known
/// (`tests/host/disk_full.rs`).
fn rule(fd: BorrowedFd<'_>) -> AllocationMode {
    match rustix::fs::fstatfs(fd).map(|s| s.f_type) {
        Ok(libc::EXT4_SUPER_MAGIC | libc::XFS_SUPER_MAGIC | libc::TMPFS_MAGIC) => AllocationMode::InPlace,
        Ok(libc::BTRFS_SUPER_MAGIC) if is_mixed(fd) => AllocationMode::Unknown,
        Ok(libc::BTRFS_SUPER_MAGIC) => match rustix::fs::ioctl_getflags(fd) {
            Ok(flags) if flags.contains(IFlags::NOCOW) => AllocationMode::InPlace,
            _ => AllocationMode::CopyOnWrite,
        },
        _ => AllocationMode::Unknown,
    }
}

/// Whether a btrfs keeps data and metadata in the same block groups (`mkfs.btrfs --mixed`), or cannot be asked. Metadata may
/// then take the room that a write has been promised, and the write is lost at the sync.
fn is_mixed(fd: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstatvfs(fd) else { return true };
    let folders = fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten().map(|entry| entry.path());
    let found = folders.into_iter().find(|folder| is_of(folder, stat.f_fsid));
    found.is_none_or(|folder| folder.join("allocation/mixed").exists())
}

/// Whether a folder of `/sys/fs/btrfs` belongs to the file system with this id, whose lower half Linux makes of the first and
/// the third word of the UUID (`btrfs_statfs`).
fn is_of(folder: &Path, id: u64) -> bool {
    let uuid = folder.file_name().and_then(|name| uuid::Uuid::parse_str(name.to_str()?).ok());
    uuid.is_some_and(|uuid| {
        let bits = uuid.as_u128();
        (bits >> 96 ^ bits >> 32) & u128::from(u32::MAX) == u128::from(id) & u128::from(u32::MAX)
    })
}

/// Switches copy on write off for an empty file, if its file system has it (btrfs).
fn overwrite_in_place(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if !is_btrfs(fd)? {
        return Ok(());
    }
    let flags = rustix::fs::ioctl_getflags(fd)?;
    rustix::fs::ioctl_setflags(fd, flags | IFlags::NOCOW)
}

/// What the file system of a file has left.
fn room(fd: BorrowedFd<'_>) -> Result<FileSystemSpace, Errno> {
    let s = rustix::fs::fstatvfs(fd)?;
    let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
    Ok(FileSystemSpace { available: bytes(s.f_bavail), total: bytes(s.f_blocks) })
}
