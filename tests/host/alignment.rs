//! With `--direct` the daemon uses direct I/O if the file system supports direct I/O of the file, otherwise buffered
//! I/O with a warning in the log. The data is correct in both cases (crash-safety 3).

use std::fs;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::guest::{Content, Guest, History, SECTOR};
use super::loopdev::{FsKind, Mounted, can_mount, run_ok};
use crate::common::daemon::Daemon;
use crate::common::rng::Rng;
use crate::common::temp::{self, RuntimeDir};
use crate::common::tool::diffdisk;

const DISK: u64 = 24 << 20;
const REQUESTS: usize = 200;
/// The warning about a file without direct I/O.
const FALLBACK: &str = "direct I/O cannot be used here";

#[test]
fn direct_io_on_ext4() {
    on_loop("direct_io_on_ext4", FsKind::Ext4, |image| assert_direct(image, true));
}

#[test]
fn direct_io_on_xfs() {
    on_loop("direct_io_on_xfs", FsKind::Xfs, |image| {
        assert_direct(image, true);
        // XFS accepts only writes of whole blocks to a file that has ever shared blocks.
        fs::remove_file(image).expect("the image can be removed");
        let (fresh, copy) = (made_in(image.parent().expect("a folder")), image.with_extension("copy"));
        run_ok(Command::new("cp").arg("--reflink=always").arg(&fresh).arg(&copy));
        assert_direct(&copy, false);
    });
}

#[test]
fn direct_io_on_btrfs() {
    on_loop("direct_io_on_btrfs", FsKind::Btrfs, |image| assert_direct(image, false));
}

#[test]
fn direct_io_on_tmpfs() {
    let folder = temp::in_memory();
    assert_direct(&made_in(folder.path()), false);
}

fn on_loop(test: &str, kind: FsKind, body: impl FnOnce(&Path)) {
    if !can_mount(test) {
        return;
    }
    let folder = temp::in_memory();
    let device = folder.path().join("device");
    File::create(&device).and_then(|file| file.set_len(kind.size())).expect("a device in memory");
    kind.make(&device, &[]);
    let mounted = Mounted::mount(kind, &device);
    body(&made_in(mounted.path()));
    mounted.unmount();
}

fn made_in(folder: &Path) -> std::path::PathBuf {
    let image = folder.join("image.vhd");
    let size = DISK.to_string();
    diffdisk(["create", image.to_str().expect("a plain name"), "--size", &size, "--block-size", "512K"]).ok();
    image
}

/// Runs random requests with `--direct`. Checks that the daemon uses direct I/O if and only if `expected` is true, and
/// that the data is correct.
fn assert_direct(image: &Path, expected: bool) {
    let mut rng = Rng::from_env("alignment");
    let runtime = RuntimeDir::new();
    let daemon = Daemon::start(image, &["--direct", runtime.option()]);
    let fallen_back = daemon.log().contains(FALLBACK);
    assert_eq!(!fallen_back, expected, "{}: {}", image.display(), daemon.log());
    let sectors = usize::try_from(DISK).expect("a small disk") / SECTOR;
    let nowhere = || 0;
    let mut guest = Guest::connect(&daemon.socket(), History::of(vec![Content::Zero; sectors]), &nowhere);
    (0..REQUESTS).for_each(|_| guest.step(&mut rng));
    let history = guest.finish();
    let shown = daemon.connect().read_all(37 * SECTOR).expect("reads");
    daemon.stop();
    let raw = image.with_extension("raw");
    let (from, to) = (image.to_str().expect("a plain name"), raw.to_str().expect("a plain name"));
    diffdisk(["convert", from, to, "--to", "raw", runtime.option()]).ok();
    for (what, disk) in [("the guest", shown), ("the file", fs::read(&raw).expect("the raw disk"))] {
        let wrong = history.check_final(&disk);
        assert!(wrong.is_empty(), "{} by {what}: {} wrong, first {}", image.display(), wrong.len(), wrong[0]);
    }
    fs::remove_file(raw).expect("the raw disk can be removed");
    diffdisk(["check", from, runtime.option()]).ok();
}
