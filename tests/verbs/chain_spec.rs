//! Descriptions of chains: the layers, the writes to each layer, and the disk that each layer must show. A chain can be
//! built on any host.

use std::path::{Path, PathBuf};

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy};
use diffdisk::error::Result;
use diffdisk::image::{self, Image, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::{Access, Env};
use diffdisk::units::{BlockSize, SectorRange};

/// The contents of a sector: 0 for zeros, otherwise a pattern of this byte and the sector's number.
pub(crate) type Value = u8;

/// A layer. Its size and the positions of its writes are in units of [`ChainSpec::scale`] sectors.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) name: &'static str,
    /// Index of the parent, which is an earlier layer; `None` for a root.
    pub(crate) parent: Option<usize>,
    pub(crate) fixed: bool,
    /// Block size in bytes if the scale is 1.
    pub(crate) block: u32,
    pub(crate) sectors: u64,
    /// Writes: start, end, value.
    pub(crate) writes: Vec<(u64, u64, Value)>,
}

/// Layers with their parents. Parents come before their children.
#[derive(Clone, Debug)]
pub(crate) struct ChainSpec {
    pub(crate) layers: Vec<Layer>,
    /// Number of sectors in a unit. Block sizes are multiplied by the same number.
    pub(crate) scale: u32,
}

impl ChainSpec {
    pub(crate) fn sectors(&self, layer: usize) -> u64 {
        self.layers[layer].sectors * u64::from(self.scale)
    }

    /// Returns the expected value of each sector of a layer's disk.
    pub(crate) fn expected(&self, layer: usize) -> Vec<Value> {
        let it = &self.layers[layer];
        let mut values = it.parent.map_or_else(Vec::new, |parent| self.expected(parent));
        values.resize(usize::try_from(self.sectors(layer)).expect("small"), 0);
        for &(from, to, value) in &it.writes {
            let at = |unit: u64| usize::try_from(unit * u64::from(self.scale)).expect("small");
            values[at(from)..at(to)].fill(value);
        }
        values
    }

    pub(crate) fn path(&self, folder: &Path, layer: usize) -> PathBuf {
        folder.join(self.layers[layer].name)
    }

    /// Creates the images of all layers in `folder`.
    pub(crate) fn build(&self, env: &dyn Env, folder: &Path) -> Result<()> {
        for (number, layer) in self.layers.iter().enumerate() {
            let path = self.path(folder, number);
            let kind = match layer.parent {
                None if layer.fixed => ImageKind::Fixed,
                None => ImageKind::Dynamic,
                Some(parent) => {
                    let at = self.path(folder, parent);
                    let uuid = Image::open(env.open(&at, Access::Read)?)?.uuid();
                    let name = PathBuf::from(self.layers[parent].name);
                    let (relative, absolute) = (Some(name.clone()), Some(at));
                    ImageKind::Differencing(ParentLink { uuid, modified: 0, relative, absolute, name })
                }
            };
            let block_size = BlockSize::from_bytes(layer.block * self.scale).expect("a size of blocks");
            image::create(env, &path, &ImageSpec { kind, size: self.sectors(number) * 512, block_size, reserve: 0 })?;
            fill(env, &path, &layer.writes, self.scale.into())?;
        }
        Ok(())
    }
}

/// Writes values to an image and closes it. Zeros are written, too.
pub(crate) fn fill(env: &dyn Env, path: &Path, writes: &[(u64, u64, Value)], scale: u64) -> Result<()> {
    let runs = writes.iter().map(|&(from, to, value)| {
        let range = SectorRange::between(from * scale, to * scale);
        (range, bytes(range, |_| value))
    });
    crate::fixture::write(env, path, runs)
}

/// Returns the contents of sectors with these values.
pub(crate) fn bytes(range: SectorRange, value: impl Fn(u64) -> Value) -> Vec<u8> {
    let mut all = Vec::with_capacity(usize::try_from(range.bytes()).expect("small"));
    for sector in range.start()..range.end() {
        let mut one = [value(sector); 512];
        if one[0] != 0 {
            one[..8].copy_from_slice(&sector.to_be_bytes());
        }
        all.extend_from_slice(&one);
    }
    all
}

/// Compares a disk with the expected values. The error names the first sector that differs.
pub(crate) fn check_disk(env: &dyn Env, path: &Path, values: &[Value]) -> Result<(), String> {
    let open = || Ok(Chain::open(env, path, &Policy::default(), OpenMode::Read)?.into_frozen());
    let version = open().map_err(|e: diffdisk::error::Error| e.line())?;
    let range = SectorRange::between(0, version.sectors());
    let mut read = vec![0; usize::try_from(range.bytes()).expect("small")];
    version.read_now(range, &mut read, &mut PlanBuffer::default()).map_err(|e| e.line())?;
    let want = bytes(SectorRange::between(0, values.len() as u64), |sector| values[usize::try_from(sector).unwrap()]);
    if let Some(sector) = read.chunks(512).zip(want.chunks(512)).position(|(a, b)| a != b) {
        let (got, want) = (&read[sector * 512..][..16], &want[sector * 512..][..16]);
        return Err(format!("{}: sector {sector} is {got:?}, expected {want:?}", path.display()));
    }
    if read.len() == want.len() { Ok(()) } else { Err(format!("{}: {} bytes", path.display(), read.len())) }
}

/// Returns the kinds of defects that `check` finds in a file.
pub(crate) fn defects(env: &dyn Env, path: &Path) -> Result<Vec<&'static str>> {
    let (report, _) = image::check(env.open(path, Access::Read)?)?;
    Ok(report.defects.iter().map(|defect| defect.kind()).collect())
}
