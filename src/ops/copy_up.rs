//! Copying up, for `flatten` and `rebase`: data of the old parents that the new parents lack is copied into the child.
//!
//! ```text
//!   old parents   ──┐  same file, same offset: nothing is read or written
//!                   ├─ both zero: nothing is read or written
//!   new parents   ──┘  otherwise compared page by page: differing pages are written into the child, zeros as bits only
//! ```
//!
//! The contents of the disk do not change during the copy, because each write into the child has the bytes that the
//! disk already has at this place.

use std::collections::BTreeMap;

use super::extents::{WINDOW_SECTORS, next_allocated};
use super::image_writer::ImageWriter;
use super::source::{CHUNK_BYTES, CHUNK_SECTORS, Progress};
use super::zero_scan::PAGE_BYTES;
use crate::chain::{Extent, PlanBuffer, Source, Version};
use crate::error::Result;
use crate::image::{is_zero, next_data};
use crate::storage::{Buffer, FileId, FileSlot};
use crate::units::{SECTOR, SectorRange};

/// Progress of [`copy_up`], for failpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CopyUpStage {
    /// A window was written.
    Written,
    /// Everything is written and durable.
    Committed,
}

/// Copies into the image of `writer` the sectors in which its old parents and the parents in `new` differ. If `new` is
/// `None`, the image will have no parent. When the copy is durable, returns the number of bytes that were copied.
///
/// # Errors
/// - `NoSpace`, `Io`, `Poisoned`; the contents of the disk are unchanged
/// - errors of `progress`
pub(super) fn copy_up(
    writer: &mut ImageWriter<'_>,
    new: Option<&Version>,
    progress: &mut Progress<'_>,
    stage: &mut dyn FnMut(CopyUpStage),
) -> Result<u64> {
    let mut work = CopyUp {
        old_files: file_ids(writer.version())?,
        new_files: new.map_or(Ok(BTreeMap::new()), file_ids)?,
        new,
        plan: PlanBuffer::default(),
        new_plan: PlanBuffer::default(),
        old_data: Buffer::zeroed(CHUNK_BYTES),
        new_data: Buffer::zeroed(CHUNK_BYTES),
        copied: 0,
    };
    let (mut at, sectors) = (0, writer.version().sectors());
    loop {
        at = work.next_allocated(writer.version(), at);
        if at >= sectors {
            break;
        }
        let window = SectorRange::between(at, (at + WINDOW_SECTORS).min(sectors));
        for run in work.candidates(writer.version(), window)? {
            work.copy(writer, run)?;
        }
        at = window.end();
        stage(CopyUpStage::Written);
        progress(at * SECTOR)?;
    }
    writer.commit()?;
    stage(CopyUpStage::Committed);
    progress(sectors * SECTOR)?;
    Ok(work.copied)
}

/// A range that the child does not contain, and in which the chains of the old and the new parents may differ.
struct CandidateRun {
    range: SectorRange,
    old: Source,
    new: Source,
}

struct CopyUp<'a> {
    /// The new parents.
    new: Option<&'a Version>,
    /// Device and inode of each file, by slot.
    old_files: BTreeMap<FileSlot, FileId>,
    new_files: BTreeMap<FileSlot, FileId>,
    /// Plan of the child and its old parents.
    plan: PlanBuffer,
    /// Plan of the new parents.
    new_plan: PlanBuffer,
    old_data: Buffer,
    new_data: Buffer,
    /// Bytes written into the child.
    copied: u64,
}

/// Returns device and inode of each file.
fn file_ids(version: &Version) -> Result<BTreeMap<FileSlot, FileId>> {
    version.files().map(|(slot, file)| Ok((slot, file.stat()?.id))).collect()
}

impl CopyUp<'_> {
    /// Returns the first sector at or after `at` that is in an allocated block of an old or a new parent, or `u64::MAX`
    /// if there is none.
    fn next_allocated(&self, version: &Version, at: u64) -> u64 {
        let new = self.new.iter().flat_map(|new| new.frozen().layers());
        let all = version.frozen().layers().iter().chain(new);
        all.map(|layer| next_allocated(layer, at)).min().unwrap_or(u64::MAX)
    }

    /// Returns the ranges of a window that the child does not contain, and in which the two chains may differ.
    fn candidates(&mut self, version: &Version, window: SectorRange) -> Result<Vec<CandidateRun>> {
        let (mut runs, top) = (Vec::new(), version.top().expect("opened for writing").slot);
        version.plan_read_now(window, &mut self.plan)?;
        for extent in &self.plan.extents {
            if matches!(extent.source, Source::File { slot, .. } if slot == top) {
                continue;
            }
            let Some(new) = self.new else {
                runs.push(CandidateRun { range: extent.range, old: extent.source, new: Source::Zero });
                continue;
            };
            new.plan_read_now(extent.range, &mut self.new_plan)?;
            let mut old = *extent;
            for Extent { range, source } in &self.new_plan.extents {
                runs.push(CandidateRun { range: *range, old: old.source, new: *source });
                old = old.skip(range.count());
            }
        }
        runs.retain(|run| !self.has_same_source(run));
        Ok(runs)
    }

    /// Returns whether both chains take the range from the same bytes of the same file, or both from no file.
    fn has_same_source(&self, run: &CandidateRun) -> bool {
        match (run.old, run.new) {
            (Source::Zero, Source::Zero) => true,
            (Source::File { slot: a, offset: old }, Source::File { slot: b, offset: new }) => {
                old == new && self.old_files[&a] == self.new_files[&b]
            }
            _ => false,
        }
    }

    /// Copies one range, in chunks.
    fn copy(&mut self, writer: &mut ImageWriter<'_>, run: CandidateRun) -> Result<()> {
        let mut rest = run;
        while !rest.range.is_empty() {
            let range = rest.range.first(CHUNK_SECTORS - rest.range.start() % CHUNK_SECTORS);
            let len = usize::try_from(range.bytes()).expect("at most a chunk");
            let has_data = read_source(writer.version(), rest.old, &mut self.old_data[..len])?;
            match self.new {
                Some(new) => drop(read_source(new, rest.new, &mut self.new_data[..len])?),
                None if has_data => self.new_data[..len].fill(0),
                None => {}
            }
            if has_data || self.new.is_some() {
                self.write_differing_pages(writer, range)?;
            }
            rest = CandidateRun {
                range: rest.range.skip(range.count()),
                old: rest.old.advanced_by(range.count()),
                new: rest.new.advanced_by(range.count()),
            };
        }
        Ok(())
    }

    /// Writes the pages of a range in which `old_data` and `new_data` differ. Adjacent pages are written together.
    fn write_differing_pages(&mut self, writer: &mut ImageWriter<'_>, range: SectorRange) -> Result<()> {
        let into_page = usize::try_from(range.start() * SECTOR % PAGE_BYTES as u64).expect("in a page");
        let (old, new) = (&self.old_data, &self.new_data);
        let len = usize::try_from(range.bytes()).expect("at most a chunk");
        let need = |from: usize, to: usize| match &old[from..to] {
            old if old == &new[from..to] => None,
            old => Some(is_zero(old)),
        };
        let mut at = 0;
        while at < len {
            let page_end = |at: usize| len.min((at + into_page) / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES - into_page);
            let (start, first) = (at, need(at, page_end(at)));
            at = page_end(at);
            while at < len && need(at, page_end(at)) == first {
                at = page_end(at);
            }
            let run = range.skip(start as u64 / SECTOR).first((at - start) as u64 / SECTOR);
            match first {
                None => continue,
                Some(true) => writer.put_zeros(run)?,
                Some(false) => writer.put(run, &old[start..at])?,
            }
            self.copied += run.bytes();
        }
        Ok(())
    }
}

/// Reads a range from its source. Returns false if the range is zero because it lies in no file or in a hole.
fn read_source(version: &Version, source: Source, into: &mut [u8]) -> Result<bool> {
    if let Source::File { slot, offset } = source {
        let file = version.file(slot);
        if next_data(file, offset..offset + into.len() as u64)?.is_some() {
            file.read_at(into, offset)?;
            return Ok(true);
        }
    }
    into.fill(0);
    Ok(false)
}
