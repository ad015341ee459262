//! Kernel file systems on loop devices. Mounts and devices are removed at the end of a test, even if the test panics.
//! After a SIGKILL of the test process they remain and must be removed by hand. (A private mount namespace would be
//! worse: a killed process that serves FUSE would have to unmount the file system that waits for it, and would never
//! end.)

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::tool;

/// Time limit of programs that make, mount or unmount a file system.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A kernel file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FsKind {
    Ext4,
    Xfs,
    /// btrfs with data and metadata in the same block groups.
    Btrfs,
    /// btrfs as mkfs makes it by default.
    BtrfsSeparate,
}

impl FsKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
            FsKind::Btrfs | FsKind::BtrfsSeparate => "btrfs",
        }
    }

    /// Returns the size in bytes of a small device for the file system. mkfs.xfs and mkfs.btrfs refuse much smaller
    /// devices.
    pub(crate) fn size(self) -> u64 {
        match self {
            FsKind::Ext4 => 128 << 20,
            FsKind::Xfs => 300 << 20,
            FsKind::Btrfs => 160 << 20,
            FsKind::BtrfsSeparate => 400 << 20,
        }
    }

    /// Makes an empty file system on a device or in a file. `options` are further arguments of mkfs.
    pub(crate) fn make(self, on: &Path, options: &[&str]) {
        let mut mkfs = Command::new(format!("mkfs.{}", self.name()));
        match self {
            // These options disable the initialisation that ext4 does in the background after the mount.
            FsKind::Ext4 => mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
            FsKind::Xfs => mkfs.args(["-q", "-f"]),
            // With separate block groups a small file system runs out of metadata space and never recovers.
            FsKind::Btrfs => mkfs.args(["-q", "-f", "--mixed"]),
            FsKind::BtrfsSeparate => mkfs.args(["-q", "-f"]),
        };
        run_ok(mkfs.args(options).arg(on));
    }

    fn mount_options(self) -> &'static str {
        match self {
            FsKind::Ext4 => "noatime",
            // Copies of one device, which have the same UUID, are mounted at the same time.
            FsKind::Xfs => "noatime,nouuid",
            FsKind::Btrfs | FsKind::BtrfsSeparate => "noatime,max_inline=0",
        }
    }
}

/// Returns whether this process can mount file systems. Without root it prints that the test is skipped. Panics if a
/// program that mounting needs is not installed.
pub(crate) fn can_mount(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("{test}: skipped: needs root");
        return false;
    }
    tool::require(&["losetup", "mount", "umount", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"]);
    true
}

/// A loop device with direct I/O to its file.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    pub(crate) fn attach(file: &Path) -> LoopDevice {
        let mut losetup = Command::new("losetup");
        let made = run_ok(losetup.args(["--find", "--show", "--direct-io=on"]).arg(file));
        LoopDevice { path: PathBuf::from(made.trim_end()) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // If the device is still mounted, the kernel detaches it after the unmount.
        let detached = tool::run(Command::new("losetup").arg("-d").arg(&self.path), TIMEOUT);
        if detached.code != Some(0) {
            eprintln!("{} stays: {}", self.path.display(), detached.stderr);
        }
    }
}

/// A mounted file system. Dropping this value unmounts it.
#[derive(Debug)]
pub(crate) struct Mounted {
    folder: TempDir,
    mounted: bool,
}

impl Mounted {
    /// Mounts a device, or a file through a loop device.
    pub(crate) fn mount(kind: FsKind, what: &Path) -> Mounted {
        Mounted::try_mount(kind, what).unwrap_or_else(|why| panic!("cannot mount {}: {why}", what.display()))
    }

    /// Mounts a device or a file that may have no valid file system.
    pub(crate) fn try_mount(kind: FsKind, what: &Path) -> Result<Mounted, String> {
        let folder = tempfile::tempdir().expect("a mount point");
        let is_file = what.metadata().is_ok_and(|m| m.is_file());
        let options = if is_file { format!("loop,{}", kind.mount_options()) } else { kind.mount_options().into() };
        let mut mount = Command::new("mount");
        mount.args(["-t", kind.name(), "-o", &options]).arg(what).arg(folder.path());
        let ended = tool::run(&mut mount, TIMEOUT);
        if ended.code != Some(0) {
            return Err(ended.stderr);
        }
        Ok(Mounted { folder, mounted: true })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Syncs the file system and returns the bytes available to users.
    pub(crate) fn available(&self) -> u64 {
        run_ok(Command::new("sync").arg("-f").arg(self.path()));
        let s = rustix::fs::statvfs(self.path()).expect("a mounted file system");
        s.f_bavail * s.f_frsize
    }

    /// Unmounts the file system. Panics if the file system is in use.
    pub(crate) fn unmount(mut self) {
        self.mounted = false;
        unmount(self.path()).expect("the file system is not in use");
    }
}

/// Makes and mounts a file system on a loop device over a file.
pub(crate) fn mount_on_loop(file: &Path, kind: FsKind) -> (LoopDevice, Mounted) {
    let device = LoopDevice::attach(file);
    kind.make(device.path(), &[]);
    let mounted = Mounted::mount(kind, device.path());
    (device, mounted)
}

/// Unmounts the file system at `path`. The kernel releases files of io_uring rings, and loop devices, some time after
/// their last user has ended, so a busy file system is tried again for ten seconds.
pub(crate) fn unmount(path: &Path) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let ended = tool::run(Command::new("umount").arg(path), TIMEOUT);
        match ended.code {
            Some(0) => return Ok(()),
            _ if ended.stderr.contains("busy") && Instant::now() < deadline => sleep(Duration::from_millis(5)),
            _ => return Err(ended.stderr),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            // Daemons of a failed test may still use the file system.
            let ended = tool::run(Command::new("umount").arg("-l").arg(self.path()), TIMEOUT);
            if ended.code != Some(0) {
                eprintln!("{} stays mounted: {}", self.path().display(), ended.stderr);
            }
        }
    }
}

/// Runs a program and returns its output. Panics if the program fails.
#[track_caller]
pub(crate) fn run_ok(command: &mut Command) -> String {
    let ended = tool::run(command, TIMEOUT);
    assert_eq!(ended.code, Some(0), "{command:?}: {}", ended.stderr);
    String::from_utf8_lossy(&ended.stdout).into_owned()
}
