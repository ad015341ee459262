//! Space that images occupy: while served, after each verb, if preallocated, and with many images on one file system.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::loopdev::{FsKind, Mounted, can_mount, run_ok};
use crate::common::client::Client;
use crate::common::daemon::Daemon;
use crate::common::temp::{self, RuntimeDir};
use crate::common::tool::diffdisk;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Images on a real file system, and a runtime folder.
struct SpaceFixture {
    folder: TempDir,
    runtime: RuntimeDir,
}

impl SpaceFixture {
    fn new() -> SpaceFixture {
        SpaceFixture::within(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    fn within(folder: &Path) -> SpaceFixture {
        SpaceFixture { folder: tempfile::tempdir_in(folder).expect("a folder"), runtime: RuntimeDir::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes an empty root, or a child.
    fn create(&self, name: &str, options: &[&str]) {
        let path = self.path(name);
        let mut all = vec!["create", path.to_str().expect("a plain name")];
        let parent = options.iter().position(|o| *o == "--parent").map(|at| self.path(options[at + 1]));
        for option in options {
            match &parent {
                Some(parent) if parent.ends_with(option) => all.push(parent.to_str().expect("a plain name")),
                _ => all.push(option),
            }
        }
        diffdisk(all).ok();
    }

    fn tool(&self, verb: &str, name: &str, options: &[&str]) {
        let path = self.path(name);
        let words = [&[verb, path.to_str().expect("a plain name"), self.runtime.option()], options].concat();
        diffdisk(words).ok();
    }

    fn serve(&self, name: &str, extra: &[&str]) -> (Daemon, Client) {
        let daemon = Daemon::start(&self.path(name), &[&[self.runtime.option()], extra].concat());
        let client = daemon.connect();
        (daemon, client)
    }

    /// Returns the number of bytes allocated to a file.
    fn allocated_bytes(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).expect("it is there").blocks() * 512
    }

    fn info(&self, name: &str) -> serde_json::Value {
        let path = self.path(name);
        diffdisk(["info", path.to_str().expect("a plain name"), "--json"]).json()
    }

    /// Writes `count` pages at scattered places of a disk of `size` bytes.
    fn scatter(&self, client: &mut Client, size: u64, count: u64) {
        for number in 0..count {
            client.write(place(size, number), &page(number)).expect("a write");
        }
        client.flush().expect("a flush");
    }

    fn assert_scattered(&self, name: &str, size: u64, count: u64) {
        let (daemon, mut client) = self.serve(name, &["--read-only"]);
        for number in 0..count {
            let found = client.read(place(size, number), 4096).expect("a read");
            assert!(found == page(number), "write {number} of {name} is lost");
        }
        drop(client);
        daemon.stop();
    }
}

fn place(size: u64, number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (size / 4096) * 4096
}

fn page(number: u64) -> Vec<u8> {
    (number + 1).to_be_bytes().repeat(512)
}

#[test]
fn a_guest_that_only_reads_takes_nothing() {
    let fixture = SpaceFixture::new();
    fixture.create("root.vhd", &["--size", "1T"]);
    fixture.create("child.vhd", &["--parent", "root.vhd"]);
    let before = fs::metadata(fixture.path("child.vhd")).expect("the child");
    for allocation in ["--allocation=sparse", "--allocation=block"] {
        let (daemon, mut client) = fixture.serve("child.vhd", &[allocation]);
        for number in 0..10 {
            client.read(number * 100 * GIB, 4096).expect("a read");
        }
        client.flush().expect("a flush");
        drop(client);
        let served = fs::metadata(fixture.path("child.vhd")).expect("the child");
        assert_eq!((served.len(), served.blocks()), (before.len(), before.blocks()), "served, {allocation}");
        daemon.stop();
        let closed = fs::metadata(fixture.path("child.vhd")).expect("the child");
        assert_eq!((closed.len(), closed.blocks()), (before.len(), before.blocks()), "closed, {allocation}");
    }
}

#[test]
fn small_writes_take_little() {
    let fixture = SpaceFixture::new();
    fixture.create("root.vhd", &["--size", "64G"]);
    fixture.create("child.vhd", &["--parent", "root.vhd"]);
    let empty = fixture.allocated_bytes("child.vhd");
    for (count, served, closed) in [(1, 64 * KIB, 48 * KIB), (100, 2200 * KIB, 1100 * KIB), (1000, 14 * MIB, 10 * MIB)]
    {
        let (daemon, mut client) = fixture.serve("child.vhd", &[]);
        fixture.scatter(&mut client, 64 * GIB, count);
        drop(client);
        let taken = fixture.allocated_bytes("child.vhd") - empty;
        assert!(taken <= served, "{count} writes take {} KiB", taken / KIB);
        daemon.stop();
        let taken = fixture.allocated_bytes("child.vhd") - empty;
        assert!(taken <= closed, "{count} writes take {} KiB, closed", taken / KIB);
    }
    let info = fixture.info("child.vhd");
    let (written, taken) = (info["written_bytes"].as_u64(), info["allocated_bytes"].as_u64());
    assert_eq!(taken, Some(fixture.allocated_bytes("child.vhd")));
    assert!(written.is_some_and(|w| w > 1000 * 4096 && w <= fixture.allocated_bytes("child.vhd")), "{info}");
    fixture.assert_scattered("child.vhd", 64 * GIB, 1000);
    fixture.tool("check", "child.vhd", &[]);
}

#[test]
fn whole_blocks_are_given_back_by_compact() {
    let fixture = SpaceFixture::new();
    fixture.create("root.vhd", &["--size", "1G"]);
    fixture.create("child.vhd", &["--parent", "root.vhd"]);
    fixture.create("whole.vhd", &["--parent", "root.vhd", "--preallocate"]);
    fixture.create("whole-root.vhd", &["--size", "64M", "--preallocate"]);
    assert!(fixture.allocated_bytes("whole.vhd") >= GIB && fixture.allocated_bytes("whole-root.vhd") >= 64 * MIB);
    for name in ["whole.vhd", "whole-root.vhd"] {
        fixture.tool("check", name, &[]);
        let written = fixture.info(name)["written_bytes"].as_u64().expect("a number");
        assert!(written < MIB, "{name}: {written}");
    }
    let before = fixture.allocated_bytes("whole.vhd");
    for (name, allocation) in [("child.vhd", "--allocation=block"), ("whole.vhd", "--allocation=sparse")] {
        let (daemon, mut client) = fixture.serve(name, &[allocation]);
        fixture.scatter(&mut client, GIB, 50);
        drop(client);
        daemon.stop();
        fixture.tool("check", name, &[]);
    }
    assert!(fixture.allocated_bytes("child.vhd") > 50 * MIB, "whole blocks: {}", fixture.allocated_bytes("child.vhd"));
    assert!(fixture.allocated_bytes("whole.vhd") <= before + 64 * KIB, "all of it was allocated before");
    for name in ["child.vhd", "whole.vhd", "whole-root.vhd"] {
        fixture.tool("compact", name, &[]);
        assert!(fixture.allocated_bytes(name) < 2 * MIB, "{name}: {}", fixture.allocated_bytes(name));
        fixture.tool("check", name, &[]);
    }
    fixture.assert_scattered("child.vhd", GIB, 50);
    fixture.assert_scattered("whole.vhd", GIB, 50);
}

#[test]
fn holes_stay_holes_in_every_verb() {
    let fixture = SpaceFixture::new();
    fixture.create("root.vhd", &["--size", "1G"]);
    fixture.create("a.vhd", &["--parent", "root.vhd"]);
    let (daemon, mut client) = fixture.serve("a.vhd", &[]);
    fixture.scatter(&mut client, GIB, 200);
    drop(client);
    daemon.stop();
    let most = 200 * (8 + 4) * KIB;
    let sparse = |name: &str| {
        assert!(fixture.allocated_bytes(name) <= most, "{name} takes {} KiB", fixture.allocated_bytes(name) / KIB)
    };
    sparse("a.vhd");
    fixture.tool("check", "a.vhd", &["--repair"]);
    fixture.tool("compact", "a.vhd", &[]);
    sparse("a.vhd");
    let alone = fixture.path("alone.vhd");
    fixture.tool("convert", "a.vhd", &[alone.to_str().expect("a plain name"), "--to", "dynamic"]);
    sparse("alone.vhd");
    fixture.assert_scattered("alone.vhd", GIB, 200);
    // `fs::copy` would fill the holes.
    run_ok(Command::new("cp").arg("--sparse=always").arg(fixture.path("a.vhd")).arg(fixture.path("b.vhd")));
    fixture.tool("flatten", "b.vhd", &[]);
    sparse("b.vhd");
    fixture.assert_scattered("b.vhd", GIB, 200);
    fs::remove_file(fixture.path("b.vhd")).expect("it can be removed");
    fixture.tool("merge", "a.vhd", &[]);
    sparse("root.vhd");
    fixture.assert_scattered("root.vhd", GIB, 200);
}

/// `DIFFDISK_FARM=64,100` makes the test use 64 children that each write 100 MiB, on a file system of 8 GiB.
#[test]
fn many_children_take_what_they_write() {
    if !can_mount("many_children_take_what_they_write") {
        return;
    }
    let wanted = std::env::var("DIFFDISK_FARM").unwrap_or("12,8".into());
    let (children, mib) = wanted.split_once(',').expect("two numbers");
    let (children, mib): (u64, u64) = (children.parse().expect("a number"), mib.parse().expect("a number"));
    let kinds = if children < 64 { vec![FsKind::Ext4, FsKind::Xfs, FsKind::BtrfsSeparate] } else { vec![FsKind::Ext4] };
    for kind in kinds {
        let outside = temp::scratch("space");
        let device = outside.path().join("device");
        let size = children * mib * MIB * 5 / 4 + 300 * MIB;
        fs::File::create(&device).and_then(|file| file.set_len(size)).expect("a device");
        kind.make(&device, &[]);
        let mounted = Mounted::mount(kind, &device);
        let fixture = SpaceFixture::within(mounted.path());
        fixture.create("root.vhd", &["--size", "8G"]);
        let (daemon, mut client) = fixture.serve("root.vhd", &[]);
        fixture.scatter(&mut client, 8 * GIB, 100);
        drop(client);
        daemon.stop();
        let before = mounted.available();
        let names: Vec<String> = (0..children).map(|n| format!("child{n}.vhd")).collect();
        names.iter().for_each(|name| fixture.create(name, &["--parent", "root.vhd"]));
        let served: Vec<_> = names.iter().map(|name| fixture.serve(name, &[])).collect();
        let mut clients: Vec<_> = served;
        // The writes resemble a guest's files: pieces of 256 KiB at scattered places.
        let piece = vec![0x5A; 256 << 10];
        for number in 0..mib * 4 {
            for (_, client) in &mut clients {
                let at = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (8 * GIB / (256 << 10)) * (256 << 10);
                client.write(at, &piece).expect("a write");
            }
        }
        clients.iter_mut().for_each(|(_, client)| client.flush().expect("a flush"));
        let taken = before - mounted.available();
        let written = children * mib * MIB;
        eprintln!("{}: {children} children wrote {} MiB and take {} MiB", kind.name(), written / MIB, taken / MIB);
        assert!(taken < written * 6 / 5, "{}: {} MiB for {} MiB", kind.name(), taken / MIB, written / MIB);
        for (daemon, client) in clients {
            drop(client);
            daemon.stop();
        }
    }
}
