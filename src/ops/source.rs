//! A disk as runs: where it has data, past its holes, and what it says there. Under every verb that reads disks.
//!
//! A chain is walked by plans, and what no layer has a block for is stepped over by looking at the block tables alone,
//! so that an empty disk costs next to nothing whatever its size. Runs in files are clipped to what is no hole there.

use std::path::Path;

use uuid::Uuid;

use crate::chain::{Chain, Extent, Layer, OpenMode, PlanBuffer, Policy, Source, Version};
use crate::error::Result;
use crate::format::ImageFormat;
use crate::format::image_format::PROBE_BYTES;
use crate::image::{is_zero, next_data};
use crate::storage::{Access, Buffer, Env, File, FileSlot, Lock};
use crate::units::{SECTOR, SectorRange};

/// Sectors planned at once: 64 MiB.
pub(super) const WINDOW_SECTORS: u64 = 1 << 17;
/// Bytes read at once, at most.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// Sectors of that.
pub(super) const CHUNK_SECTORS: u64 = CHUNK_BYTES as u64 / SECTOR;
/// Bytes that are looked at together when zeros are sought.
pub(super) const PAGE_BYTES: usize = 4096;

/// Here with the number of bytes of the disk done in total.
pub use crate::units::OnProgress as Progress;

/// How the bytes of a file are to be taken. It is declared, never probed: a guest could write what looks like a VHD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceFormat {
    /// The disk itself.
    Raw,
    /// A VHD and its parents.
    Vhd,
}

/// A disk to be read, locked against writers.
pub enum SourceDisk {
    /// A chain of VHDs.
    Chain(Version),
    /// A raw file or block device of so many bytes.
    Raw(File, u64),
}

impl SourceDisk {
    /// Opens the disk at `path`.
    ///
    /// # Errors
    /// Whatever is wrong with a file of the chain; `Busy` where somebody writes to one.
    pub fn open(env: &dyn Env, path: &Path, format: SourceFormat, policy: &Policy) -> Result<SourceDisk> {
        if format == SourceFormat::Raw {
            let file = env.open_disk(path, Access::Read)?;
            file.lock(Lock::Shared)?;
            let len = file.stat()?.len;
            return Ok(SourceDisk::Raw(file, len));
        }
        Ok(SourceDisk::Chain(Chain::open(env, path, policy, OpenMode::Read)?.into_frozen()))
    }

    /// Bytes of the disk. Those of a raw file need not fill its last sector.
    pub fn bytes(&self) -> u64 {
        match self {
            SourceDisk::Chain(version) => version.sectors() * SECTOR,
            SourceDisk::Raw(_, len) => *len,
        }
    }

    /// The identity of the youngest image; `None` for a raw disk.
    pub fn uuid(&self) -> Option<Uuid> {
        match self {
            SourceDisk::Chain(version) => version.frozen().layers().first().map(|layer| layer.image.uuid()),
            SourceDisk::Raw(..) => None,
        }
    }

    /// The format of images that a raw disk begins as, for a warning; `None` for a chain.
    ///
    /// # Errors
    /// `Io`.
    pub fn container(&self) -> Result<Option<ImageFormat>> {
        let SourceDisk::Raw(file, len) = self else { return Ok(None) };
        let (mut head, mut tail) = ([0; PROBE_BYTES], [0; PROBE_BYTES]);
        let there = head.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
        file.read_at(&mut head[..there], 0)?;
        // A fixed VHD has its footer at the end alone.
        if *len >= PROBE_BYTES as u64 {
            file.read_at(&mut tail, len - PROBE_BYTES as u64)?;
        }
        let at_end = ImageFormat::probe(&tail).filter(|format| *format == ImageFormat::Vhd);
        Ok(ImageFormat::probe(&head[..there]).or(at_end))
    }

    /// Sectors of the disk, the last one perhaps not full.
    pub fn sectors(&self) -> u64 {
        self.bytes().div_ceil(SECTOR)
    }

    /// Reads a range that begins on the disk. What lies behind the end of the disk is zero.
    ///
    /// # Errors
    /// `Io`, naming file and offset.
    pub(super) fn read(&self, range: SectorRange, into: &mut [u8], plan: &mut PlanBuffer) -> Result<()> {
        let start = range.start() * SECTOR;
        let there = usize::try_from(self.bytes().saturating_sub(start)).unwrap_or(usize::MAX).min(into.len());
        let (disk, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        match self {
            SourceDisk::Chain(version) => version.read_now(range.first(there as u64 / SECTOR), disk, plan),
            SourceDisk::Raw(file, _) => file.read_at(disk, start),
        }
    }

    /// The runs that may hold data.
    pub(super) fn data_runs(&self) -> DataRuns<'_> {
        self.data_runs_from(0)
    }

    /// As [`Disk::data`], from a sector on.
    pub(super) fn data_runs_from(&self, sector: u64) -> DataRuns<'_> {
        let runs = match self {
            SourceDisk::Chain(version) => RunCursor::Chain(Extents::from(version, sector)),
            SourceDisk::Raw(file, _) => RunCursor::Raw(file, sector * SECTOR),
        };
        DataRuns { sectors: self.sectors(), cursor: runs, last_data: FileDataRun::default(), rest: None }
    }
}

/// The extents of a chain from its first sector to its last, without gaps.
pub(super) struct Extents<'a> {
    version: &'a Version,
    at: u64,
    /// Per layer: the first sector at or after `at`, when it was last asked, that the layer has a place for.
    next_allocated: Vec<u64>,
    plan: PlanBuffer,
    next: usize,
    /// What is read on the way is forgotten.
    uncached: bool,
}

impl<'a> Extents<'a> {
    pub(super) fn new(version: &'a Version) -> Extents<'a> {
        Extents::from(version, 0)
    }

    /// As [`Extents::new`], from sector `at` on.
    pub(super) fn from(version: &'a Version, at: u64) -> Extents<'a> {
        let placed = version.frozen().layers().iter().map(|layer| next_allocated(layer, at)).collect();
        Extents { version, at, next_allocated: placed, plan: PlanBuffer::default(), next: 0, uncached: false }
    }

    /// For who asks nothing else of the version: what is read on the way is forgotten.
    pub(super) fn uncached(self) -> Extents<'a> {
        Extents { uncached: true, ..self }
    }

    pub(super) fn next(&mut self) -> Result<Option<Extent>> {
        loop {
            if let Some(extent) = self.plan.extents.get(self.next) {
                self.next += 1;
                return Ok(Some(*extent));
            }
            let (from, sectors) = (self.at, self.version.sectors());
            if from >= sectors {
                return Ok(None);
            }
            self.at = self.first_allocated(from).min(sectors);
            if self.at > from {
                return Ok(Some(Extent { range: SectorRange::between(from, self.at), source: Source::Zero }));
            }
            self.at = (from + WINDOW_SECTORS).min(sectors);
            let window = SectorRange::between(from, self.at);
            match self.uncached {
                true => self.version.plan_read_uncached(window, &mut self.plan)?,
                false => self.version.plan_read_now(window, &mut self.plan)?,
            }
            self.next = 0;
        }
    }

    /// The first sector at or after `from` that any layer has a place for. Each table is passed once in all.
    fn first_allocated(&mut self, from: u64) -> u64 {
        for (placed, layer) in self.next_allocated.iter_mut().zip(self.version.frozen().layers()) {
            if *placed < from {
                *placed = next_allocated(layer, from);
            }
        }
        self.next_allocated.iter().copied().min().unwrap_or(u64::MAX).max(from)
    }
}

/// The first sector at or after `from` that a layer has a place for; the largest number where there is none.
pub(super) fn next_allocated(layer: &Layer, from: u64) -> u64 {
    if from >= layer.image.size() / SECTOR {
        return u64::MAX;
    }
    let (Some(table), Some(block_size)) = (layer.image.bat(), layer.image.block_size()) else { return from };
    let block = table.next_used(block_size.block_at(from));
    block.map_or(u64::MAX, |block| block_size.sectors_of(block).start().max(from))
}

enum RunCursor<'a> {
    Chain(Extents<'a>),
    Raw(&'a File, u64),
}

/// The runs of a disk that may hold data, ascending. What is not named is zero.
pub(super) struct DataRuns<'a> {
    sectors: u64,
    cursor: RunCursor<'a>,
    last_data: FileDataRun,
    /// What is left of the last extent.
    rest: Option<Extent>,
}

/// A run of a file that is known to be no hole.
#[derive(Default)]
struct FileDataRun {
    slot: Option<FileSlot>,
    start: u64,
    end: u64,
}

impl DataRuns<'_> {
    pub(super) fn next(&mut self) -> Result<Option<SectorRange>> {
        match &mut self.cursor {
            RunCursor::Raw(file, at) => {
                let Some(found) = next_data(file, *at..u64::MAX)? else { return Ok(None) };
                let start = (found.start / SECTOR).max(at.div_ceil(SECTOR));
                let run = SectorRange::between(start, found.end.div_ceil(SECTOR));
                let run = run.clip(SectorRange::between(0, self.sectors));
                *at = run.end() * SECTOR;
                Ok((!run.is_empty()).then_some(run))
            }
            RunCursor::Chain(extents) => loop {
                let extent = match self.rest.take() {
                    Some(extent) => extent,
                    None => match extents.next()? {
                        Some(extent) => extent,
                        None => return Ok(None),
                    },
                };
                let Source::File { slot, offset } = extent.source else { continue };
                let (range, seen) = (extent.range, &mut self.last_data);
                if seen.slot != Some(slot) || offset < seen.start || offset >= seen.end {
                    let found = next_data(extents.version.file(slot), offset..u64::MAX)?;
                    let (start, end) = found.map_or((u64::MAX, u64::MAX), |found| (found.start, found.end));
                    *seen = FileDataRun { slot: Some(slot), start, end };
                }
                let hole = (seen.start.saturating_sub(offset) / SECTOR).min(range.count());
                let data = (seen.end - offset).div_ceil(SECTOR).min(range.count()) - hole;
                let (run, rest) = (range.skip(hole).first(data), range.skip(hole + data));
                if !rest.is_empty() {
                    let offset = offset + (hole + data) * SECTOR;
                    self.rest = Some(Extent { range: rest, source: Source::File { slot, offset } });
                }
                if !run.is_empty() {
                    return Ok(Some(run));
                }
            },
        }
    }
}

/// Reads all of a disk that is not zero, in ascending runs of at most [`CHUNK`] bytes, and hands it to `put`.
pub(super) fn for_each_data_run(
    disk: &SourceDisk,
    progress: &mut Progress<'_>,
    mut put: impl FnMut(SectorRange, &[u8]) -> Result<()>,
) -> Result<()> {
    let (mut data, mut plan) = (disk.data_runs(), PlanBuffer::default());
    let mut buffer = Buffer::zeroed(CHUNK_BYTES);
    while let Some(run) = data.next()? {
        let mut rest = run;
        while !rest.is_empty() {
            let piece = rest.first(CHUNK_SECTORS - rest.start() % CHUNK_SECTORS);
            rest = rest.skip(piece.count());
            let bytes = &mut buffer[..usize::try_from(piece.bytes()).expect("at most a chunk")];
            disk.read(piece, bytes, &mut plan)?;
            for (at, len) in
                nonzero_runs(bytes, usize::try_from(piece.start() * SECTOR % PAGE_BYTES as u64).expect("in a page"))
            {
                put(piece.skip(at as u64 / SECTOR).first(len as u64 / SECTOR), &bytes[at..at + len])?;
            }
            progress((piece.end() * SECTOR).min(disk.bytes()))?;
        }
    }
    progress(disk.bytes())
}

/// The runs (place, length) of pages that are not zero, in bytes that begin so far into a page.
pub(super) fn nonzero_runs(bytes: &[u8], into_page: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    let page = move |at: usize| {
        let end = bytes.len().min((at + into_page) / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES - into_page);
        (at < bytes.len()).then(|| (end, is_zero(&bytes[at..end])))
    };
    std::iter::from_fn(move || {
        while let Some((end, true)) = page(at) {
            at = end;
        }
        let start = at;
        while let Some((end, false)) = page(at) {
            at = end;
        }
        (at > start).then(|| (start, at - start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_found_wherever_the_run_begins() {
        let mut bytes = vec![0; 5 * PAGE_BYTES - 512];
        let runs = |bytes: &[u8]| nonzero_runs(bytes, 512).collect::<Vec<_>>();
        assert_eq!(runs(&bytes), []);
        bytes[0] = 1; // the first page lacks 512 bytes
        bytes[3 * PAGE_BYTES - 513] = 1; // the last byte of the third
        assert_eq!(runs(&bytes), [(0, PAGE_BYTES - 512), (2 * PAGE_BYTES - 512, PAGE_BYTES)]);
        bytes[3 * PAGE_BYTES - 512] = 1;
        bytes[5 * PAGE_BYTES - 513] = 1;
        assert_eq!(runs(&bytes), [(0, PAGE_BYTES - 512), (2 * PAGE_BYTES - 512, 3 * PAGE_BYTES)]);
    }
}
