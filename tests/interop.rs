//! Chains made by `diffdisk create` and filled by a guest through the daemon must read the same with QEMU, 7-Zip and
//! vhd-lib.
//!
//! Each reader is used only for images that it reads correctly: QEMU for images without a parent, vhd-lib for chains
//! with one block size, of 512 KiB or more, and no fixed root.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::client::{Client, MAX_REQUEST_BYTES};
use common::daemon::Daemon;
use common::rng::Rng;
use common::temp::{self, RuntimeDir};
use common::{pattern, tool};

const MIB: u64 = 1 << 20;

/// A chain of files, and the contents of the disk that a guest must see.
struct Chain {
    folder: tempfile::TempDir,
    files: Vec<PathBuf>,
    disk: Vec<u8>,
}

impl Chain {
    /// Creates `depth` layers, root first, and runs a guest on each. The root is created with the options `root`;
    /// children inherit its block size.
    fn build(name: &str, size: u64, root: &[&str], depth: usize, rng: &mut Rng) -> Chain {
        let folder = temp::scratch(name);
        let mut chain =
            Chain { folder, files: Vec::new(), disk: vec![0; usize::try_from(size).expect("a small disk")] };
        for layer in 0..depth {
            let path = chain.folder.path().join(format!("l{layer}.vhd"));
            let mut args = vec!["create".to_owned(), path.display().to_string()];
            match chain.files.last() {
                None => {
                    args.extend(["--size".into(), size.to_string()]);
                    args.extend(root.iter().map(ToString::to_string));
                }
                Some(parent) => args.extend(["--parent".into(), parent.display().to_string()]),
            }
            tool::diffdisk(args).ok();
            chain.files.push(path.clone());
            let daemon = Daemon::start(&path, &[]);
            let mut guest = daemon.connect();
            assert_eq!(guest.capacity().expect("a configuration"), size, "{name}: capacity of layer {layer}");
            chain.run_guest(&mut guest, layer, rng);
            drop(guest);
            daemon.stop();
        }
        chain
    }

    fn leaf(&self) -> &Path {
        self.files.last().expect("a chain has a layer")
    }

    /// Runs a guest on the top layer: writes, zeroes, discards, flushes. The expected contents are recorded in
    /// `self.disk`.
    fn run_guest(&mut self, guest: &mut Client, layer: usize, rng: &mut Rng) {
        let sectors = self.disk.len() as u64 / 512;
        for step in 0..60 {
            let count = 1 + rng.below(if step % 10 == 0 { 3000 } else { 40 });
            let first = rng.below(sectors - count);
            let bytes =
                usize::try_from(first * 512).expect("small")..usize::try_from((first + count) * 512).expect("small");
            let (offset, len) = (first * 512, count * 512);
            match rng.below(8) {
                0..=4 => {
                    let tag = format!("L{layer}.{step}");
                    pattern::fill(&mut self.disk[bytes.clone()], &tag, first);
                    guest.write(offset, &self.disk[bytes]).expect("a write");
                }
                5 => {
                    guest.write_zeroes(offset, len, step % 2 == 0).expect("zeroes");
                    self.disk[bytes].fill(0);
                }
                6 => {
                    guest.discard(offset, len).expect("a discard");
                    self.accept_discarded(guest, offset, bytes);
                }
                _ => guest.flush().expect("a flush"),
            }
        }
        pattern::assert_same("the guest's own view", &guest.read_all(MAX_REQUEST_BYTES).expect("reads"), &self.disk);
    }

    /// Reads discarded sectors. Each sector may keep its contents or read as zeros, and must keep the contents of this
    /// read from then on.
    fn accept_discarded(&mut self, guest: &mut Client, offset: u64, bytes: std::ops::Range<usize>) {
        let now = guest.read(offset, bytes.len()).expect("a read");
        for (old, new) in self.disk[bytes].chunks_mut(512).zip(now.chunks(512)) {
            assert!(new == old || new.iter().all(|&b| b == 0), "a discarded sector shows foreign content");
            old.copy_from_slice(new);
        }
    }

    fn assert_diffdisk(&self) {
        let args = ["convert".into(), self.leaf().display().to_string(), "-".into(), "--to".into(), "raw".into()];
        let ours = tool::diffdisk::<String>(args).ok();
        pattern::assert_same("diffdisk convert", &ours.stdout, &self.disk);
        let check = tool::diffdisk(["check".into(), self.leaf().to_path_buf(), "--chain".into()]);
        assert_eq!(check.code, Some(0), "check after a clean stop: {check:?}");
    }

    /// Panics unless all readers read the expected disk from an image without a parent. vhd-lib is one of them if
    /// `vhdlib` is true.
    fn assert_alone(&self, vhdlib: bool) {
        self.assert_diffdisk();
        self.assert_qemu();
        self.assert_sevenzip();
        if vhdlib {
            self.assert_vhdlib();
        }
    }

    /// Resizes the disk. Sectors that are cut off must read as zeros after the disk grows again.
    fn resize(&mut self, size: u64) {
        let args = ["resize".into(), self.leaf().display().to_string(), size.to_string(), "--shrink".into()];
        tool::diffdisk::<String>(args).ok();
        self.disk.resize(usize::try_from(size).expect("a small disk"), 0);
    }

    fn assert_sevenzip(&self) {
        tool::require(&["7zz"]);
        pattern::assert_same("7-Zip", &sevenzip(self.leaf()), &self.disk);
    }

    fn assert_qemu(&self) {
        tool::require(&["qemu-img"]);
        let leaf = self.leaf().display().to_string();
        let sized = format!("driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={leaf}");
        for source in [vec!["-f", "vpc", &leaf], vec!["--image-opts", &sized]] {
            let out = self.folder.path().join("qemu.raw");
            run_program(Command::new("qemu-img").args(["convert", "-O", "raw"]).args(&source).arg(&out));
            pattern::assert_same(&format!("qemu-img {source:?}"), &fs::read(out).expect("its output"), &self.disk);
        }
    }

    fn assert_vhdlib(&self) {
        tool::require(&["node", "7zz"]);
        let modules = target().join("oracles/node_modules");
        assert!(modules.join("vhd-lib").is_dir(), "{} lacks vhd-lib; run `make test`", modules.display());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles/vhdlib.js");
        let out = self.folder.path().join("vhdlib.vhd");
        let youngest_first = self.files.iter().rev();
        run_program(Command::new("node").env("NODE_PATH", modules).arg(script).arg(&out).args(youngest_first));
        pattern::assert_same("vhd-lib", &sevenzip(&out), &self.disk);
    }
}

/// Runs a program and returns its standard output. Panics if the program fails.
fn run_program(command: &mut Command) -> Vec<u8> {
    let done = tool::run(command, Duration::from_secs(60));
    assert_eq!(done.code, Some(0), "{command:?}: {}", done.stderr);
    done.stdout
}

/// Reads the disk with 7-Zip, which finds parents in the leaf's folder only.
fn sevenzip(leaf: &Path) -> Vec<u8> {
    let (folder, name) = (leaf.parent().expect("a folder"), leaf.file_name().expect("a name"));
    run_program(Command::new("7zz").current_dir(folder).args(["e", "-so", "-tVHD"]).arg(name))
}

/// Returns the target folder, into which tests/oracles/install.sh installs vhd-lib.
fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().expect("tmp lies in the target folder").to_path_buf()
}

#[test]
fn fixed_disks_are_read_alike() {
    let mut rng = Rng::from_env("fixed");
    let chain = Chain::build("interop-fixed", 3 * MIB + 1536, &["--type", "fixed"], 1, &mut rng);
    chain.assert_diffdisk();
    chain.assert_qemu();
    chain.assert_sevenzip();
    let chain = Chain::build("interop-on-fixed", 5 * MIB, &["--type", "fixed"], 3, &mut rng);
    chain.assert_diffdisk();
    chain.assert_sevenzip();
}

#[test]
fn dynamic_disks_are_read_alike() {
    let mut rng = Rng::from_env("dynamic");
    for block in ["512K", "2M"] {
        for size in [8 * MIB, 9 * MIB + 3 * 512] {
            let chain = Chain::build("interop-dynamic", size, &["--block-size", block], 1, &mut rng);
            chain.assert_diffdisk();
            chain.assert_qemu();
            chain.assert_sevenzip();
            chain.assert_vhdlib();
        }
    }
}

#[test]
fn chains_are_read_alike() {
    let mut rng = Rng::from_env("chains");
    for block in ["512K", "2M"] {
        for depth in 2..=4 {
            let chain = Chain::build("interop-chain", 9 * MIB + 512, &["--block-size", block], depth, &mut rng);
            chain.assert_diffdisk();
            chain.assert_sevenzip();
            chain.assert_vhdlib();
        }
    }
}

#[test]
fn merged_chains_are_read_alike() {
    let mut rng = Rng::from_env("merged");
    for block in ["512K", "2M"] {
        for (depth, layer) in [(4, 2), (4, 1), (3, 2)] {
            let mut chain = Chain::build("interop-merge", 9 * MIB + 512, &["--block-size", block], depth, &mut rng);
            let folded = chain.files.remove(layer);
            tool::diffdisk(["merge".into(), folded]).ok();
            chain.assert_diffdisk();
            chain.assert_sevenzip();
            chain.assert_vhdlib();
        }
    }
}

#[test]
fn reshaped_chains_are_read_alike() {
    let mut rng = Rng::from_env("reshaped");
    for block in ["512K", "2M"] {
        let mut chain = Chain::build("interop-rebase", 9 * MIB + 512, &["--block-size", block], 4, &mut rng);
        let (leaf, root) = (chain.leaf().to_path_buf(), chain.files[0].clone());
        tool::diffdisk(["rebase".into(), leaf.clone(), "--parent".into(), chain.files[1].clone()]).ok();
        chain.files.remove(2);
        chain.assert_sevenzip();
        chain.assert_vhdlib();
        tool::diffdisk(["flatten".into(), leaf.clone(), "--keep".into(), root]).ok();
        chain.files.remove(1);
        tool::diffdisk(["compact".into(), leaf.clone()]).ok();
        chain.assert_diffdisk();
        chain.assert_sevenzip();
        chain.assert_vhdlib();
        tool::diffdisk(["flatten".into(), leaf.clone()]).ok();
        chain.files = vec![leaf];
        chain.assert_alone(true);
        for size in [13 * MIB + 1024, 11 * MIB + 1536, 700 * MIB, 12 * MIB] {
            chain.resize(size);
            if size < 100 * MIB {
                chain.assert_alone(true);
            }
        }
    }
    // The BAT has no room to grow in place, so it moves after the blocks.
    let mut small = Chain::build("interop-resize", 4 * MIB, &["--block-size", "4K"], 1, &mut rng);
    small.resize(7 * MIB + 512);
    small.assert_alone(false);
    tool::diffdisk(["compact".into(), small.leaf().to_path_buf()]).ok();
    small.assert_alone(false);
    let mut fixed = Chain::build("interop-resize", 3 * MIB + 1536, &["--type", "fixed"], 1, &mut rng);
    for size in [5 * MIB + 512, 4 * MIB] {
        fixed.resize(size);
        fixed.assert_alone(false);
    }
}

#[test]
fn chains_with_small_blocks_are_read_alike() {
    let mut rng = Rng::from_env("small blocks");
    for block in ["4K", "16K"] {
        for depth in 1..=3 {
            let chain = Chain::build("interop-small", 4 * MIB + 2048, &["--block-size", block], depth, &mut rng);
            chain.assert_diffdisk();
            chain.assert_sevenzip();
        }
    }
}

/// QEMU opens a child as if it had no parent. `check --chain` must report the damage in a child to which QEMU has
/// written.
#[test]
fn check_recognises_a_child_that_qemu_has_written_to() {
    tool::require(&["qemu-io"]);
    let folder = temp::scratch("interop-qemu-child");
    let path = |name: &str| folder.path().join(name);
    let raw = pattern::sectors("root", 0, 8 << 11);
    fs::write(path("root.raw"), raw).expect("the raw disk is written");
    let text = |name: &str| path(name).display().to_string();
    tool::diffdisk(["convert", &text("root.raw"), &text("root.vhd"), "--from", "raw", "--to", "dynamic"]).ok();
    tool::diffdisk(["create", &text("child.vhd"), "--parent", &text("root.vhd")]).ok();
    tool::diffdisk(["check", &text("child.vhd"), "--chain"]).ok();
    for offset in ["4096", "5M"] {
        let write = format!("write -P 90 {offset} 512");
        run_program(Command::new("qemu-io").args(["-f", "vpc", "-c", &write]).arg(path("child.vhd")));
    }
    let check = tool::diffdisk(["check", &text("child.vhd"), "--chain", "--json"]);
    let defects = check.json()["defects"].as_array().expect("a list").clone();
    let hidden: Vec<_> = defects.iter().filter(|d| d["kind"] == "parent-hidden").collect();
    assert_eq!((check.code, hidden.len(), defects.len()), (Some(3), 2, 2), "{defects:?}");
    assert!(hidden.iter().all(|d| d["repairable"] == false && d["detail"].as_str().expect("text").contains("QEMU")));
    let alone = tool::diffdisk(["check", &text("child.vhd"), "--json"]);
    assert_eq!((alone.code, &alone.json()["defects"][0]["kind"]), (Some(4), &"placed-by-another".into()));
}

#[test]
fn killed_images_are_read_alike() {
    let mut rng = Rng::from_env("killed");
    for (depth, qemu) in [(1, true), (3, false)] {
        let runtime = RuntimeDir::new();
        let mut chain = Chain::build("killed", 24 * MIB, &["--block-size", "2M"], depth, &mut rng);
        let daemon = Daemon::start(chain.leaf(), &[runtime.option()]);
        let mut guest = daemon.connect();
        chain.run_guest(&mut guest, depth, &mut rng);
        guest.flush().expect("a flush");
        drop(guest);
        daemon.kill();
        let info = || tool::diffdisk(["info".into(), chain.leaf().display().to_string(), "--json".into()]).ok().json();
        // Requests in flight, and with them the lock, may outlast the process for a moment.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !info()["in_use"].is_null() {
            assert!(Instant::now() < deadline, "still in use: {}", info());
            sleep(Duration::from_millis(10));
        }
        assert_eq!(info()["session"]["open"], true, "the stamp is there: {}", info());
        if qemu {
            chain.assert_qemu();
        }
        chain.assert_sevenzip();
        chain.assert_vhdlib();
        tool::diffdisk(["settle", &chain.leaf().display().to_string(), runtime.option()]).ok();
        chain.assert_diffdisk();
    }
}
