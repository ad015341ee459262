//! Chains of images made by `diffdisk`, whose parents must not change.

use super::digest::sha256_of_file;
use super::rng::Rng;
use super::tool::diffdisk;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A chain in one folder, and the SHA-256 of every layer that has become a parent.
pub struct Chain {
    folder: TempDir,
    layers: Vec<PathBuf>,
    frozen: Vec<String>,
}

impl Chain {
    /// Makes a chain of one dynamic root of `mebibytes` MiB. Every second MiB contains random bytes from `seed`, so
    /// that a child which fails to hide its parent's data is noticed.
    pub fn with_root(mebibytes: u64, seed: u64) -> Self {
        println!("seed of the root's contents: {seed}");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let raw = folder.path().join("root.raw");
        write_pattern(&raw, mebibytes, seed);
        let root = folder.path().join("root.vhd");
        diffdisk([
            OsStr::new("convert"),
            raw.as_os_str(),
            root.as_os_str(),
            OsStr::new("--to"),
            OsStr::new("dynamic"),
            OsStr::new("--from"),
            OsStr::new("raw"),
        ])
        .ok();
        fs::remove_file(raw).expect("the raw file can be removed");
        Self { folder, layers: vec![root], frozen: Vec::new() }
    }

    /// Makes a child of the top image and records the parent's hash, since the parent must not change from then on.
    pub fn push_child(&mut self, name: &str) {
        let parent = self.top().to_owned();
        self.frozen.push(sha256_of_file(&parent));
        let child = self.folder.path().join(name);
        diffdisk([OsStr::new("create"), child.as_os_str(), OsStr::new("--parent"), parent.as_os_str()]).ok();
        self.layers.push(child);
    }

    /// Returns the path of the youngest layer.
    pub fn top(&self) -> &Path {
        self.layers.last().expect("a chain has a root")
    }

    /// Returns the number of bytes allocated to the file of the youngest layer.
    pub fn top_allocated(&self) -> u64 {
        fs::metadata(self.top()).expect("the top is there").blocks() * 512
    }

    /// Panics if a parent has changed or `diffdisk check` finds a defect in a layer.
    pub fn assert_sound(&self) {
        for (layer, before) in self.layers.iter().zip(&self.frozen) {
            assert_eq!(&sha256_of_file(layer), before, "the parent {} has changed", layer.display());
        }
        diffdisk([OsStr::new("check"), self.top().as_os_str(), OsStr::new("--chain")]).ok();
    }
}

fn write_pattern(path: &Path, mebibytes: u64, seed: u64) {
    let file = File::create_new(path).expect("the raw file is new");
    file.set_len(mebibytes * MIB).expect("the raw file can be that long");
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::new();
    for start in (0..mebibytes).step_by(2) {
        bytes.clear();
        while (bytes.len() as u64) < MIB {
            bytes.extend_from_slice(&rng.next().to_be_bytes());
        }
        file.write_all_at(&bytes, start * MIB).expect("the raw file can be written");
    }
}
