//! Space of Linux file systems: how they allocate it, and how much is left.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::IFlags;
use rustix::io::Errno;

use super::file::HostFile;
use crate::error::{Error, Result};
use crate::storage::backend::FileBackend;
use crate::storage::types::{AllocationMode, FileSystemSpace};

impl HostFile {
    pub(super) fn allocation_mode(&self) -> AllocationMode {
        allocation_mode(self.as_fd())
    }

    pub(super) fn disable_copy_on_write(&self) -> Result<()> {
        let failed = |e: Errno| Error::io("cannot disable copy on write", e.into()).at_path(self.path());
        disable_copy_on_write(self.as_fd()).map_err(failed)
    }

    pub(super) fn file_system_space(&self) -> Result<FileSystemSpace> {
        let failed = |e: Errno| Error::io("cannot read the space of the file system", e.into()).at_path(self.path());
        file_system_space(self.as_fd()).map_err(failed)
    }
}

/// Returns whether a file is on btrfs.
fn is_btrfs(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(fd)?.f_type == libc::BTRFS_SUPER_MAGIC)
}

/// Returns how the file system allocates space for a file: `Unknown`, unless `tests/host/disk_full.rs` tests the file
/// system.
fn allocation_mode(fd: BorrowedFd<'_>) -> AllocationMode {
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

/// Returns whether a btrfs file system has data and metadata in the same block groups (`mkfs.btrfs --mixed`), or this
/// cannot be determined. In mixed block groups metadata may take the space that was reserved for a write, and the
/// written data is lost at the sync.
fn is_mixed(fd: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstatvfs(fd) else { return true };
    let folders = fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten().map(|entry| entry.path());
    let folder = folders.into_iter().find(|folder| is_folder_of(folder, stat.f_fsid));
    folder.is_none_or(|folder| folder.join("allocation/mixed").exists())
}

/// Returns whether a folder of `/sys/fs/btrfs` belongs to the file system with this id. Linux computes the lower half
/// of the id from the first and third word of the UUID (`btrfs_statfs`).
fn is_folder_of(folder: &Path, id: u64) -> bool {
    let uuid = folder.file_name().and_then(|name| uuid::Uuid::parse_str(name.to_str()?).ok());
    uuid.is_some_and(|uuid| {
        let bits = uuid.as_u128();
        (bits >> 96 ^ bits >> 32) & u128::from(u32::MAX) == u128::from(id) & u128::from(u32::MAX)
    })
}

/// Disables copy on write for an empty file, if its file system has it (btrfs).
fn disable_copy_on_write(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if !is_btrfs(fd)? {
        return Ok(());
    }
    let flags = rustix::fs::ioctl_getflags(fd)?;
    rustix::fs::ioctl_setflags(fd, flags | IFlags::NOCOW)
}

/// Returns the space of a file's file system.
fn file_system_space(fd: BorrowedFd<'_>) -> Result<FileSystemSpace, Errno> {
    let s = rustix::fs::fstatvfs(fd)?;
    let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
    Ok(FileSystemSpace { available: bytes(s.f_bavail), total: bytes(s.f_blocks) })
}
