//! Room on the file systems of Linux: which promises they make, and what they have left.

use std::os::fd::BorrowedFd;

use rustix::fs::IFlags;
use rustix::io::Errno;

use crate::storage::space::{HostRoom, RoomRule};

/// Whether a file lies on btrfs.
fn is_btrfs(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(fd)?.f_type == libc::BTRFS_SUPER_MAGIC)
}

/// What the file system of a file promises about room. Only file systems that were filled by the tests are known
/// (`tests/host/disk_full.rs`).
pub(super) fn rule(fd: BorrowedFd<'_>) -> RoomRule {
    match rustix::fs::fstatfs(fd).map(|s| s.f_type) {
        Ok(libc::EXT4_SUPER_MAGIC | libc::XFS_SUPER_MAGIC | libc::TMPFS_MAGIC) => RoomRule::InPlace,
        Ok(libc::BTRFS_SUPER_MAGIC) => match rustix::fs::ioctl_getflags(fd) {
            Ok(flags) if flags.contains(IFlags::NOCOW) => RoomRule::InPlace,
            _ => RoomRule::CopyOnWrite,
        },
        _ => RoomRule::Unknown,
    }
}

/// Switches copy on write off for an empty file, if its file system has it (btrfs).
pub(super) fn overwrite_in_place(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if !is_btrfs(fd)? {
        return Ok(());
    }
    let flags = rustix::fs::ioctl_getflags(fd)?;
    rustix::fs::ioctl_setflags(fd, flags | IFlags::NOCOW)
}

/// What the file system of a file has left.
pub(super) fn room(fd: BorrowedFd<'_>) -> Result<HostRoom, Errno> {
    let s = rustix::fs::fstatvfs(fd)?;
    let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
    Ok(HostRoom { available: bytes(s.f_bavail), total: bytes(s.f_blocks) })
}
