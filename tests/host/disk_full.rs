//! A full file system: writes fail or wait, by option; reads still succeed, and so do flushes unless the file system
//! copies the writes of a commit to new places; no data is lost, and writes succeed again when there is space
//! (crash-safety 4.1, 6.2; R9).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::guest::{SECTOR, tagged_run};
use super::loopdev::{FsKind, Mounted, can_mount};
use crate::common::client::{Client, Command};
use crate::common::daemon::Daemon;
use crate::common::temp::{self, RuntimeDir};
use crate::common::tool::diffdisk;

/// Sectors in a write; a block has four such pieces of data.
const PIECE: u64 = 128;
const BLOCK: &str = "256K";
/// Virtual size of the image, larger than each file system.
const DISK: &str = "1G";
/// Size in bytes of a file that is removed to free space.
const BALLAST: u64 = 24 << 20;

#[test]
fn full_ext4() {
    both_policies("full_ext4", FsKind::Ext4, 64 << 20);
}

#[test]
fn full_xfs() {
    both_policies("full_xfs", FsKind::Xfs, FsKind::Xfs.size());
}

#[test]
fn full_btrfs() {
    both_policies("full_btrfs", FsKind::Btrfs, FsKind::Btrfs.size());
}

#[test]
fn full_btrfs_apart() {
    both_policies("full_btrfs_apart", FsKind::BtrfsSeparate, FsKind::BtrfsSeparate.size());
}

fn both_policies(test: &str, kind: FsKind, size: u64) {
    if can_mount(test) {
        for allocation in ["sparse", "block"] {
            writes_fail(&FullFs::new(kind, size, allocation));
            writes_wait(&FullFs::new(kind, size, allocation));
        }
    }
}

#[test]
fn full_again_and_again_ext4() {
    again_and_again("full_again_and_again_ext4", FsKind::Ext4, 64 << 20);
}

#[test]
fn full_again_and_again_xfs() {
    again_and_again("full_again_and_again_xfs", FsKind::Xfs, FsKind::Xfs.size());
}

#[test]
fn full_again_and_again_btrfs() {
    again_and_again("full_again_and_again_btrfs", FsKind::BtrfsSeparate, FsKind::BtrfsSeparate.size());
}

fn again_and_again(test: &str, kind: FsKind, size: u64) {
    if can_mount(test) {
        scattered_writes(&FullFs::new(kind, size, "sparse"), true);
        scattered_writes(&FullFs::new(kind, size, "block"), true);
    }
}

#[test]
fn commits_wait_on_btrfs_with_copies_on_write() {
    if can_mount("commits_wait_on_btrfs_with_copies_on_write") {
        let full = FullFs::new(FsKind::BtrfsSeparate, FsKind::BtrfsSeparate.size(), "sparse");
        // The image becomes a copy without the attribute that makes btrfs overwrite in place, as if another program had
        // made it: btrfs copies every write to a new place.
        let bytes = fs::read(&full.image).expect("the image");
        fs::remove_file(&full.image).expect("the image goes");
        fs::write(&full.image, bytes).expect("a copy of it");
        scattered_writes(&full, false);
    }
}

/// Writes small pieces at scattered places, with flushes, on a file system that becomes full at various points of the
/// daemon's work. Then kills the daemon while the file system is full. If `in_place` is true, commits overwrite
/// allocated space, so flushes succeed while writes wait. Otherwise flushes may wait, too.
fn scattered_writes(full: &FullFs, in_place: bool) {
    let options = full.options("park");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let daemon = Daemon::start(&full.image, &options);
    let mut client = daemon.connect();
    let place = |number: u64| (number * 7919 % 16_384) * (64 << 10);
    let page = |number: u64| tagged_run(number + 1, place(number) / SECTOR as u64, 8);
    // Files that the test removes one by one, to free a little space each time.
    let steps: Vec<PathBuf> = (0..10).map(|n| full.mounted.path().join(format!("step{n}"))).collect();
    for step in &steps {
        let file = File::create(step).expect("a step");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 256 << 10).expect("room for a step");
    }
    fill_up(full);
    let (mut next, mut acknowledged) = (0u64, Vec::new());
    let mut left = steps.iter();
    let mut waiting: BTreeMap<u64, Option<u64>> = BTreeMap::new();
    let mut waited = 0;
    loop {
        while client.in_flight() < 8 {
            let ticket = if next % 5 == 4 {
                client.submit(0, Command::Flush).expect("a flush is queued")
            } else {
                client.submit(0, Command::Write { offset: place(next), data: &page(next) }).expect("a write is queued")
            };
            waiting.insert(ticket, (next % 5 != 4).then_some(next));
            next += 1;
        }
        match client.wait_for(Duration::from_millis(1500)) {
            Ok(done) => {
                done.result.expect("nothing fails while the host is full");
                acknowledged.extend(waiting.remove(&done.ticket).expect("its own ticket"));
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                waited += 1;
                if in_place {
                    assert!(waiting.values().all(Option::is_some), "a flush waits: {}", daemon.log());
                }
                match left.next() {
                    Some(step) => fs::remove_file(step).expect("a step can be removed"),
                    None => break,
                }
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(waited > 1, "the host was never full: {}", daemon.log());
    for refused in ["failed", "writes are refused", "ERROR"] {
        assert!(!daemon.log().contains(refused), "{}", daemon.log());
    }
    drop(client);
    daemon.kill();
    full.make_room();
    let daemon = Daemon::start(&full.image, &options);
    let mut client = daemon.connect();
    for number in &acknowledged {
        let found = client.read(place(*number), 8 * SECTOR).expect("a read");
        assert!(found == page(*number), "write {number} of {} is lost: {}", acknowledged.len(), daemon.log());
    }
    client.flush().expect("a flush");
    drop(client);
    daemon.stop();
    diffdisk(["check", text(&full.image), full.runtime.option()]).ok();
}

/// Fills the file system except for a little space.
fn fill_up(full: &FullFs) {
    let file = File::create(full.mounted.path().join("filler")).expect("a filler");
    let mut at = 0;
    let mut piece = 16 << 20;
    while piece >= 64 << 10 {
        let keep = full.mounted.available() <= piece + (512 << 10);
        if keep || rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, piece).is_err() {
            file.set_len(at).expect("the space of a failed call can be freed");
            piece /= 2;
        } else {
            at += piece;
        }
    }
}

/// A small file system with an image and a file of [`BALLAST`] bytes.
struct FullFs {
    // Declared before `_folder`, so that the file system is unmounted before the backing file of its device is removed.
    mounted: Mounted,
    _folder: TempDir,
    kind: FsKind,
    image: PathBuf,
    ballast: PathBuf,
    runtime: RuntimeDir,
    allocation: &'static str,
}

impl FullFs {
    fn new(kind: FsKind, size: u64, allocation: &'static str) -> FullFs {
        let folder = temp::in_memory();
        let device = folder.path().join("device");
        File::create(&device).and_then(|file| file.set_len(size)).expect("a device in memory");
        kind.make(&device, &[]);
        let mounted = Mounted::mount(kind, &device);
        let (image, ballast) = (mounted.path().join("image.vhd"), mounted.path().join("ballast"));
        let file = File::create(&ballast).expect("a ballast");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BALLAST).expect("room for the ballast");
        diffdisk(["create", text(&image), "--size", DISK, "--block-size", BLOCK]).ok();
        FullFs { mounted, _folder: folder, kind, image, ballast, runtime: RuntimeDir::new(), allocation }
    }

    fn options(&self, policy: &str) -> [String; 3] {
        let allocation = format!("--allocation={}", self.allocation);
        [format!("--on-enospc={policy}"), allocation, self.runtime.option().to_owned()]
    }

    fn serve(&self, policy: &str) -> Daemon {
        let options = self.options(policy);
        Daemon::start(&self.image, &options.each_ref().map(String::as_str))
    }

    /// On ext4, checks that little space is allocated to the image beyond the end of the file: ext4 keeps the space
    /// that a failed fallocate has allocated.
    fn assert_no_leak(&self) {
        let _settled = self.mounted.available();
        let m = fs::metadata(&self.image).expect("the image");
        let beyond = (m.blocks() * 512).saturating_sub(m.len());
        // XFS preallocates space beyond the end of a file and frees that space later.
        if self.kind == FsKind::Ext4 {
            assert!(beyond < 256 << 10, "{beyond} bytes are allocated beyond the end of {} bytes", m.len());
        }
    }

    fn make_room(&self) {
        fs::remove_file(&self.ballast).expect("the ballast can be removed");
        let _settled = self.mounted.available();
    }

    /// Checks that the image has no defects and contains the first `pieces` pieces.
    fn assert_holds(&self, pieces: u64) {
        diffdisk(["check", text(&self.image), self.runtime.option()]).ok();
        let raw = self._folder.path().join("raw");
        diffdisk(["convert", text(&self.image), text(&raw), "--to", "raw", self.runtime.option()]).ok();
        let disk = File::open(&raw).expect("the raw disk");
        let mut found = vec![0; usize::try_from(PIECE).expect("small") * SECTOR];
        for piece in 0..pieces {
            let at = piece * PIECE * SECTOR as u64;
            std::os::unix::fs::FileExt::read_exact_at(&disk, &mut found, at).expect("a read");
            assert!(found == data(piece), "piece {piece} of {pieces} is lost");
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

fn data(piece: u64) -> Vec<u8> {
    tagged_run(piece + 1, piece * PIECE, PIECE)
}

fn submit(client: &mut Client, piece: u64) -> io::Result<()> {
    let offset = piece * PIECE * SECTOR as u64;
    client.submit(0, Command::Write { offset, data: &data(piece) }).map(drop)
}

fn assert_readable(client: &mut Client, pieces: u64) {
    for piece in (0..pieces).step_by(7) {
        let want = data(piece);
        let found = client.read(piece * PIECE * SECTOR as u64, want.len()).expect("reads succeed");
        assert!(found == want, "piece {piece} of {pieces} has other contents");
    }
}

fn writes_fail(full: &FullFs) {
    let daemon = full.serve("error");
    let mut client = daemon.connect();
    let mut done = 0;
    let error = loop {
        submit(&mut client, done).expect("a write is queued");
        match client.wait().expect("an answer").result {
            Ok(()) => done += 1,
            Err(e) => break e,
        }
        if done % 16 == 0 {
            client.flush().expect("a flush");
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(done > 50, "only {done} pieces were written: {}", daemon.log());
    client.flush().expect("a flush while the host is full");
    // XFS may free some space after a failed allocation, but that space is soon used.
    let found = (0..200).position(|_| {
        submit(&mut client, done).expect("a write is queued");
        let refused = client.wait().expect("an answer").result.is_err();
        done += u64::from(!refused);
        refused
    });
    found.expect("the host is still full");
    assert_readable(&mut client, done);
    full.assert_no_leak();
    full.make_room();
    for piece in done..done + 20 {
        submit(&mut client, piece).expect("a write is queued");
        client.wait().expect("an answer").result.expect("there is room again");
    }
    client.flush().expect("a flush");
    daemon.wait_for_log("there is room again", 1);
    drop(client);
    // Delayed allocation reserves more than it uses, so a file system may have space again after writeback.
    assert!((1..=3).contains(&daemon.log().matches("there is room again").count()), "{}", daemon.log());
    daemon.stop();
    full.assert_holds(done + 20);
}

fn writes_wait(full: &FullFs) {
    let daemon = full.serve("park");
    let mut client = daemon.connect();
    let mut done = 0;
    loop {
        submit(&mut client, done).expect("a write is queued");
        match client.wait_for(Duration::from_secs(2)) {
            Ok(answer) => answer.result.expect("no write fails"),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => break,
            Err(e) => panic!("{e}"),
        }
        done += 1;
        if done % 16 == 0 {
            client.flush().expect("a flush");
        }
    }
    assert!(done > 50, "only {done} pieces were written: {}", daemon.log());
    let others = OtherRequests { parked: 1 };
    others.run(&mut client, Command::Flush);
    for piece in (0..done).step_by(7) {
        let want = data(piece);
        let found = others.run(&mut client, Command::Read { offset: piece * PIECE * SECTOR as u64, len: want.len() });
        assert!(found == want, "piece {piece} of {done} has other contents");
    }
    // More writes wait, and still no request fails.
    for piece in done + 1..done + 5 {
        submit(&mut client, piece).expect("a write is queued");
    }
    let others = OtherRequests { parked: 5 };
    others.run(&mut client, Command::Flush);
    full.assert_no_leak();
    full.make_room();
    for _ in 0..5 {
        client.wait().expect("parked writes continue").result.expect("there is room again");
    }
    client.flush().expect("a flush");
    drop(client);
    let log = daemon.log();
    // Delayed allocation reserves more than it uses, so the file system may have space for a moment after writeback.
    assert!((1..=3).contains(&log.matches("the host is full").count()), "{log}");
    assert_eq!(log.matches("there is room again").count(), log.matches("the host is full").count(), "{log}");
    daemon.stop();
    full.assert_holds(done + 5);
}

/// Requests that complete while writes are parked.
struct OtherRequests {
    parked: usize,
}

impl OtherRequests {
    fn run(&self, client: &mut Client, command: Command<'_>) -> Vec<u8> {
        assert_eq!(client.in_flight(), self.parked, "a parked write was answered");
        let ticket = client.submit(0, command).expect("a request is queued");
        let done = client.wait().expect("other requests complete while writes are parked");
        assert_eq!(done.ticket, ticket, "a parked write was answered");
        done.result.expect("other requests succeed while writes are parked");
        done.data
    }
}
