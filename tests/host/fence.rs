//! I/O of a killed daemon continues in the kernel; its successor must wait for this I/O (crash-safety 8; R7).
//!
//! The medium delays a write or a read of the first daemon. The first daemon is killed meanwhile, and a second daemon
//! is started at once. The second daemon must not serve the image before the delayed request has completed.

use std::path::Path;
use std::time::{Duration, Instant};

use super::fuse::{self, Entry, Event, FuseDisk, contains};
use super::guest::{SECTOR, tagged, tagged_run};
use super::loopdev::{FsKind, can_mount, mount_on_loop};
use crate::common::client::{Client, Command};
use crate::common::daemon::Daemon;
use crate::common::temp::RuntimeDir;
use crate::common::tool::diffdisk;

/// Delay of the requests that are in flight when the first daemon is killed.
const LATENCY: Duration = Duration::from_secs(3);
/// First sector, and number of sectors, of the write that is in flight when the daemon is killed.
const PLACE: (u64, u64) = (640, 16);

const OLD: u64 = 1001;
const NEW: u64 = 1002;

#[test]
fn buffered_io_of_a_killed_ring_is_waited_for() {
    on_the_medium_itself("buffered_io_of_a_killed_ring_is_waited_for", "--io-engine=io_uring");
}

#[test]
fn buffered_io_of_a_killed_thread_is_waited_for() {
    on_the_medium_itself("buffered_io_of_a_killed_thread_is_waited_for", "--io-engine=blocking");
}

#[test]
fn direct_io_of_a_killed_ring_is_waited_for() {
    on_ext4("direct_io_of_a_killed_ring_is_waited_for", "--io-engine=io_uring");
}

#[test]
fn direct_io_of_a_killed_thread_is_waited_for() {
    on_ext4("direct_io_of_a_killed_thread_is_waited_for", "--io-engine=blocking");
}

#[test]
fn reads_of_a_killed_ring_are_waited_for() {
    reads_of_a_parent("reads_of_a_killed_ring_are_waited_for", "--io-engine=io_uring");
}

#[test]
fn reads_of_a_killed_thread_are_waited_for() {
    reads_of_a_parent("reads_of_a_killed_thread_are_waited_for", "--io-engine=blocking");
}

/// Checks that the second daemon serves the child only after the direct reads of the killed daemon have completed. Only
/// the parent is on the slow medium. Direct reads of the parent may still write to guest memory after the first daemon
/// has ended, and no inode lock makes the second daemon wait for these reads: only the lock on the child does. (A
/// buffered read ends with its process; only the kernel's readahead continues.)
fn reads_of_a_parent(test: &str, engine: &str) {
    if !can_mount(test) {
        return;
    }
    let disk = fuse::blank(FsKind::Ext4.size());
    let (device, mounted) = mount_on_loop(&disk.path(), FsKind::Ext4);
    let folder = tempfile::tempdir().expect("a folder");
    let (root, child) = (mounted.path().join("root.vhd"), folder.path().join("child.vhd"));
    let raw = folder.path().join("raw");
    std::fs::write(&raw, tagged_run(1, 0, 4096)).expect("a raw disk");
    let [convert, create] = ["convert", "create"].map(Path::new);
    let [to, dynamic, from, kind] = ["--to", "dynamic", "--from", "raw"].map(Path::new);
    diffdisk([convert, &raw, &root, to, dynamic, from, kind]).ok();
    let allow = format!("--allow-parents={}", mounted.path().display());
    diffdisk([create, &child, Path::new("--parent"), &root, Path::new(&allow)]).ok();
    let runtime = RuntimeDir::new();
    let options = [engine, "--direct", &allow, runtime.option()];
    let old = Daemon::start(&child, &options);
    let mut client = old.connect();
    disk.set_read_delay(LATENCY);
    client.submit(0, Command::Read { offset: 1000 * SECTOR as u64, len: 8192 }).expect("a read is queued");
    disk.wait_for_held_read();
    let killed = Instant::now();
    old.send_sigkill();
    disk.set_read_delay(Duration::ZERO);
    let new = Daemon::start(&child, &options);
    let over = disk.held_reads_done_at().expect("the new daemon serves after the old reads");
    assert!(over > killed, "nothing was in flight when the daemon was killed");
    let found = new.connect().read(1000 * SECTOR as u64, 8192).expect("a read");
    assert!(found == tagged_run(1, 1000, 16));
    new.stop();
    drop(old);
    mounted.unmount();
    drop(device);
}

/// Checks that the second daemon reads the image, and writes it, only after the write of the killed daemon has taken
/// effect. The image is the FUSE file, so all requests to the medium come from the daemons.
fn on_the_medium_itself(test: &str, engine: &str) {
    if !can_mount(test) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let made = folder.path().join("image.vhd");
    create(&made);
    let disk = fuse::copy_of(&made);
    let runtime = RuntimeDir::new();
    let options = [engine, runtime.option()];
    let (old, killed) = kill_with_a_write_under_way(&disk, &disk.path(), &options);
    let new = Daemon::start(&disk.path(), &options);
    let landed = entry_of(&disk.log(), OLD).expect("the old write took effect before the new daemon serves").done;
    assert!(landed > killed, "nothing was in flight when the daemon was killed");
    let first = disk.first_arrival_after(killed).expect("the new daemon has read the image");
    assert!(first >= landed, "the new daemon read the image {:?} before the old write took effect", landed - first);
    assert_new_write_stays(&disk, &new);
    new.stop();
    drop(old);
}

/// Checks that the second daemon serves the image only after the direct write of the killed daemon has taken effect.
/// The image is in ext4 on the medium, so the medium receives the daemons' direct I/O and the requests of the file
/// system itself. The log does not show which read is the first of the second daemon.
fn on_ext4(test: &str, engine: &str) {
    if !can_mount(test) {
        return;
    }
    let disk = fuse::blank(FsKind::Ext4.size());
    let (device, mounted) = mount_on_loop(&disk.path(), FsKind::Ext4);
    let image = mounted.path().join("image.vhd");
    create(&image);
    let runtime = RuntimeDir::new();
    let options = [engine, "--direct", runtime.option()];
    let (old, killed) = kill_with_a_write_under_way(&disk, &image, &options);
    let new = Daemon::start(&image, &options);
    let landed = entry_of(&disk.log(), OLD).expect("the old write took effect before the new daemon serves").done;
    assert!(landed > killed, "nothing was in flight when the daemon was killed");
    assert!(!new.log().contains("buffered"), "direct I/O was asked for: {}", new.log());
    assert_new_write_stays(&disk, &new);
    new.stop();
    drop(old);
    mounted.unmount();
    drop(device);
}

fn create(image: &Path) {
    diffdisk([Path::new("create"), image, Path::new("--size"), Path::new("16M")]).ok();
}

/// Starts a daemon, writes, and kills the daemon while the medium delays the write. Returns the daemon and the time of
/// the kill.
fn kill_with_a_write_under_way(disk: &FuseDisk, image: &Path, options: &[&str]) -> (Daemon, Instant) {
    let daemon = Daemon::start(image, options);
    let mut client = daemon.connect();
    // The first write allocates the block, so the next write needs no other operation.
    client.write(0, &tagged_run(1, 0, 2048)).expect("a first write");
    client.flush().expect("a flush");
    disk.set_delay(LATENCY);
    submit(&mut client, OLD);
    disk.wait_for_held_write(&tagged(OLD, PLACE.0));
    let killed = Instant::now();
    daemon.send_sigkill();
    disk.set_delay(Duration::ZERO);
    assert!(entry_of(&disk.log(), OLD).is_none(), "the write took effect too early");
    (daemon, killed)
}

fn submit(client: &mut Client, tag: u64) {
    let data = tagged_run(tag, PLACE.0, PLACE.1);
    client.submit(0, Command::Write { offset: PLACE.0 * SECTOR as u64, data: &data }).expect("a write is queued");
}

/// Checks that the old write does not overwrite a new write to the same sectors.
fn assert_new_write_stays(disk: &FuseDisk, daemon: &Daemon) {
    let mut client = daemon.connect();
    submit(&mut client, NEW);
    client.wait().expect("an answer").result.expect("a write");
    client.flush().expect("a flush");
    disk.wait_until_applied();
    let (offset, len) = (PLACE.0 * SECTOR as u64, usize::try_from(PLACE.1).expect("small") * SECTOR);
    assert!(client.read(offset, len).expect("a read") == tagged_run(NEW, PLACE.0, PLACE.1));
    let log = disk.log();
    let at = |tag| log.iter().rposition(|entry| holds(entry, tag)).expect("both writes are in the log");
    assert!(at(OLD) < at(NEW), "the old write came after the new one");
}

fn entry_of(log: &[Entry], tag: u64) -> Option<&Entry> {
    log.iter().find(|entry| holds(entry, tag))
}

fn holds(entry: &Entry, tag: u64) -> bool {
    matches!(&entry.event, Event::Write { data, .. } if contains(data, &tagged(tag, PLACE.0)))
}
