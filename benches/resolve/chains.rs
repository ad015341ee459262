//! Chains whose blocks are fragmented over their layers, created through the library.
#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy, Version};
use diffdisk::disk::{Disk, DiskOptions, Outcome, Request, WhenFull, Work};
use diffdisk::image::Durability;
use diffdisk::storage::{EngineKind, Env, GuestIovecs};
use diffdisk::units::SectorRange;

use super::null::NullEnv;

const HOST: NullEnv = NullEnv { idle: None };

/// Number of blocks of the disk, of 2 MiB each.
pub const BLOCKS: u64 = 32;
const BLOCK_SECTORS: u64 = 4096;

/// Fragmentation of the data of a block.
#[derive(Clone, Copy, Debug)]
pub enum Fragmentation {
    /// One layer has the whole block.
    Whole,
    /// A number of runs of equal length. Every second run has no data, and the other runs are in the layers in
    /// rotation.
    Runs(u64),
}

/// Opens a chain for serving: an empty child over `depth` layers with the data, over an empty root. (The root is empty,
/// because blocks of a root cannot be fragmented.)
pub fn version(folder: &Path, depth: u64, cut: Fragmentation) -> Version {
    let top = make(folder, depth, cut);
    let chain =
        Chain::open(&HOST, &top, &Policy::default(), OpenMode::Write).unwrap_or_else(|e| panic!("{}", e.line()));
    chain.into_writable(&HOST, &Durability::FlushOnly).unwrap_or_else(|e| panic!("{}", e.line()))
}

/// Resolves all sectors once, so that only cached look-ups remain.
pub fn plan_all(version: &Version) {
    let mut plan = PlanBuffer::default();
    for block in 0..BLOCKS {
        let range = SectorRange::between(block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
        version.plan_read_now(range, &mut plan).unwrap_or_else(|e| panic!("{}", e.line()));
    }
}

/// Opens a disk.
pub fn open(env: Arc<dyn Env>, path: &Path) -> Arc<Disk> {
    let options = DiskOptions { when_full: WhenFull::Fail, ..DiskOptions::new(path) };
    Disk::open(env, &options).unwrap_or_else(|e| panic!("{}", e.line()))
}

/// Creates the files of the chain. Returns the path of the youngest.
pub fn make(folder: &Path, depth: u64, cut: Fragmentation) -> PathBuf {
    std::fs::create_dir(folder).expect("a folder of our own");
    let name = |layer: u64| folder.join(format!("{layer}.vhd"));
    for layer in 0..=depth + 1 {
        let mut create = Command::new(env!("CARGO_BIN_EXE_diffdisk"));
        create.args(["create", "--quiet"]).arg(name(layer));
        match layer {
            0 => create.args(["--size", &(BLOCKS * BLOCK_SECTORS * 512).to_string()]),
            _ => create.arg("--parent").arg(name(layer - 1)),
        };
        assert!(create.status().is_ok_and(|s| s.success()), "{create:?}");
        if (1..=depth).contains(&layer) {
            fill(&name(layer), layer - 1, depth, cut);
        }
    }
    name(depth + 1)
}

fn fill(path: &Path, layer: u64, depth: u64, cut: Fragmentation) {
    let disk = open(Arc::new(HOST), path);
    let mut lane = disk.lane(EngineKind::Auto, 64).unwrap_or_else(|e| panic!("{}", e.line()));
    let memory: Arc<Box<[u8]>> = Arc::new(vec![7; 2 << 20].into());
    let mut answers = Vec::new();
    for block in 0..BLOCKS {
        let runs = match cut {
            Fragmentation::Whole => 1,
            Fragmentation::Runs(runs) => runs,
        };
        let len = BLOCK_SECTORS / runs;
        for run in (0..runs).step_by(2).filter(|run| (block + run / 2) % depth == layer) {
            let start = block * BLOCK_SECTORS + run * len;
            let mut from = GuestIovecs::new(memory.clone(), 1);
            // SAFETY: `push` requires that the range stays mapped as long as the owner of the list exists. The owner is
            // `memory`, a boxed slice of 2 MiB that is never reallocated, and `len * 512` is at most 2 MiB. A write
            // request only reads the range, and no code changes the slice.
            unsafe { from.push(memory.as_ptr().cast_mut(), (len * 512) as usize) };
            lane.push(Request { tag: 0, work: Work::Write { range: SectorRange::between(start, start + len), from } });
            lane.drain(&mut answers).expect("the engine works");
        }
    }
    assert!(answers.iter().all(|a| a.outcome == Outcome::Done));
    drop(lane);
    disk.close().unwrap_or_else(|e| panic!("{}", e.line()));
}
