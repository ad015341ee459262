//! `compare`: compares the contents of two disks as guests see them.

use super::source::{CHUNK_BYTES, CHUNK_SECTORS, DataRuns, Progress, SourceDisk};
use crate::chain::PlanBuffer;
use crate::error::Result;
use crate::storage::Buffer;
use crate::units::{SECTOR, SectorRange};

/// Returns the offset of the first byte in which the disks differ, or `None` if the disks are equal. The shorter disk
/// counts as continued by zeros. Ranges without data in both disks are not read.
///
/// # Errors
/// `Io`; errors of `progress`.
pub fn compare(a: &SourceDisk, b: &SourceDisk, progress: &mut Progress<'_>) -> Result<Option<u64>> {
    let (mut of_a, mut of_b) = (ComparedDisk::new(a)?, ComparedDisk::new(b)?);
    let end = a.bytes().max(b.bytes());
    let mut at = 0;
    while let Some(start) = of_a.next_data(at)?.into_iter().chain(of_b.next_data(at)?).min() {
        let piece = SectorRange::between(start, start - start % CHUNK_SECTORS + CHUNK_SECTORS);
        let piece = piece.clip(SectorRange::between(0, end.div_ceil(SECTOR)));
        let (left, right) = (of_a.read(piece)?, of_b.read(piece)?);
        if left != right {
            let same = left.iter().zip(right).take_while(|(l, r)| l == r).count();
            return Ok(Some(piece.start() * SECTOR + same as u64));
        }
        at = piece.end();
        progress((at * SECTOR).min(end))?;
    }
    progress(end)?;
    Ok(None)
}

/// One of the two disks, with its current position.
struct ComparedDisk<'a> {
    disk: &'a SourceDisk,
    data: DataRuns<'a>,
    next: Option<SectorRange>,
    plan: PlanBuffer,
    buffer: Buffer,
}

impl<'a> ComparedDisk<'a> {
    fn new(disk: &'a SourceDisk) -> Result<ComparedDisk<'a>> {
        let mut data = disk.data_runs();
        let next = data.next()?;
        Ok(ComparedDisk { disk, data, next, plan: PlanBuffer::default(), buffer: Buffer::zeroed(CHUNK_BYTES) })
    }

    /// Returns the first sector at or after `at` that may contain data.
    fn next_data(&mut self, at: u64) -> Result<Option<u64>> {
        while let Some(run) = self.next {
            if run.end() > at {
                return Ok(Some(run.start().max(at)));
            }
            self.next = self.data.next()?;
        }
        Ok(None)
    }

    fn read(&mut self, range: SectorRange) -> Result<&[u8]> {
        let bytes = &mut self.buffer[..usize::try_from(range.bytes()).expect("at most a chunk")];
        self.disk.read(range, bytes, &mut self.plan)?;
        Ok(bytes)
    }
}
