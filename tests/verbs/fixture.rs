//! Chains for the tests of verbs, on any host. Tests create them with the library, write runs of sectors, and read
//! whole disks.

use std::path::{Path, PathBuf};

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy, Source, Version};
use diffdisk::error::Result;
use diffdisk::image::{self, Commit, Durability, Growth};
use diffdisk::ops::create::{ChildSpec, Locators, RootSpec};
use diffdisk::ops::{self, SourceDisk, SourceFormat};
use diffdisk::storage::Env;
use diffdisk::units::{BlockSize, SECTOR, SectorRange};

use crate::common::pattern;

/// The contents of sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fill<'a> {
    /// The pattern of a tag.
    Tag(&'a str),
    /// Zeros that are written.
    Zeros,
}

/// Images in one folder of a host.
pub(crate) struct Fixture<'a> {
    pub(crate) env: &'a dyn Env,
    pub(crate) folder: PathBuf,
}

impl<'a> Fixture<'a> {
    pub(crate) fn new(env: &'a dyn Env, folder: &Path) -> Fixture<'a> {
        Fixture { env, folder: folder.to_path_buf() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn fixed(&self, name: &str, sectors: u64) {
        let root = RootSpec {
            fixed: true,
            size: sectors * SECTOR,
            block_size: BlockSize::DEFAULT,
            reserve: 0,
            preallocate: false,
        };
        ops::create::root(self.env, &self.path(name), &root).expect("a fixed root");
    }

    pub(crate) fn dynamic(&self, name: &str, block: u32, sectors: u64) {
        let block_size = BlockSize::from_bytes(block).expect("a block size");
        let root = RootSpec { fixed: false, size: sectors * SECTOR, block_size, reserve: 0, preallocate: false };
        ops::create::root(self.env, &self.path(name), &root).expect("a dynamic root");
    }

    /// Makes a child with the size of its parent.
    pub(crate) fn child(&self, name: &str, parent: &str, block: u32) {
        self.sized_child(name, parent, block, None);
    }

    /// Makes a child with `sectors` sectors, or with the size of its parent if `sectors` is `None`.
    pub(crate) fn sized_child(&self, name: &str, parent: &str, block: u32, sectors: Option<u64>) {
        let child = ChildSpec {
            parent: self.path(parent),
            size: sectors.map(|sectors| sectors * SECTOR),
            block_size: BlockSize::from_bytes(block),
            reserve: 0,
            locators: Locators::Both,
            preallocate: false,
        };
        ops::create::child(self.env, &self.path(name), &child, &Policy::default()).expect("a child");
    }

    /// Writes runs of sectors and closes the image cleanly.
    pub(crate) fn write(&self, name: &str, runs: &[(u64, u64, Fill<'_>)]) {
        let filled = runs.iter().map(|&(from, to, fill)| {
            let mut bytes = vec![0; usize::try_from((to - from) * SECTOR).expect("small")];
            if let Fill::Tag(tag) = fill {
                pattern::fill(&mut bytes, tag, from);
            }
            (SectorRange::between(from, to), bytes)
        });
        write(self.env, &self.path(name), filled).expect("it can be written");
    }

    /// Reads the whole disk.
    pub(crate) fn read_disk(&self, name: &str) -> Result<Vec<u8>> {
        let disk = SourceDisk::open(self.env, &self.path(name), SourceFormat::Vhd, &Policy::default())?;
        let mut bytes = Vec::new();
        ops::convert::stream(&disk, &mut bytes, 1, &mut |_| Ok(()))?;
        Ok(bytes)
    }

    /// Returns the kinds of defects that `check --chain` finds.
    pub(crate) fn defects(&self, name: &str) -> Vec<&'static str> {
        let (path, policy) = (self.path(name), Policy::default());
        let report = ops::check::check(self.env, &path, Some(&policy), &[], &mut |_| Ok(())).expect("a check");
        report.defects.iter().map(|defect| defect.kind).collect()
    }
}

/// Writes runs of sectors to an image and closes it cleanly.
pub(crate) fn write(env: &dyn Env, path: &Path, runs: impl IntoIterator<Item = (SectorRange, Vec<u8>)>) -> Result<()> {
    let version =
        Chain::open(env, path, &Policy::default(), OpenMode::Write)?.into_writable(env, &Durability::FlushOnly)?;
    for (range, bytes) in runs {
        put(env, &version, range, &bytes)?;
    }
    let top = version.top().expect("opened to be written");
    let mut commit = Commit::new(top.image.clone(), top.slot);
    image::run_to_completion(env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops))?;
    top.image.trim()
}

fn put(env: &dyn Env, version: &Version, range: SectorRange, bytes: &[u8]) -> Result<()> {
    let (mut plan, top) = (PlanBuffer::default(), version.top().expect("opened to be written"));
    loop {
        match version.plan_write(range, &mut plan) {
            Ok(()) if plan.missing.is_empty() => break,
            Ok(()) => version.load_now(&plan.missing, &mut diffdisk::image::Pins::default())?,
            Err(_) => {
                let mut growth = Growth::begin(&top.image, top.slot).expect("there is no room");
                image::run_to_completion(env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))?;
            }
        }
    }
    let mut rest = bytes;
    for extent in &plan.extents {
        let Source::File { slot, offset } = extent.source else { panic!("a write goes into a file") };
        let (now, later) = rest.split_at(usize::try_from(extent.range.bytes()).expect("small"));
        version.file(slot).write_at(now, offset)?;
        rest = later;
    }
    assert_eq!(top.image.mark(range), Ok(true), "no journal is in use");
    Ok(())
}

/// Returns the bytes of a disk of zeros to which the runs were written.
pub(crate) fn disk(sectors: u64, runs: &[(u64, u64, Fill<'_>)]) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(sectors * SECTOR).expect("small")];
    overwrite(&mut bytes, runs);
    bytes
}

/// Writes runs to the bytes of a disk.
pub(crate) fn overwrite(disk: &mut [u8], runs: &[(u64, u64, Fill<'_>)]) {
    for &(from, to, fill) in runs {
        let run = usize::try_from(from * SECTOR).expect("small")..usize::try_from(to * SECTOR).expect("small");
        match fill {
            Fill::Tag(tag) => pattern::fill(&mut disk[run], tag, from),
            Fill::Zeros => disk[run].fill(0),
        }
    }
}
