//! Kernel file systems on loop devices. Mounts and devices go with the test, also when it panics; after a SIGKILL of the
//! test's process they stay, and have to be unmounted by hand. (A mount namespace of the test's own would be worse: a
//! killed process that serves FUSE would unmount the file system that waits for it, and never end.)

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::tool;

/// How long a program may take that mounts, unmounts, or makes a file system.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A kernel's file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FsKind {
    Ext4,
    Xfs,
    /// With data and metadata in the same room.
    Btrfs,
    /// As mkfs makes it.
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

    /// Bytes of a small device of its kind; mkfs.xfs and mkfs.btrfs refuse smaller ones.
    pub(crate) fn size(self) -> u64 {
        match self {
            FsKind::Ext4 => 128 << 20,
            FsKind::Xfs => 300 << 20,
            FsKind::Btrfs => 160 << 20,
            FsKind::BtrfsSeparate => 400 << 20,
        }
    }

    /// Makes an empty file system on a device or in a file. `options` go to mkfs.
    pub(crate) fn make(self, on: &Path, options: &[&str]) {
        let mut mkfs = Command::new(format!("mkfs.{}", self.name()));
        match self {
            // All that ext4 would do in the background is done now.
            FsKind::Ext4 => mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
            FsKind::Xfs => mkfs.args(["-q", "-f"]),
            // Data and metadata share their room: apart, a small one runs out of the latter and never recovers.
            FsKind::Btrfs => mkfs.args(["-q", "-f", "--mixed"]),
            FsKind::BtrfsSeparate => mkfs.args(["-q", "-f"]),
        };
        run_ok(mkfs.args(options).arg(on));
    }

    fn mount_options(self) -> &'static str {
        match self {
            FsKind::Ext4 => "noatime",
            // Copies of one device are mounted at one time.
            FsKind::Xfs => "noatime,nouuid",
            FsKind::Btrfs | FsKind::BtrfsSeparate => "noatime,max_inline=0",
        }
    }
}

/// True where mounts may be made. Says so and returns false elsewhere.
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
        // Where a mount still uses it, it goes with that.
        let detached = tool::run(Command::new("losetup").arg("-d").arg(&self.path), TIMEOUT);
        if detached.code != Some(0) {
            eprintln!("{} stays: {}", self.path.display(), detached.stderr);
        }
    }
}

/// A mounted file system. Dropped, it is unmounted.
#[derive(Debug)]
pub(crate) struct Mounted {
    folder: TempDir,
    mounted: bool,
}

impl Mounted {
    /// Mounts a device, or a file through a loop device of its own.
    pub(crate) fn mount(kind: FsKind, what: &Path) -> Mounted {
        Mounted::try_mount(kind, what).unwrap_or_else(|why| panic!("cannot mount {}: {why}", what.display()))
    }

    /// The same, for media that may be broken.
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

    /// Bytes that a user may still take, after the file system has settled.
    pub(crate) fn available(&self) -> u64 {
        run_ok(Command::new("sync").arg("-f").arg(self.path()));
        let s = rustix::fs::statvfs(self.path()).expect("a mounted file system");
        s.f_bavail * s.f_frsize
    }

    /// Unmounts it; fails where somebody uses it.
    pub(crate) fn unmount(mut self) {
        self.mounted = false;
        unmount(self.path()).expect("nobody uses it any more");
    }
}

/// A new file system on a loop device over a file.
pub(crate) fn mount_on_loop(file: &Path, kind: FsKind) -> (LoopDevice, Mounted) {
    let device = LoopDevice::attach(file);
    kind.make(device.path(), &[]);
    let mounted = Mounted::mount(kind, device.path());
    (device, mounted)
}

/// Unmounts what is mounted there. The kernel lets go of files in rings, and of loop devices, a moment after their last
/// user has ended: so long this waits.
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
            // Daemons of a test that failed may still use it.
            let ended = tool::run(Command::new("umount").arg("-l").arg(self.path()), TIMEOUT);
            if ended.code != Some(0) {
                eprintln!("{} stays mounted: {}", self.path().display(), ended.stderr);
            }
        }
    }
}

/// Runs a program that has to succeed; returns what it printed.
#[track_caller]
pub(crate) fn run_ok(command: &mut Command) -> String {
    let ended = tool::run(command, TIMEOUT);
    assert_eq!(ended.code, Some(0), "{command:?}: {}", ended.stderr);
    String::from_utf8_lossy(&ended.stdout).into_owned()
}
