//! Reading a disk for a verb: a chain of VHDs, or a raw file or device.
//!
//! [`DataRuns`] returns the ranges that may contain data. Ranges for which no layer has a block ([`Extents`]) and holes
//! in the files are skipped.

use std::path::Path;

use uuid::Uuid;

use super::extents::Extents;
use super::zero_scan::{PAGE_BYTES, nonzero_runs};
use crate::chain::{Chain, Extent, OpenMode, PlanBuffer, Policy, Source, Version};
use crate::error::Result;
use crate::format::ImageFormat;
use crate::format::image_format::PROBE_BYTES;
use crate::image::next_data;
use crate::storage::{Access, Buffer, Env, File, FileSlot, Lock};
use crate::units::{SECTOR, SectorRange};

/// Maximum number of bytes of a read.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// [`CHUNK_BYTES`] in sectors.
pub(super) const CHUNK_SECTORS: u64 = CHUNK_BYTES as u64 / SECTOR;

pub use crate::units::OnProgress as Progress;

/// Format of a source. The user declares the format. The contents never decide the format, because a guest could write
/// bytes that look like a VHD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceFormat {
    /// A file or device with the bytes of the disk.
    Raw,
    /// A VHD and its parents.
    Vhd,
}

/// A disk that is open for reading and locked against writers.
pub enum SourceDisk {
    /// A chain of VHDs.
    Chain(Version),
    /// A raw file or block device, and its length in bytes.
    Raw(File, u64),
}

impl SourceDisk {
    /// Opens the disk at `path`.
    ///
    /// # Errors
    /// - `Busy` if another process holds an exclusive lock on a file
    /// - `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for a file of the chain
    pub fn open(env: &dyn Env, path: &Path, format: SourceFormat, policy: &Policy) -> Result<SourceDisk> {
        if format == SourceFormat::Raw {
            let file = env.open_disk(path, Access::Read)?;
            file.lock(Lock::Shared)?;
            let len = file.stat()?.len;
            return Ok(SourceDisk::Raw(file, len));
        }
        Ok(SourceDisk::Chain(Chain::open(env, path, policy, OpenMode::Read)?.into_frozen()))
    }

    /// Returns the size of the disk in bytes. The size of a raw file need not be a multiple of the sector size.
    pub fn bytes(&self) -> u64 {
        match self {
            SourceDisk::Chain(version) => version.sectors() * SECTOR,
            SourceDisk::Raw(_, len) => *len,
        }
    }

    /// Returns the UUID of the youngest image, or `None` for a raw disk.
    pub fn uuid(&self) -> Option<Uuid> {
        match self {
            SourceDisk::Chain(version) => version.frozen().layers().first().map(|layer| layer.image.uuid()),
            SourceDisk::Raw(..) => None,
        }
    }

    /// Returns the image format that the contents of a raw disk suggest, for a warning. Returns `None` for a chain.
    ///
    /// # Errors
    /// `Io`.
    pub fn container(&self) -> Result<Option<ImageFormat>> {
        let SourceDisk::Raw(file, len) = self else { return Ok(None) };
        let (mut head, mut tail) = ([0; PROBE_BYTES], [0; PROBE_BYTES]);
        let head_len = head.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
        file.read_at(&mut head[..head_len], 0)?;
        // A fixed VHD has only a footer at the end.
        if *len >= PROBE_BYTES as u64 {
            file.read_at(&mut tail, len - PROBE_BYTES as u64)?;
        }
        let at_end = ImageFormat::probe(&tail).filter(|format| *format == ImageFormat::Vhd);
        Ok(ImageFormat::probe(&head[..head_len]).or(at_end))
    }

    /// Returns the number of sectors, including a partial last sector.
    pub fn sectors(&self) -> u64 {
        self.bytes().div_ceil(SECTOR)
    }

    /// Reads a range that begins before the end of the disk. Bytes after the end are zero.
    ///
    /// # Errors
    /// `Io`, with the path of the file and the offset.
    pub(super) fn read(&self, range: SectorRange, into: &mut [u8], plan: &mut PlanBuffer) -> Result<()> {
        let start = range.start() * SECTOR;
        let on_disk = usize::try_from(self.bytes().saturating_sub(start)).unwrap_or(usize::MAX).min(into.len());
        let (disk, beyond) = into.split_at_mut(on_disk);
        beyond.fill(0);
        match self {
            SourceDisk::Chain(version) => version.read_now(range.first(on_disk as u64 / SECTOR), disk, plan),
            SourceDisk::Raw(file, _) => file.read_at(disk, start),
        }
    }

    /// Returns the ranges that may contain data.
    pub(super) fn data_runs(&self) -> DataRuns<'_> {
        self.data_runs_from(0)
    }

    /// Returns the ranges at or after `sector` that may contain data.
    pub(super) fn data_runs_from(&self, sector: u64) -> DataRuns<'_> {
        let runs = match self {
            SourceDisk::Chain(version) => RunCursor::Chain(Extents::from(version, sector)),
            SourceDisk::Raw(file, _) => RunCursor::Raw(file, sector * SECTOR),
        };
        DataRuns { sectors: self.sectors(), cursor: runs, last_data: FileDataRun::default(), rest: None }
    }
}

enum RunCursor<'a> {
    Chain(Extents<'a>),
    Raw(&'a File, u64),
}

/// Iterator over the ranges of a disk that may contain data, ascending. All other sectors are zero.
pub(super) struct DataRuns<'a> {
    sectors: u64,
    cursor: RunCursor<'a>,
    /// The last result of [`next_data`].
    last_data: FileDataRun,
    /// The part of the last extent that was not returned yet.
    rest: Option<Extent>,
}

/// A range of a file without holes, in bytes.
#[derive(Default)]
struct FileDataRun {
    slot: Option<FileSlot>,
    start: u64,
    end: u64,
}

impl DataRuns<'_> {
    /// Returns the next range, or `None` at the end of the disk.
    ///
    /// # Errors
    /// `Io`.
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
                let (range, last) = (extent.range, &mut self.last_data);
                if last.slot != Some(slot) || offset < last.start || offset >= last.end {
                    let found = next_data(extents.file(slot), offset..u64::MAX)?;
                    let (start, end) = found.map_or((u64::MAX, u64::MAX), |found| (found.start, found.end));
                    *last = FileDataRun { slot: Some(slot), start, end };
                }
                let hole = (last.start.saturating_sub(offset) / SECTOR).min(range.count());
                let data = (last.end - offset).div_ceil(SECTOR).min(range.count()) - hole;
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

/// Reads the disk, and calls `put` for each run of pages that are not zero. The runs ascend, and a run has at most
/// [`CHUNK_BYTES`] bytes.
///
/// # Errors
/// `Io`; errors of `put` and `progress`.
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
