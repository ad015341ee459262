//! The host's file system is full: writes fail or wait, as told; flushes and reads go on; nothing is lost, and all goes on
//! where there is room again (crash-safety 3.5, 3.8; 5.2, R9).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::guest::{SECTOR, tagged_run};
use super::loopdev::{Kind, Mounted, may_mount};
use super::runtime::Runtime;
use crate::common::client::{Client, Command};
use crate::common::daemon::Daemon;
use crate::common::tool::diffdisk;

/// Sectors of a write: four to a block.
const PIECE: u64 = 128;
const BLOCK: &str = "256K";
/// Bytes of the image's disk: more than any of the file systems has.
const DISK: &str = "1G";
/// Room that is given back later.
const BALLAST: u64 = 24 << 20;

#[test]
fn full_ext4() {
    both_policies("full_ext4", Kind::Ext4, 64 << 20);
}

#[test]
fn full_xfs() {
    both_policies("full_xfs", Kind::Xfs, Kind::Xfs.size());
}

#[test]
fn full_btrfs() {
    both_policies("full_btrfs", Kind::Btrfs, Kind::Btrfs.size());
}

fn both_policies(test: &str, kind: Kind, size: u64) {
    if may_mount(test) {
        writes_fail(&Full::new(kind, size));
        writes_wait(&Full::new(kind, size));
    }
}

/// A small file system with an image and a ballast.
struct Full {
    // Unmounted before the folder goes that its file lies in.
    mounted: Mounted,
    _folder: TempDir,
    kind: Kind,
    image: PathBuf,
    ballast: PathBuf,
    runtime: Runtime,
}

impl Full {
    fn new(kind: Kind, size: u64) -> Full {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let device = folder.path().join("device");
        File::create(&device).and_then(|file| file.set_len(size)).expect("a device in memory");
        kind.make(&device, &[]);
        let mounted = Mounted::mount(kind, &device);
        let (image, ballast) = (mounted.path().join("image.vhd"), mounted.path().join("ballast"));
        let file = File::create(&ballast).expect("a ballast");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BALLAST).expect("room for the ballast");
        diffdisk(["create", text(&image), "--size", DISK, "--block-size", BLOCK]).ok();
        Full { mounted, _folder: folder, kind, image, ballast, runtime: Runtime::new() }
    }

    fn serve(&self, policy: &str) -> Daemon {
        Daemon::start(&self.image, &[&format!("--on-enospc={policy}"), self.runtime.option()])
    }

    /// The image holds nothing on the file system that it has no use for: ext4 keeps what a failed fallocate got.
    fn assert_no_leak(&self) {
        let _settled = self.mounted.available();
        let m = fs::metadata(&self.image).expect("the image");
        let beyond = (m.blocks() * 512).saturating_sub(m.len());
        // XFS allocates ahead by itself and takes it back later.
        if self.kind == Kind::Ext4 {
            assert!(beyond < 256 << 10, "{beyond} bytes are held beyond the end of {} bytes", m.len());
        }
    }

    fn make_room(&self) {
        fs::remove_file(&self.ballast).expect("the ballast goes");
        let _settled = self.mounted.available();
    }

    /// The image is sound and holds the first `pieces` pieces.
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
        let found = client.read(piece * PIECE * SECTOR as u64, want.len()).expect("reads go on");
        assert!(found == want, "piece {piece} of {pieces} is not what was written");
    }
}

fn writes_fail(full: &Full) {
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
    assert!(done > 50, "only {done} pieces found room: {}", daemon.log());
    client.flush().expect("a flush while the host is full");
    submit(&mut client, done).expect("a write is queued");
    client.wait().expect("an answer").result.expect_err("the host is still full");
    assert_readable(&mut client, done);
    full.assert_no_leak();
    full.make_room();
    for piece in done..done + 20 {
        submit(&mut client, piece).expect("a write is queued");
        client.wait().expect("an answer").result.expect("there is room again");
    }
    client.flush().expect("a flush");
    drop(client);
    assert_eq!(daemon.log().matches("there is room again").count(), 1, "{}", daemon.log());
    daemon.stop();
    full.assert_holds(done + 20);
}

fn writes_wait(full: &Full) {
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
    assert!(done > 50, "only {done} pieces found room: {}", daemon.log());
    let others = Others { parked: 1 };
    others.run(&mut client, Command::Flush);
    for piece in (0..done).step_by(7) {
        let want = data(piece);
        let found = others.run(&mut client, Command::Read { offset: piece * PIECE * SECTOR as u64, len: want.len() });
        assert!(found == want, "piece {piece} of {done} is not what was written");
    }
    // More of them, and still nothing fails.
    for piece in done + 1..done + 5 {
        submit(&mut client, piece).expect("a write is queued");
    }
    let others = Others { parked: 5 };
    others.run(&mut client, Command::Flush);
    full.assert_no_leak();
    full.make_room();
    for _ in 0..5 {
        client.wait().expect("parked writes go on by themselves").result.expect("there is room again");
    }
    client.flush().expect("a flush");
    drop(client);
    let log = daemon.log();
    assert_eq!(log.matches("the host is full").count(), 1, "{log}");
    assert_eq!(log.matches("there is room again").count(), 1, "{log}");
    daemon.stop();
    full.assert_holds(done + 5);
}

/// Requests that complete while writes are parked.
struct Others {
    parked: usize,
}

impl Others {
    fn run(&self, client: &mut Client, command: Command<'_>) -> Vec<u8> {
        assert_eq!(client.in_flight(), self.parked, "a parked write was answered");
        let ticket = client.submit(0, command).expect("a request is queued");
        let done = client.wait().expect("it completes while writes are parked");
        assert_eq!(done.ticket, ticket, "a parked write was answered");
        done.result.expect("it does not fail while writes are parked");
        done.data
    }
}
