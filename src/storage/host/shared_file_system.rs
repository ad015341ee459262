//! File systems that several machines use: those of networks and clusters, and those that user space implements.

use super::file::HostFile;

/// `f_type` of these file systems (linux/magic.h, statfs(2)).
const SHARED_FILE_SYSTEMS: [u32; 15] = [
    0x0000_6969, // NFS
    0x0000_517B, // SMB
    0xFF53_4D42, // CIFS
    0xFE53_4D42, // SMB 2 and 3
    0x6573_5546, // FUSE: sshfs, GlusterFS, virtiofs and others
    0x00C3_6400, // Ceph
    0x0102_1997, // 9P
    0x5346_414F, // AFS
    0x6B41_4653, // AFS of the kernel
    0x7375_7245, // Coda
    0x0BD0_0BD0, // Lustre
    0x0116_1970, // GFS2
    0x7461_636F, // OCFS2
    0x4750_4653, // GPFS
    0x786F_4256, // shared folders of VirtualBox
];

impl HostFile {
    pub(super) fn is_on_shared_file_system(&self) -> bool {
        rustix::fs::fstatfs(self).is_ok_and(|found| is_shared(found.f_type))
    }
}

/// Returns whether `f_type` is that of a shared file system. On machines where `f_type` has 32 bits, its sign may be
/// extended.
fn is_shared(f_type: impl TryInto<i64>) -> bool {
    let Ok(f_type) = f_type.try_into() else { return false };
    SHARED_FILE_SYSTEMS.iter().any(|shared| i64::from(*shared) == f_type & i64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::host::Host;
    use crate::storage::{Access, Env};

    #[test]
    fn network_file_systems_are_shared_and_local_ones_are_not() {
        let shared: [i64; 4] = [0x6969, 0xFF53_4D42, 0xFF53_4D42_u32.cast_signed().into(), 0x6573_5546];
        assert!(shared.into_iter().all(is_shared));
        let local = [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC];
        assert!(!local.into_iter().any(is_shared));
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert!(!Host.open(file.path(), Access::Read).unwrap().is_on_shared_file_system());
    }
}
