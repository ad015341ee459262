//! A medium that fails syncs or writes: no flush is acknowledged falsely, a failed sync is final, and data that was
//! flushed before the failure is present after a restart (crash-safety 6; R10).

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::fuse;
use super::guest::{SECTOR, tagged_run};
use super::loopdev::{FsKind, Mounted, can_mount, mount_on_loop};
use crate::common::client::Client;
use crate::common::daemon::Daemon;
use crate::common::temp::RuntimeDir;
use crate::common::tool::{self, diffdisk};

/// Operations that fail on the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failing {
    Syncs,
    Writes,
}

#[test]
fn failed_syncs_are_final_on_ext4() {
    both_modes("failed_syncs_are_final_on_ext4", FsKind::Ext4, Failing::Syncs);
}

#[test]
fn failed_syncs_are_final_on_xfs() {
    both_modes("failed_syncs_are_final_on_xfs", FsKind::Xfs, Failing::Syncs);
}

#[test]
fn failed_writes_are_told_on_ext4() {
    both_modes("failed_writes_are_told_on_ext4", FsKind::Ext4, Failing::Writes);
}

#[test]
fn failed_writes_are_told_on_xfs() {
    both_modes("failed_writes_are_told_on_xfs", FsKind::Xfs, Failing::Writes);
}

fn both_modes(test: &str, kind: FsKind, failing: Failing) {
    if can_mount(test) {
        run(kind, failing, "--cache=writeback");
        run(kind, failing, "--direct");
    }
}

fn run(kind: FsKind, failing: Failing, mode: &str) {
    let disk = fuse::blank(kind.size());
    let (device, mounted) = mount_on_loop(&disk.path(), kind);
    let image = mounted.path().join("image.vhd");
    // With sixteen blocks the file grows at the first write only. A second growth in the background might be in
    // progress when the medium fails, and a growth that can be neither finished nor undone poisons the image.
    diffdisk([Path::new("create"), &image, Path::new("--size"), Path::new("32M")]).ok();
    let runtime = RuntimeDir::new();
    let daemon = Daemon::start(&image, &[mode, runtime.option()]);
    let mut client = daemon.connect();
    write(&mut client, 1, 0, 64).expect("a write");
    write(&mut client, 2, 5000, 300).expect("a write");
    client.flush().expect("a flush of a sound medium");

    disk.fail_syncs(failing == Failing::Syncs);
    disk.fail_writes(failing == Failing::Writes);
    let written = write(&mut client, 3, 0, 64);
    let direct = mode == "--direct";
    if failing == Failing::Writes && direct {
        assert_eq!(written.expect_err("a direct write to a failing medium").raw_os_error(), Some(libc::EIO));
    } else {
        written.expect("a write to the page cache, or to a medium that fails syncs only");
        client.flush().expect_err("a flush to a failing medium");
    }
    assert!(disk.failures() > 0, "the medium has failed no operation");
    disk.fail_syncs(false);
    disk.fail_writes(false);
    if failing == Failing::Syncs || !direct {
        // fsync(2) would succeed now, although the kernel has dropped the pages that it could not write.
        for _ in 0..3 {
            client.flush().expect_err("a flush after a failed sync");
        }
        write(&mut client, 4, 5000, 8).expect_err("a write after a failed sync");
        assert!(daemon.log().contains("sync failed"), "the log does not name the failed sync: {}", daemon.log());
    }
    let kept = client.read(5000 * SECTOR as u64, 300 * SECTOR).expect("reads succeed");
    assert!(kept == tagged_run(2, 5000, 300));
    drop(client);
    let poisoned = failing == Failing::Syncs || !direct;
    daemon.kill();

    mounted.unmount();
    let mounted = Mounted::mount(kind, device.path());
    let image = mounted.path().join("image.vhd");
    let options: &[&str] = if poisoned {
        assert_refused(&image, runtime.option());
        &[mode, runtime.option(), "--discard-journal"]
    } else {
        &[mode, runtime.option()]
    };
    let daemon = Daemon::start(&image, options);
    let mut client = daemon.connect();
    let kept = client.read(5000 * SECTOR as u64, 300 * SECTOR).expect("a read after the restart");
    assert!(kept == tagged_run(2, 5000, 300), "{kind:?} {failing:?} {mode}: flushed data is gone");
    // These sectors were overwritten but not flushed: each has its old or its new contents.
    let either = client.read(0, 64 * SECTOR).expect("a read after the restart");
    let (old, new) = (tagged_run(1, 0, 64), tagged_run(3, 0, 64));
    for (n, sector) in either.chunks(SECTOR).enumerate() {
        let at = n * SECTOR..(n + 1) * SECTOR;
        assert!(
            sector == &old[at.clone()] || sector == &new[at],
            "{kind:?} {failing:?} {mode}: sector {n} has neither contents"
        );
    }
    write(&mut client, 5, 0, 64).expect("a write after the restart");
    client.flush().expect("a flush after the restart");
    drop(client);
    daemon.stop();
    diffdisk([Path::new("check"), &image]).ok();
    mounted.unmount();
}

/// Checks that the next daemon refuses the image and names the failed sync.
fn assert_refused(image: &Path, runtime: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(tool::DIFFDISKD);
    command.arg(format!("--blk-file={}", image.display())).arg(runtime);
    command.arg(format!("--socket-path={}", folder.path().join("s").display()));
    let ended = tool::run(&mut command, Duration::from_secs(20));
    assert_eq!(ended.code, Some(1), "a poisoned image is served: {}", ended.stderr);
    assert!(ended.stderr.contains("sync failed"), "the error does not name the failed sync: {}", ended.stderr);
    assert!(fs::read_dir(folder.path()).expect("a folder").next().is_none(), "a socket is left behind");
}

fn write(client: &mut Client, tag: u64, first: u64, count: u64) -> std::io::Result<()> {
    client.write(first * SECTOR as u64, &tagged_run(tag, first, count))
}
